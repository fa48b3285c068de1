"""Models that tempt what is kept, or the sums of squares, into numbers that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    ActivationPerturbation,
    Estimator,
    GuessedGradient,
)

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(*shape: int) -> Batch:
    return torch.randn(5, *(shape or (4,)), dtype=torch.float64), torch.randint(3, (5,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Buffered(nn.Module):
    """With buffers, and with a tensor that is none: neither is a function that the model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)
        self.mask = torch.ones(6, dtype=torch.float64)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.b(F.relu(self.norm(self.a(x))) * self.mask)


@pytest.mark.parametrize("stepping", [False, True])
def test_what_is_put_back_is_no_function_of_the_model(stepping: bool) -> None:
    torch.manual_seed(0)
    model, batch = Buffered().double().eval(), batch_of()
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), ActivationPerturbation(), model)
    passes: list[int] = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        passes[-1] += 1
        return each(model, batch)

    estimator = Estimator(model, counted, ActivationPerturbation())
    for _ in range(3):
        passes.append(0)
        if stepping:
            optimizer.step(lambda: counted(model, batch))
        else:
            estimator(batch)
    assert passes[0] > 1
    assert passes[1:] == [1, 1]
