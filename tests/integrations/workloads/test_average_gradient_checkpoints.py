"""The average gradient where parts of the model are computed anew in each backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradmon_integrations.workloads.average_gradient import AverageGradient
from tests.integrations.workloads.average_models import batch


def trained(function: Callable[[Tensor], Tensor], checkpointed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients after some steps."""
    torch.manual_seed(0)
    first, inner, last = nn.Linear(5, 9).double(), nn.Linear(9, 9).double(), nn.Linear(9, 3).double()
    parameters = [*first.parameters(), *inner.parameters(), *last.parameters()]
    inputs, targets = batch(8, 5, 3)

    def part(x: Tensor) -> Tensor:
        return function(inner(function(first(x))))

    def loss() -> Tensor:
        h: Any = checkpoint(part, inputs, use_reentrant=False) if checkpointed else part(inputs)
        return F.mse_loss(last(h), targets)

    optimizer = AverageGradient(torch.optim.SGD(parameters, lr=0.3), iterations=3)
    for _ in range(3):
        optimizer.step(loss)
    return [p.detach() for p in parameters], [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize(
    "function",
    [
        *(torch.tanh, F.softsign, F.tanhshrink, F.logsigmoid),
        *(nn.ELU(inplace=True), nn.SELU(inplace=True), F.elu_, torch.celu_, nn.SiLU(inplace=True), torch.sigmoid_),
    ],
)
def test_a_checkpoint_changes_nothing(function: Callable[[Tensor], Tensor]) -> None:
    for plain, checkpointed in zip(trained(function, False), trained(function, True), strict=True):
        assert all(map(torch.equal, plain, checkpointed))


@pytest.mark.parametrize(
    "function", [nn.ELU(inplace=True), F.elu_, torch.selu_, nn.CELU(0.5, inplace=True), torch.tanh_]
)
def test_one_iteration_is_the_base_bit_by_bit_in_place_too(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(5, 64), torch.randn(32, 5)

    def loss() -> Tensor:
        return function(layer(inputs)).square().mean()

    loss().backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    AverageGradient(torch.optim.SGD(layer.parameters(), lr=0.1), iterations=1).step(loss)
    found = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, expected))
