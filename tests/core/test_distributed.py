"""Two processes that train together are measured as one: every number is that of the whole batch."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradmon import METRICS, Mask, Monitor, Reading, every
from gradmon.perturbations import inputs, weights
from tests.core.distributed_models import batches, cross_entropy, make, part
from tests.core.ranks import run_ranks

EXAMPLES = 12
Readings = dict[str, Reading]
Found = dict[Any, Readings]


def train(model: nn.Module, given: list[Any], monitor: Monitor, optimizer: torch.optim.Optimizer) -> Readings:
    for batch in given:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    return monitor.readings


def own_part(batch: Any, rank: int | None, bounds: tuple[int, ...] = (0, 6, 12)) -> Any:
    return batch if rank is None else part(batch, bounds[rank], bounds[rank + 1])


def wrapped(model: nn.Module, rank: int | None, how: str) -> nn.Module:
    if rank is None:
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "views":
        return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    mesh = init_device_mesh("cpu", (2,))
    for child in model.children():
        if isinstance(child, nn.Linear | nn.Conv2d) and not hasattr(model, "table"):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measured(rank: int | None, name: str, how: str, passive: bool, **options: Any) -> Readings:
    model = wrapped(make(name), rank, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = [own_part(batch, rank) for batch in batches(name, EXAMPLES, 2)]
    loss = None if passive else cross_entropy
    options = {"metrics": "all" if passive else list(METRICS), "micro_batches": 4, "layers": True, **options}
    with Monitor(model, optimizer, loss, schedule=every(1), alerts=None, **options) as monitor:
        return train(model, given, monitor, optimizer)


CASES: list[tuple[str, str, bool, Any]] = [
    (name, how, passive, mask)
    for name in ("mlp", "conv", "tied")
    for how in ("ddp", "fsdp")
    for passive in (False, True)
    for mask in ("default", None, 0.3)
    if (how, passive) != ("fsdp", True) and ((how, name) == ("ddp", "mlp") or mask != 0.3)
]


def every_case(rank: int | None) -> Found:
    return {case: measured(rank, *case[:3], mask=case[3]) for case in CASES}


def assert_alike(found: Reading, expected: Reading, where: Any, tolerance: float = 1e-6) -> None:
    assert found.reason == expected.reason, (where, found, expected)
    same = found.value == expected.value or (math.isnan(found.value) and math.isnan(expected.value))
    assert same or abs(found.value - expected.value) <= tolerance * abs(expected.value), (where, found, expected)
    assert found.step == expected.step


OWN = {"probe_seconds", "monitor_overhead"}


def assert_same_numbers(ranks: list[Readings], whole: Readings, where: Any) -> None:
    assert set(ranks[0]) == set(whole)
    for name, expected in whole.items():
        assert len({repr(readings[name]) for readings in ranks}) == 1, (where, name)
        if name not in OWN:
            assert_alike(ranks[0][name], expected, (where, name))


def test_every_metric_is_that_of_the_whole_batch(together: list[Any]) -> None:
    ranks = [found["cases"] for found in together]
    whole: Found = {}
    for case in CASES:
        key = (case[0], case[2], case[3])
        if key not in whole:
            whole[key] = measured(None, case[0], "", case[2], mask=case[3])
        assert_same_numbers([found[case] for found in ranks], whole[key], case)
        assert whole[key]["batch_size"].value == EXAMPLES
    numbers = [r for readings in whole.values() for r in readings.values() if r.layer is None]
    assert {r.name for r in numbers if not math.isnan(r.value)} >= set(METRICS), "some metric was never compared"


SAMPLERS: list[dict[str, Any]] = [
    {"weights": weights.Targeted(n=9), "inputs": inputs.Random(n=2)},
    {"weights": weights.Limited(), "inputs": inputs.Targeted(n=8)},
    {"weights": weights.Random(n=3), "inputs": inputs.Toward(n=3, examples=8)},
    {"weights": weights.Krylov(k=2), "inputs": inputs.Ascent(k=2, examples=5)},
    {"derivative": "exact", "inputs": inputs.Fixed(1e-3 * torch.linspace(-1, 1, 12 * 6).double().reshape(1, 12, 6))},
]
SWEPT = ["weight_condition", "weight_cosine", "scale_ratio", "sharpness", "input_condition"]


def every_sampler(rank: int | None) -> list[Readings]:
    return [measured(rank, "mlp", "ddp", False, metrics=SWEPT, mask=None, **options) for options in SAMPLERS]


LENGTHS = (0, 5, 12)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """The loss of all ranks where they have different numbers of examples: the mean of their means."""
    single = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (single[:5].mean() + single[5:].mean()) / 2


def unequal(rank: int | None) -> Found:
    found: Found = {}
    for passive in (False, True):
        model = wrapped(make("mlp"), rank, "ddp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        given = [own_part(batch, rank, LENGTHS) for batch in batches("mlp", EXAMPLES, 2)]
        loss = weighted if rank is None else cross_entropy
        metrics = "all" if passive else list(METRICS)
        with Monitor(
            model, optimizer, None if passive else loss, metrics=metrics, schedule=every(1), mask=None, micro_batches=3
        ) as monitor:
            for batch in given:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                monitor.step(batch)
        found[passive] = monitor.readings
    return found


def accumulated(rank: int | None) -> Found:
    """Each rank's part in two pieces, without exchange in between and with it."""
    found: Found = {}
    for sync in (False, True):
        model = wrapped(make("mlp"), rank, "ddp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Monitor(model, optimizer, metrics="all", schedule=every(1), micro_batches=4) as monitor:
            for batch in batches("mlp", EXAMPLES, 2):
                optimizer.zero_grad()
                batch = own_part(batch, rank)
                pieces = [batch] if rank is None else [part(batch, 0, 3), part(batch, 3, 6)]
                for piece in pieces:
                    alone = rank is not None and not sync and piece is not pieces[-1]
                    with model.no_sync() if alone else contextlib.nullcontext():
                        (cross_entropy(model, piece) / len(pieces)).backward()
                optimizer.step()
                monitor.step(batch)
        found[sync] = monitor.readings
    return found


def test_samplers_unequal_batches_and_accumulation(together: list[Any]) -> None:
    ranks = [found["several"] for found in together]
    whole = _several(None)
    for position, _ in enumerate(SAMPLERS):
        assert_same_numbers([r[0][position] for r in ranks], whole[0][position], position)
    for kind in (1, 2):
        for key in whole[kind]:
            assert_same_numbers([r[kind][key] for r in ranks], whole[kind][key], (kind, key))


def _several(rank: int | None) -> Any:
    return every_sampler(rank), unequal(rank), accumulated(rank)


def by_definition(name: str) -> dict[str, float]:
    """Some numbers of ranks with 5 and 7 examples, from one backward pass for each example."""
    model = make(name)
    inputs_, targets = batches(name, EXAMPLES, 1)[0]
    rows: list[np.ndarray[Any, Any]] = []
    for example in range(EXAMPLES):
        loss = nn.functional.cross_entropy(model(inputs_[example : example + 1]), targets[example : example + 1])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        own = 5 if example < 5 else 7
        rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy() * EXAMPLES / (2 * own))
    shares = np.array(rows)
    mean = shares.mean(0)
    noise = shares.var(0, ddof=1).sum()
    return {
        "grad_norm": float(np.linalg.norm(mean)),
        "gradient_coherence": float(mean @ shares.sum(0) / (shares**2).sum()),
        "noise_scale": float(noise / (mean @ mean - noise / EXAMPLES)),
        "gradient_snr": float(np.median(mean**2 / shares.var(0, ddof=1))),
    }


def _first_readings(rank: int, name: str) -> Readings:
    model = wrapped(make(name), rank, "ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    given = [own_part(batches(name, EXAMPLES, 1)[0], rank, LENGTHS)]
    metrics = ["grad_norm", "gradient_coherence", "noise_scale", "gradient_snr"]
    with Monitor(model, optimizer, cross_entropy, metrics=metrics, schedule=every(1), mask=None) as monitor:
        return train(model, given, monitor, optimizer)


def test_unequal_batches_against_the_definition(together: list[Any]) -> None:
    ranks = [found["first"] for found in together]
    for name, expected in by_definition("mlp").items():
        if name == "noise_scale" and expected <= 0:
            expected = math.inf
        assert ranks[0][name].value == pytest.approx(expected, rel=1e-9), name


class Noisy(nn.Module):
    """Dropout and batch norm, in float32: what is random, and what changes in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _trained(rank: int, how: str, options: dict[str, Any] | None) -> list[Any]:
    torch.manual_seed(11)
    model = wrapped(Noisy(), rank, how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    own = None if options is None else Monitor(model, optimizer, **options)
    with contextlib.nullcontext() if own is None else own:
        for batch in batches("mlp", EXAMPLES, 4):
            x, target = own_part(batch, rank)
            optimizer.zero_grad()
            cross_entropy(model, (x.float(), target)).backward()
            optimizer.step()
            if own is not None:
                own.step((x.float(), target))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.state_dict().values()]
    return [*(value.clone() for value in whole), torch.get_rng_state()]


WAYS = ("ddp", "views", "fsdp")


def _all_trained(rank: int) -> Any:
    active = {"loss": cross_entropy, "schedule": every(1), "metrics": "all"}
    return {
        (how, kind): _trained(rank, how, options)
        for how in WAYS
        for kind, options in (("none", None), ("active", active), ("passive", {"schedule": every(1)}))
    }


def test_training_does_not_change_by_a_bit(together: list[Any]) -> None:
    for found in (rank["trained"] for rank in together):
        for how in WAYS:
            for kind in ("active", "passive"):
                for mine, alone in zip(found[how, kind], found[how, "none"], strict=True):
                    assert torch.equal(mine, alone), (how, kind)


def _masks(rank: int) -> Any:
    torch.manual_seed(rank)  # the draw must not depend on it
    model = wrapped(make("mlp"), rank, "fsdp")
    return Mask(0.1, seed=4).sample(model)


def _resumed(rank: int, file: Path) -> Any:
    def run(steps: slice, state: Any, training: Any) -> Any:
        model = wrapped(make("mlp"), rank, "ddp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if training is not None:
            model.load_state_dict(training)
        with Monitor(model, optimizer, cross_entropy, schedule=every(1)) as monitor:
            if state is not None:
                monitor.load_state_dict(state)
            given = [own_part(batch, rank) for batch in batches("mlp", EXAMPLES, 4)[steps]]
            readings = train(model, given, monitor, optimizer)
            return readings, monitor.state_dict(), copy.deepcopy(model.state_dict())

    whole = run(slice(4), None, None)[0]
    _, state, training = run(slice(2), None, None)
    if rank == 0:
        torch.save(state, file)
    dist.barrier()
    return whole, run(slice(2, 4), torch.load(file), training)[0]


def test_masks_are_the_same_on_all_ranks(together: list[Any]) -> None:
    expected = Mask(0.1, seed=4).sample(make("mlp"))
    for found in together:
        assert torch.equal(found["mask"], expected)


def test_a_run_is_resumed_from_what_one_rank_saved(together: list[Any]) -> None:
    for whole, resumed in (found["resumed"] for found in together):
        assert set(whole) == set(resumed)
        for name in set(whole) - OWN:
            assert_alike(resumed[name], whole[name], name, 1e-9)


def _everything(rank: int, folder: Path) -> Any:
    return {
        "cases": every_case(rank),
        "several": _several(rank),
        "first": _first_readings(rank, "mlp"),
        "trained": _all_trained(rank),
        "mask": _masks(rank),
        "resumed": _resumed(rank, folder / "state.pt"),
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two ranks have found, all in one go because it takes seconds to start them."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(_everything, folder, folder, limit=240)
