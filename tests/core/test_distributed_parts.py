"""Models of which a part is wrapped or sharded, or talks in its passes: no rank waits for passes of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradmon import Monitor, every
from gradmon.team.team import _alike
from tests.core.distributed_models import batches, cross_entropy, part
from tests.core.ranks import run_ranks


class Parts(nn.Module):
    """A model of which only a part is wrapped, which sends its buffers to the other ranks in every pass."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()).double().eval()
        self.body = DistributedDataParallel(body) if wrap else body
        self.head = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def in_parts(rank: int) -> Any:
    """Parts that are wrapped by themselves, or behind the loss only, where the ranks make unlike numbers of passes."""
    found: list[Any] = []
    edges = (0, 4, 12)
    piece = part(batches("mlp", 12, 1)[0], edges[rank], edges[rank + 1])
    for how, group in (("parts", dist.group.WORLD), ("parts", None), ("behind", dist.group.WORLD), ("plain", None)):
        model = Parts(how == "parts").eval()
        outer = DistributedDataParallel(model) if how == "behind" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def loss(_: nn.Module, batch: Any, outer: nn.Module = outer) -> Tensor:
            return cross_entropy(outer, batch)

        # With a group of its own each rank looks when it likes.
        due = every(1) if group is not None or rank == 0 else every(2)
        with Monitor(
            model, optimizer, loss, schedule=due, metrics=["grad_norm", "input_condition"], alerts=None, group=group,
            mask=None,
        ) as monitor:  # fmt: skip
            for _ in range(2):
                optimizer.zero_grad()
                loss(model, piece).backward()
                optimizer.step()
                monitor.step(piece)
            found.append([monitor.readings[name] for name in ("grad_norm", "input_condition")])
        flags = [m.require_forward_param_sync for m in outer.modules() if isinstance(m, DistributedDataParallel)]
        assert all(flags)
    return found


def frozen_part(rank: int) -> Any:
    """Only what does not train is sharded; and examples that interact across ranks, of a rank that is alone."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    fully_shard(model[0].requires_grad_(False), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.05)
    batch = part(batches("mlp", 12, 1)[0], 6 * rank, 6 * rank + 6)
    with Monitor(model, optimizer, cross_entropy, schedule=every(1), alerts=None) as monitor:
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        sharded = monitor.readings["noise_scale"]
    synced = nn.Sequential(nn.Linear(6, 3), nn.SyncBatchNorm(3)).double()
    optimizer = torch.optim.SGD(synced.parameters(), lr=0.05)
    with Monitor(synced, optimizer, cross_entropy, schedule=every(1), alerts=None, group=None) as monitor:
        for parameter in synced.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        monitor.step(batch)
        return sharded, monitor.readings["noise_scale"], monitor.readings["grad_norm"].value


def _everything(rank: int) -> Any:
    return {"parts": in_parts(rank), "frozen": frozen_part(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw."""
    return run_ranks(_everything, tmp_path_factory.mktemp("ranks"))


def test_a_model_of_which_a_part_is_wrapped_waits_for_nobody(ranks: list[Any]) -> None:
    for found in (found["parts"] for found in ranks):
        together, own, behind, plain = found
        assert [r.value for r in together] == pytest.approx([r.value for r in behind], rel=1e-9)
        assert [r.value for r in own] == pytest.approx([r.value for r in plain], rel=1e-9)
    assert repr(ranks[0]["parts"][0]) == repr(ranks[1]["parts"][0])


def test_what_is_sharded_or_interacts_without_being_measured_together(ranks: list[Any]) -> None:
    for sharded, synced, norm in (found["frozen"] for found in ranks):
        assert norm == pytest.approx(math.sqrt(6 * 3 + 3 + 3 + 3))
        assert math.isnan(sharded.value)
        assert math.isnan(synced.value)
        assert "SyncBatchNorm" in synced.reason


@pytest.mark.parametrize(
    ("numbers", "alike"),
    [
        ([1.0, 1.0 + 1e-9], True),
        ([1.0, 1.1], False),
        ([math.nan, 1.0], False),
        ([1.0, math.nan], False),
        ([math.inf, 1.0], False),
        ([math.nan, math.inf], True),
        ([0.0, 0.0], True),
    ],
)
def test_numbers_that_only_one_rank_has_differ(numbers: list[float], alike: bool) -> None:
    assert _alike(numbers) is alike
