"""The networks and batches that the guessers are tried on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from _digits import digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import GuessedGradient
from gradmon_integrations.workloads.guessers.guesser import Guesser

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp(depth: int, width: int, inner: int = 64) -> nn.Module:
    """`depth` linear layers with ReLU in between."""
    sizes = [inner, *[width] * (depth - 1), 10]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def data() -> Batch:
    """The digits as rows, with mean 0 and variance 1 over all pixels."""
    images, labels = digits()
    rows = images.flatten(1)
    return (rows - rows.mean()) / rows.std(), labels


def draw(whole: Batch, count: int, generator: torch.Generator) -> Batch:
    """Some examples, with replacement."""
    chosen = torch.randint(len(whole[1]), (count,), generator=generator)
    return whole[0][chosen], whole[1][chosen]


def train(
    model: nn.Module,
    guesser: Guesser | None,
    steps: int,
    rate: float,
    seed: int,
    look: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """AdamW on batches of 256 by guesses, or by backpropagation; the accuracy on all digits every 100 steps."""
    look(0)
    whole, generator = data(), torch.Generator().manual_seed(seed)
    base = torch.optim.AdamW(model.parameters(), lr=rate)
    guesses = torch.Generator().manual_seed(seed)
    optimizer = None if guesser is None else GuessedGradient(base, guesser, model, generator=guesses)
    reached: list[float] = []
    for step in range(1, steps + 1):
        batch = draw(whole, 256, generator)
        if optimizer is None:
            base.zero_grad()
            each(model, batch).mean().backward()
            base.step()
        else:
            optimizer.step(lambda batch=batch: each(model, batch))
        look(step)
        if step % 100 == 0:
            reached.append(accuracy(model, whole))
    return reached


def accuracy(model: nn.Module, whole: Batch) -> float:
    """The share of all examples that is told right."""
    with torch.no_grad():
        return float((model(whole[0]).argmax(1) == whole[1]).float().mean())


def true(model: nn.Module, batch: Batch) -> object:
    """Forward and backward."""
    return torch.autograd.grad(each(model, batch).mean(), list(model.parameters()))
