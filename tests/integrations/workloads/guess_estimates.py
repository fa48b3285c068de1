"""Guessers, and what they are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    ActivationMixing,
    ActivationPerturbation,
    DirectionalDescent,
    SingularPower,
    WeightTranspose,
)
from gradmon_integrations.workloads.guessers.guesser import Guesser

Batch = tuple[Tensor, Tensor]
ONE_PASS: tuple[Guesser, ...] = (
    DirectionalDescent(), ActivationPerturbation(), ActivationPerturbation(masked=True), ActivationMixing(),
    WeightTranspose(), SingularPower(2.0),
)  # fmt: skip


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(examples: int = 5, *shape: int) -> Batch:
    return torch.randn(examples, *(shape or (4,)), dtype=torch.float64), torch.randint(3, (examples,))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], part) for name, part in wanted.items())
    assert all(bool(part.isfinite().all()) for part in wanted.values())


def sequential(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 6), *between, nn.Linear(6, 3))


class Shortcut(nn.Module):
    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.inside = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        z = self.b(F.silu(x))
        if self.inside:
            x += z  # what `silu` read is written to later
            return self.c(x)
        return self.c(F.relu(x + z) + z)


class Written(nn.Module):
    """The input of a layer is written to after its call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        z = self.b(x)
        x.add_(F.relu(z))
        return self.c(x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, 2, 1, groups=3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: sequential(nn.ReLU()), (4,)),
    "in place": (lambda: sequential(nn.ReLU(inplace=True)), (4,)),
    "tanh": (lambda: sequential(nn.Tanh()), (4,)),
    "elu in place": (lambda: sequential(nn.ELU(inplace=True)), (4,)),
    "linear": (sequential, (4,)),
    "dropout": (lambda: sequential(nn.ReLU(), nn.Dropout(0.3)), (4,)),
    "only dropout": (lambda: sequential(nn.Dropout(0.3)), (4,)),
    "norm": (lambda: sequential(nn.LayerNorm(6, elementwise_affine=False), nn.ReLU()), (4,)),
    "sigmoid last": (lambda: nn.Sequential(sequential(nn.ReLU()), nn.Sigmoid()), (4,)),
    "shortcut": (Shortcut, (4,)),
    "shortcut in place": (lambda: Shortcut(True), (4,)),
    "written": (Written, (4,)),
    "images": (Images, (1, 6, 6)),
}  # fmt: skip
