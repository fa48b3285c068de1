"""What modules hold in ways of their own is as it was after a probe."""

import copy
import io
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from tests.core.monitored import data, mse
from tests.core.traces import ACTIONS, Body, regression


class Counting(nn.Module):
    """A buffer that is overwritten, one that is another one each time, and a number."""

    calls: int

    def __init__(self):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(3), 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean * 0.9 + x.mean(0)
        return self.norm(x) + self.mean


def scripted():
    return torch.jit.script(Counting())


def loaded():
    file = io.BytesIO()
    torch.jit.save(scripted(), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, loaded, lambda: nn.Sequential(scripted())])
def test_torchscript_keeps_its_state(make):
    part = make()
    model, batch = nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 2)), regression()
    before = copy.deepcopy(model.state_dict())
    ACTIONS["measure"](model, mse, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert getattr(part, "calls", 0) == 0


KINDS = {
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda held: held.mul_(2)),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), lambda held: held.values().mul_(2)),
    "bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), lambda held: held.values().mul_(2)),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda held: held.mul_(2),
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", KINDS)
def test_buffer_that_is_not_strided(kind):
    make, change = KINDS[kind]
    buffer = make()

    def act(model, x):
        change(model.buffer)

    model, batch = Body(act, buffer=buffer), regression()
    before = [part.clone() for part in parts(buffer)]
    found = gradmon.measure(model, mse, batch, metrics=["grad_norm", "weight_condition"])
    assert found["weight_condition"].value > 0
    assert model.buffer is buffer
    assert all(map(torch.equal, parts(buffer), before))


def parts(buffer):
    return list(buffer.unbind()) if buffer.is_nested else [buffer.to_dense()]


class State(NamedTuple):
    """What a module keeps in a tuple of its own kind."""

    total: torch.Tensor
    calls: list[int]


def test_named_tuple_of_a_module():
    def act(model, x):
        model.state.total.add_(1)
        model.state.calls.append(1)

    model, batch = Body(act, state=State(torch.zeros(1), [])), regression()
    gradmon.measure(model, mse, batch, metrics=["grad_norm", "weight_condition"])
    assert model.state == State(torch.zeros(1), [])


class FakeQuantised(nn.Module):
    """Rounds its weight, and adapts the range in which it does so, in every pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(-float("inf")))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int32))

    def forward(self, x):
        on, held = torch.ones(1, dtype=torch.int64), (self.low, self.high, self.scale, self.zero)
        return F.linear(x, torch.fused_moving_avg_obs_fake_quant(self.weight, on, on, *held, 0.1, 0, 255, 0))


@pytest.mark.parametrize("loss", [None, mse])
def test_call_on_a_weight_that_overwrites_buffers(loss):
    trained = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = FakeQuantised()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = gradmon.Monitor(model, optimizer, loss, schedule=gradmon.every(1)) if monitored else None
        for batch in data(4, torch.float32):
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(batch)
        if monitor is not None:
            assert math.isfinite(monitor.readings["gradient_rank"].value)
            monitor.close()
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
