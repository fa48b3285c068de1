"""Models that tempt what is kept, or the sums of squares, into numbers that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    ActivationPerturbation,
    Downstream,
    Estimator,
    GuessedGradient,
    SingularPower,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.guesser import Guesser

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


class Heads(nn.Module):
    """A layer that only the loss reads, or the next layer too: with the same calls."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between, self.through = between, False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        z = self.b(h)
        t = F.softmax(z, -1) if self.between else z
        y = self.c(t if self.through else h)
        return self.d(h) + t[:, :3] + y[:, :3]


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("guesser", [WeightTranspose(), SingularPower(2.0), Downstream(1)], ids=repr)
def test_a_head_that_the_next_layer_begins_to_read(guesser: Guesser, between: bool) -> None:
    torch.manual_seed(0)
    model, batch = Heads(between).double(), batch_of()
    estimator = Estimator(model, each, guesser)
    for through in (False, False, True, True, False):
        model.through = through
        found = estimator(batch, generator=seeded())
        wanted = estimate_gradient(model, each, batch, guesser, generator=seeded())
        for name, part in wanted.items():
            torch.testing.assert_close(found[name], part, rtol=1e-12, atol=1e-14)
