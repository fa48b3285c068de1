"""Ranks that fail, skip, leave, come late, or die: nobody waits for ever, and no number is made up."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradmon import Monitor, Reading, every
from gradmon.perturbations.weights import Krylov, WeightPoint
from tests.core.distributed_models import batches, cross_entropy, make, part
from tests.core.ranks import run_ranks

METRICS = ["grad_norm", "weight_condition", "noise_scale", "input_condition", "step_ratio"]
Seen = list[dict[str, Reading]]


class Run:
    """A training of which each rank has its part, in which nothing but the monitor talks to the others."""

    def __init__(self, rank: int, loss: Callable[[nn.Module, Any], Tensor] | None = cross_entropy, **options: Any):
        self.model = make("mlp")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.rank, self.seen = rank, Seen()
        options = {"metrics": METRICS, "schedule": every(1), "group": dist.group.WORLD, "alerts": None, **options}
        self.monitor = Monitor(self.model, self.optimizer, loss, **options)
        self.batch = part(batches("mlp", 12, 1)[0], 6 * rank, 6 * rank + 6)

    def step(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model, self.batch).backward()
        self.optimizer.step()
        self.monitor.step(self.batch)
        self.seen.append(self.monitor.readings)


@contextlib.contextmanager
def warned(said: list[str]) -> Iterator[None]:
    """Collect what the logger of gradmon says."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, ear = logging.getLogger("gradmon"), Ear()
    log.addHandler(ear)
    try:
        yield
    finally:
        log.removeHandler(ear)


def failing_loss(rank: int) -> Any:
    """The loss of one rank raises in the second step, and never again."""
    fails = False

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if fails and rank == 1:
            raise ValueError("no luck")
        return cross_entropy(model, batch)

    run = Run(rank, loss)
    run.step()
    fails = True
    run.step()
    fails = False
    run.step()
    failures = dict(run.monitor.failures)
    run.monitor.close()
    return run.seen, failures


def missing_number(rank: int) -> Any:
    """What one rank cannot say, none can; the rest stands."""

    class Shy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            # Whose the rows are cannot be seen on one rank.
            return self.inner(x) if rank == 0 else self.inner(x.flip(0)).flip(0)

    run = Run(rank)
    shy = Shy(run.model)
    with Monitor(
        shy, run.optimizer, cross_entropy, metrics=METRICS, schedule=every(1), group=dist.group.WORLD, alerts=None
    ) as monitor:
        cross_entropy(shy, run.batch).backward()
        run.optimizer.step()
        monitor.step(run.batch)
        readings = monitor.readings
    run.monitor.close()
    return [readings]


@dataclass(frozen=True)
class Broken:
    """A sampler that fails on one rank only, where no pass is made."""

    rank: int
    span: ClassVar[bool] = False

    def draw(self, point: WeightPoint) -> Any:
        if self.rank == 1:
            raise ZeroDivisionError("a sampler of the user's")
        yield from Krylov(1).draw(point)

    def scaled(self, factor: float) -> Broken:
        return self


def failing_sampler(rank: int) -> Any:
    run = Run(rank, weights=Broken(rank))
    run.step()
    run.step()
    run.monitor.close()
    return run.seen


def skipped_step(rank: int) -> Any:
    run = Run(rank)
    run.step()
    if rank == 1:
        run.monitor._step += 1  # as if it had been called once more
    run.step()
    if rank == 0:
        run.monitor._step += 1
    run.step()
    run.monitor.close()
    return run.seen


def early_end(rank: int) -> Any:
    run = Run(rank)
    run.step()
    if rank == 1:
        run.monitor.close()
    took = time.monotonic()
    run.step()
    run.step()
    took = time.monotonic() - took
    run.monitor.close()
    return run.seen, took


def late(rank: int) -> Any:
    """One rank comes when the other has given up; both go on alone."""
    run = Run(rank, group_timeout=4.0)
    run.step()
    if rank == 1:
        time.sleep(6)
    run.step()
    run.step()
    run.monitor.close()
    return run.seen


def interrupted(rank: int) -> Any:
    stops = False

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if stops and rank == 1:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    run = Run(rank, loss)
    run.step()
    stops = True
    with contextlib.suppress(KeyboardInterrupt):
        run.step()
    stops = False
    run.step()
    run.monitor.close()
    return run.seen


def out_of_memory(rank: int) -> Any:
    short = True

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if short and rank == 1:
            raise torch.OutOfMemoryError("no room")
        return cross_entropy(model, batch)

    run = Run(rank, loss, metrics=["grad_norm", "noise_scale"])
    run.step()
    short = False
    run.step()
    memory = run.monitor._setting.memory
    run.monitor.close()
    return run.seen, memory.experience.max_memory, sorted(kind.__name__ for kind in memory.exhausted)


def alone(rank: int) -> Any:
    """Only the first rank makes a monitor."""
    said: list[str] = []
    began = time.monotonic()
    if rank == 0:
        with warned(said):
            run = Run(rank, group_timeout=0.5)
        run.step()
        run.monitor.close()
        return run.seen, said, time.monotonic() - began
    return None


def unlike(rank: int) -> Any:
    """The monitors of the ranks are asked for different things."""
    said: list[str] = []
    with warned(said):
        run = Run(rank, seed=rank)
    run.step()
    run.monitor.close()
    return run.seen, said


CASES = (
    failing_loss, missing_number, failing_sampler, skipped_step, early_end, late, interrupted, out_of_memory, alone,
    unlike,
)  # fmt: skip


def every_failure(rank: int) -> Any:
    found: dict[str, Any] = {}
    for case in CASES:
        dist.barrier()
        found[case.__name__] = case(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw in every case; none may take longer than the limit of all."""
    return run_ranks(every_failure, tmp_path_factory.mktemp("ranks"), limit=120)


def reasons(seen: dict[str, Reading]) -> set[str | None]:
    return {seen[name].reason for name in METRICS if name in seen}


def is_whole(seen: dict[str, Reading]) -> bool:
    return not any(math.isnan(seen[name].value) for name in ("grad_norm", "weight_condition", "input_condition"))


def test_what_fails_on_one_rank_fails_on_all_and_comes_back(ranks: list[Any]) -> None:
    for seen, failures in (found["failing_loss"] for found in ranks):
        assert is_whole(seen[0])
        assert reasons(seen[1]) == {"RankError: rank 1: ValueError: no luck"}
        assert is_whole(seen[2])
        assert failures["probe"] == 1


def test_what_one_rank_cannot_say_no_rank_says(ranks: list[Any]) -> None:
    for (seen,) in (found["missing_number"] for found in ranks):
        assert str(seen["noise_scale"].reason).startswith("rank 1: per-example gradients cannot be had")
        assert not math.isnan(seen["grad_norm"].value)
        assert not math.isnan(seen["weight_condition"].value)


def test_ranks_that_take_different_courses_end_the_round(ranks: list[Any]) -> None:
    for seen in (found["failing_sampler"] for found in ranks):
        for step in seen:
            assert not math.isnan(step["grad_norm"].value)
            assert math.isnan(step["weight_condition"].value)
        assert repr(seen[-1]["grad_norm"]) == repr(ranks[0]["failing_sampler"][-1]["grad_norm"])
    own = ranks[0]["failing_sampler"][0]["weight_condition"].reason
    assert own == "rank 1 took another course: ZeroDivisionError: a sampler of the user's"


def test_ranks_at_different_steps_see_it(ranks: list[Any]) -> None:
    for seen in (found["skipped_step"] for found in ranks):
        assert is_whole(seen[0])
        assert reasons(seen[1]) == {"the ranks are at different steps (2 and 3)"}
        assert is_whole(seen[2])


def test_a_rank_that_ends_early_is_not_waited_for(ranks: list[Any]) -> None:
    seen, took = ranks[0]["early_end"]
    assert is_whole(seen[0])
    assert reasons(seen[1]) == {"rank 1 has ended"}
    assert seen[2]["grad_norm"].step == 3
    assert took < 5


def test_a_rank_that_comes_late_finds_that_nobody_waits(ranks: list[Any]) -> None:
    for seen in (found["late"] for found in ranks):
        assert is_whole(seen[0])
        assert reasons(seen[1]) == reasons(seen[2]) == {"rank 1 did not come within 4 s"}


def test_a_rank_that_is_interrupted_lets_the_others_go(ranks: list[Any]) -> None:
    seen = ranks[0]["interrupted"]
    assert is_whole(seen[0])
    assert reasons(seen[1]) == {"rank 1 was interrupted"}
    assert reasons(ranks[1]["interrupted"][-1]) == {"rank 1 was interrupted"}


def test_memory_that_runs_out_on_one_rank_is_short_on_all(ranks: list[Any]) -> None:
    assert repr(ranks[0]["out_of_memory"]) == repr(ranks[1]["out_of_memory"]).replace("rank 0", "rank 1")
    seen, memory, exhausted = ranks[0]["out_of_memory"]
    assert memory < 1 << 28
    assert exhausted == ["PerExampleGradients"]
    assert not math.isnan(seen[1]["grad_norm"].value)


def test_a_monitor_that_is_alone_measures_its_own_process(ranks: list[Any]) -> None:
    seen, said, took = ranks[0]["alone"]
    assert is_whole(seen[0])
    assert any("rank 1 did not come within 0.5 s" in line for line in said)
    assert took < 10


def test_monitors_that_differ_do_not_measure_together(ranks: list[Any]) -> None:
    for seen, said in (found["unlike"] for found in ranks):
        assert is_whole(seen[0])
        assert any("seed is 0 on rank 0, and 1 on rank 1" in line for line in said)


def _dies(rank: int, file: Path) -> Any:
    dist.barrier()
    run = Run(rank, group_timeout=4.0)
    run.step()
    if rank == 1:
        file.write_text("")
        os._exit(0)
    while not file.exists():
        time.sleep(0.01)
    run.step()
    run.step()
    run.monitor.close()
    return run.seen


def test_a_rank_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    seen = run_ranks(_dies, tmp_path, tmp_path / "dead", limit=60)[0]
    assert is_whole(seen[0])
    assert reasons(seen[1]) == {"rank 1 did not come within 4 s"}
