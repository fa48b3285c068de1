"""Models and batches for ranks that train together, awkward on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


class Tied(nn.Module):
    """An embedding whose table is also the last layer, a layer norm, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.table(ids)).tanh()).mean(1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "conv": _conv, "tied": Tied}


def make(name: str) -> nn.Module:
    """A model in float64, the same on all ranks."""
    torch.manual_seed(3)
    return MODELS[name]().double()


def batches(name: str, examples: int, count: int) -> list[Batch]:
    """Whole batches, the same on all ranks."""
    generator = torch.Generator().manual_seed(5)
    if name == "tied":
        return [
            (torch.randint(11, (examples, 5), generator=generator), torch.randint(11, (examples,), generator=generator))
            for _ in range(count)
        ]
    return [
        (
            torch.randn(examples, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def part(batch: Batch, start: int, end: int) -> Batch:
    """Some of the examples."""
    return batch[0][start:end], batch[1][start:end]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The mean over the examples."""
    return functional.cross_entropy(model(batch[0]), batch[1])
