"""What the monitors of two processes have in common besides the numbers: when they look, write, and stop."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gradmon import Alert, ArgumentError, Monitor, Reading, budget, every
from gradmon.lockstep import _apart
from gradmon.team import passes_talk
from gradmon.team.channel import Channel, Lost
from tests.core.distributed_models import batches, cross_entropy, make, part
from tests.core.ranks import run_ranks


class Training(NamedTuple):
    """A training under DistributedDataParallel."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Any]


def training(rank: int, steps: int, name: str = "mlp") -> Training:
    model = DistributedDataParallel(make(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Training(model, optimizer, [part(b, 6 * rank, 6 * rank + 6) for b in batches(name, 12, steps)])


def step(given: Training, monitor: Monitor, number: int, loss: Any = cross_entropy) -> None:
    given.optimizer.zero_grad()
    loss(given.model, given.batches[number]).backward()
    given.optimizer.step()
    monitor.step(given.batches[number])


def with_budget(rank: int) -> Any:
    """One rank's steps take longer, and yet both look at the same ones."""
    given, looked = training(rank, 8), dict[int, list[str]]()
    with Monitor(given.model, given.optimizer, cross_entropy, schedule=budget(0.9), alerts=None) as monitor:
        for number in range(160):
            before = monitor.readings
            step(given, monitor, number % 8)
            if rank == 1:
                time.sleep(0.002)
            new = {name for name, reading in monitor.readings.items() if before.get(name) != reading}
            if new:
                looked[number + 1] = sorted(new)
        readings = monitor.readings
    return looked, readings


class Fires:
    """A rule that fires in one step."""

    name = "now"

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, reading: Reading) -> Alert | None:
        if reading.name != "grad_norm" or reading.step != self.at:
            return None
        return Alert(self.name, "critical", "firing", reading.value, reading.step, None, "It is time.", "Stop.")


def stops(rank: int, folder: Path) -> Any:
    """By an alert; by a function that only the first rank calls; by a rank of its own accord."""
    found: dict[str, Any] = {}
    called: list[str] = []
    for kind in ("alert", "function", "one rank"):
        given, seen = training(rank, 8), list[bool]()
        made: list[Monitor] = []

        def ask(alert: Alert, made: list[Monitor] = made) -> None:
            called.append(alert.rule)
            made[0].stop()

        act: Any = {"alert": "stop", "one rank": None, "function": ask}[kind]
        monitor = Monitor(
            given.model, given.optimizer, schedule=every(2), metrics=["grad_norm"], alerts=[Fires(4)], on_alert=act,
            sinks=f"jsonl:{folder}/{kind}-{rank}.jsonl",
        )  # fmt: skip
        made.append(monitor)
        with monitor:
            for number in range(8):
                step(given, monitor, number)
                if kind == "one rank" and rank == 1 and number == 2:
                    monitor.stop()
                seen.append(monitor.should_stop)
            found[kind] = seen, [alert.rule for alert in monitor.alerts], monitor.rank
    return found, called


def too_large(rank: int) -> Any:
    """Coordinates of all examples that do not fit into the memory that is allowed."""
    found: dict[Any, Any] = {}
    for passive in (False, True):
        for mask in ("default", None):
            given = training(rank, 3)
            loss = None if passive else cross_entropy
            with Monitor(
                given.model, given.optimizer, loss, schedule=every(1), mask=mask, max_memory=3000, alerts=None,
                metrics=["gradient_diversity", "grad_norm"],
            ) as monitor:  # fmt: skip
                seen: list[Any] = []
                for number in range(3):
                    step(given, monitor, number)
                    seen.append(monitor.readings["gradient_diversity"])
                found[passive, mask] = seen, monitor.readings["grad_norm"].value
    return found


def wrapper_in_the_loss(rank: int) -> Any:
    """A loss that calls the wrapped model of its own accord disturbs neither the training nor the numbers."""
    found: list[Any] = []
    for own in (False, True):
        given = training(rank, 3)

        def loss(model: nn.Module, batch: Any, given: Training = given, own: bool = own) -> Tensor:
            return cross_entropy(given.model if own else model, batch)

        with Monitor(given.model, given.optimizer, loss, schedule=every(1), alerts=None) as monitor:
            for number in range(3):
                step(given, monitor, number, loss)
            found.append((monitor.readings["weight_condition"].value, monitor.readings["grad_norm"].value))
    return found


def alone(rank: int) -> Any:
    """Each process for itself, because it says so, and because nobody said that they belong together."""
    given, said = training(rank, 1), list[str]()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, ear = logging.getLogger("gradmon"), Ear()
    log.addHandler(ear)
    norms: list[float] = []
    for model, group in ((given.model, None), (given.model.module, "auto"), (given.model.module, dist.group.WORLD)):
        with Monitor(
            model, given.optimizer, cross_entropy, metrics=["grad_norm"], schedule=every(1), group=group, alerts=None
        ) as monitor:
            given.optimizer.zero_grad()
            cross_entropy(given.model, given.batches[0]).backward()
            own = [p.detach().clone() for p in given.model.parameters()]
            given.optimizer.step()
            monitor.step(given.batches[0])
            norms.append(monitor.readings["grad_norm"].value)
            for parameter, before in zip(given.model.parameters(), own, strict=True):
                parameter.data.copy_(before)
    log.removeHandler(ear)
    other = dist.new_group([0])
    errors: list[str] = []
    for group in ("all", other if rank == 1 else "all"):
        with pytest.raises(ArgumentError) as raised:
            Monitor(given.model, given.optimizer, cross_entropy, group=group)
        errors.append(str(raised.value))
    return norms, said, errors


def in_parallel(rank: int | None) -> Any:
    """A model that is cut by tensor parallelism, and a sharded one that is only listened to."""
    found: list[Any] = []
    for how in ("tensor", "sharded", "loss"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        if rank is not None:
            mesh = init_device_mesh("cpu", (2,))
            if how == "sharded":
                fully_shard(model, mesh=mesh)
            else:
                parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Monitor(
            model, optimizer, cross_entropy if how == "loss" else None, schedule=every(1), metrics="default",
            alerts=None,
        ) as monitor:  # fmt: skip
            for batch in batches("mlp", 12, 2):  # the same on all ranks
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                optimizer.step()
                monitor.step(batch)
        found.append(monitor.readings)
    return found


def of_lengths(rank: int) -> Any:
    """Sequences of another length on each rank: there is no one shape of the examples' inputs."""
    given = training(rank, 1, "tied")
    ids, target = given.batches[0]
    given.batches[0] = ids[:, : 5 - 2 * rank], target
    with Monitor(
        given.model, given.optimizer, cross_entropy, schedule=every(1), mask=None, alerts=None,
        metrics=["grad_norm", "gradient_diversity", "input_gradient_rank", "input_condition"],
    ) as monitor:  # fmt: skip
        step(given, monitor, 0)
        return monitor.readings


def apart(rank: int) -> Any:
    """Ranks that say they train together, and do not: their weights, or their gradients, are their own."""
    found: list[Any] = []
    for passive in (False, True):
        model = make("mlp")
        if not passive and rank == 1:
            model[0].bias.data += 0.1
        given = Training(model, torch.optim.SGD(model.parameters(), lr=0.05), training(rank, 1).batches)
        loss = None if passive else cross_entropy
        with Monitor(
            model, given.optimizer, loss, schedule=every(1), metrics=["grad_norm", "gradient_diversity"], alerts=None,
            group=dist.group.WORLD,
        ) as monitor:  # fmt: skip
            step(given, monitor, 0)
            found.append(monitor.readings)
    return found


def everything(rank: int, folder: Path) -> Any:
    return {
        "apart": apart(rank),
        "lengths": of_lengths(rank),
        "budget": with_budget(rank),
        "stops": stops(rank, folder),
        "large": too_large(rank),
        "wrapper": wrapper_in_the_loss(rank),
        "alone": alone(rank),
        "parallel": in_parallel(rank),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What both ranks saw."""
    return run_ranks(everything, folder, folder, limit=150)


def test_a_budget_is_planned_for_all_ranks(ranks: list[Any]) -> None:
    (looked, readings), (other, others) = (found["budget"] for found in ranks)
    assert looked == other
    assert repr(readings) == repr(others)
    assert len(looked) >= 3
    assert readings["probe_seconds"].value > 0


@pytest.mark.parametrize(("kind", "first"), [("alert", 4), ("function", 4), ("one rank", 4)])
def test_all_ranks_stop_after_the_same_step(ranks: list[Any], kind: str, first: int) -> None:
    for rank, found in enumerate(ranks):
        seen, alerts, place = found["stops"][0][kind]
        assert seen == [number >= first for number in range(1, 9)]
        assert alerts == ["now"]
        assert place == rank


def test_only_the_first_rank_writes_and_acts(ranks: list[Any], folder: Path) -> None:
    assert [found["stops"][1] for found in ranks] == [["now"], []]
    for kind in ("alert", "function", "one rank"):
        assert (folder / f"{kind}-0.jsonl").stat().st_size > 0
        assert not (folder / f"{kind}-1.jsonl").exists()


def test_examples_that_do_not_fit(ranks: list[Any]) -> None:
    for found in (found["large"] for found in ranks):
        for (passive, mask), (seen, norm) in found.items():
            assert norm > 0
            if mask == "default":  # 5 % fit
                assert not math.isnan(seen[-1].value), (passive, mask)
            else:
                assert "take more than max_memory" in seen[-1].reason, (passive, mask)


def test_a_loss_that_calls_the_wrapped_model(ranks: list[Any]) -> None:
    for inner, outer in (found["wrapper"] for found in ranks):
        assert inner == outer


def test_processes_that_are_not_measured_together(ranks: list[Any]) -> None:
    whole = make("mlp")
    batch = batches("mlp", 12, 1)[0]
    for rank, (norms, said, errors) in enumerate(found["alone"] for found in ranks):
        for norm, piece in zip(norms, (*[part(batch, 6 * rank, 6 * rank + 6)] * 2, batch), strict=True):
            parts = torch.autograd.grad(cross_entropy(whole, piece), list(whole.parameters()))
            assert norm == pytest.approx(math.sqrt(sum(float(p.square().sum()) for p in parts)))
        assert len(said) == 1
        assert "those of this process's own batch" in said[0]
        assert all(error.startswith('`group` must be "auto", None, or a torch.distributed.Proc') for error in errors)


def test_models_that_are_cut_otherwise_show_their_norms(ranks: list[Any]) -> None:
    tensor, sharded, _ = in_parallel(None)
    for found in (found["parallel"] for found in ranks):
        for readings, expected, reason in (
            (found[0], tensor, "tensor or pipeline parallelism"),
            (found[1], sharded, "give the monitor the loss"),
            (found[2], tensor, "tensor or pipeline parallelism"),
        ):
            for name in ("grad_norm", "param_norm", "update_ratio", "step_condition"):
                assert readings[name].value == pytest.approx(expected[name].value, rel=1e-9), name
            assert reason in readings["noise_scale"].reason


def test_sequences_of_another_length_on_each_rank(ranks: list[Any]) -> None:
    model = make("tied")
    ids, target = batches("tied", 12, 1)[0]
    losses = (cross_entropy(model, (ids[:6], target[:6])) + cross_entropy(model, (ids[6:, :3], target[6:]))) / 2
    parts = torch.autograd.grad(losses, list(model.parameters()))
    norm = math.sqrt(sum(float(p.square().sum()) for p in parts))
    for readings in (found["lengths"] for found in ranks):
        assert readings["grad_norm"].value == pytest.approx(norm, rel=1e-9)
        assert readings["gradient_diversity"].value > 0
        for name in ("input_gradient_rank", "input_condition"):
            assert readings[name].reason.startswith("the inputs of different ranks have different shapes: (")


def test_ranks_that_do_not_train_one_model_have_no_numbers(ranks: list[Any]) -> None:
    for found in (found["apart"] for found in ranks):
        for readings in found:
            for name in ("grad_norm", "gradient_diversity"):
                assert str(readings[name].reason).startswith("weights or gradients differ from rank to rank")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, None),
        ({"step": 13}, "the ranks are at different steps (12 and 13)"),
        ({"due": ["loss"]}, "different metrics are due on different ranks"),
        ({"pending": 11}, "not all ranks have looked at the step before"),
        ({"taken": False}, "the optimizer has taken a step on some ranks only"),
    ],
)
def test_why_ranks_cannot_look_together(other: dict[str, Any], reason: str | None) -> None:
    here = {"step": 12, "due": ["loss", "grad_norm"], "pending": None, "taken": True}
    assert _apart([here, {**here, **other}]) == reason


def test_examples_that_interact_across_ranks_are_not_looked_at() -> None:
    assert passes_talk(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) is None
    assert "SyncBatchNorm" in str(passes_talk(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))))


def _channels(count: int, timeout: float) -> list[Channel]:
    store = dist.HashStore()
    return [Channel(store, rank, count, timeout) for rank in range(count)]


def test_a_channel_says_who_is_missing() -> None:
    leader, *_ = _channels(3, 0.1)
    with pytest.raises(Lost, match=r"rank 1 did not come within 0\.1 s"):
        leader.exchange({})
    with pytest.raises(Lost, match=r"rank 1 did not come within 0\.1 s"):
        leader.exchange({})
    assert leader.lost is not None


def test_a_channel_does_not_wait_for_those_who_have_left() -> None:
    leader, follower = _channels(2, 30.0)
    leader.leave("has ended")
    began = time.monotonic()
    with pytest.raises(Lost, match="rank 0 has ended"):
        follower.exchange({})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("value", [0, -1.0, True, "soon", math.inf])
def test_group_timeout_is_checked(value: Any) -> None:
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ArgumentError, match="`group_timeout` must be a positive number of seconds"):
        Monitor(model, optimizer, cross_entropy, group_timeout=value)


def test_a_group_without_processes_is_refused() -> None:
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ArgumentError, match="`group` must be"):
        Monitor(model, optimizer, cross_entropy, group="all")  # pyright: ignore[reportArgumentType]
