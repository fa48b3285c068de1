"""Where nothing is curved, the average gradient is the base optimizer, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient import AverageGradient
from tests.integrations.workloads.average_models import assert_same, batch, closure_of, state_of

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Curved(nn.Module):
    """Linear, but for a function of a parameter of its own: slopes are taken, and change no other gradient's sign."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + 0 * torch.tanh(self.shift)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("iterations", [2, 3, 4, 5])
@pytest.mark.parametrize("curved", [False, True])
def test_a_linear_network_trains_as_with_the_base_optimizer(name: str, iterations: int, curved: bool) -> None:
    torch.manual_seed(0)
    plain: nn.Module = Curved() if curved else nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4))
    twin = copy.deepcopy(plain)
    data = tuple(part.float() for part in batch(8, 6, 4))
    data[0][:, 0] = 0  # weights without a gradient, which momentum and decay move even so
    base, inner = BASES[name](plain.parameters()), BASES[name](twin.parameters())
    optimizer = AverageGradient(inner, iterations=iterations)
    for _ in range(6):
        base.zero_grad()
        F.mse_loss(plain(data[0]), data[1]).backward()
        base.step()
        optimizer.step(closure_of(twin, (data[0], data[1])))
    assert_same(state_of(plain), state_of(twin))
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        for key, value in base.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(inner.state[b][key]))


def test_the_test_above_takes_slopes() -> None:
    torch.manual_seed(0)
    model, calls = Curved(), []
    data = tuple(part.float() for part in batch(8, 6, 4))

    def closure() -> torch.Tensor:
        calls.append(1)
        return F.mse_loss(model(data[0]), data[1])

    AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1), iterations=4).step(closure)
    assert len(calls) == 4


@pytest.mark.parametrize("name", BASES)
def test_the_base_optimizers_state_sees_the_ordinary_gradient_once(name: str) -> None:
    """On a curved network the weights part, so one step is compared, from the same weights."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    twin = copy.deepcopy(plain)
    data = tuple(part.float() for part in batch(8, 6, 4))
    base, inner = BASES[name](plain.parameters()), BASES[name](twin.parameters())
    F.mse_loss(plain(data[0]), data[1]).backward()
    base.step()
    AverageGradient(inner, iterations=3).step(closure_of(twin, (data[0], data[1])))
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        assert base.state[a].keys() == inner.state[b].keys()
        for key, value in base.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(inner.state[b][key]))


@pytest.mark.parametrize("autocast", [False, True])
def test_midpoints_of_half_precision_are_refused(autocast: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype), torch.randn(8, 5, dtype=dtype)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(x).float().square().mean()

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1), linear="midpoint")
    with pytest.raises(GradmonError, match=r"The Jacobians of linear need float32 or float64. Got torch.bfloat16"):
        optimizer.step(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
