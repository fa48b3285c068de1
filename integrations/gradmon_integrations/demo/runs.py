"""The two runs: what they train, and the monitor of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradmon._types import Batch
from gradmon.monitor import Monitor
from gradmon.sinks import Sink
from gradmon_integrations.display.history import History


@dataclass(frozen=True)
class Recipe:
    """How a run is trained.

    Attributes:
        name: The run's name.
        depth: How many hidden layers.
        width: How many units each of them has.
        gain: Their weights have the standard deviation gain / sqrt(inputs); 1 keeps the signal's size.
        learning_rate: That of plain SGD.
    """

    name: str
    depth: int
    width: int
    gain: float
    learning_rate: float

    def __str__(self) -> str:
        shape = f"{self.depth} hidden tanh layers of {self.width}"
        return f"{shape}, weights {self.gain:g} / sqrt(inputs), SGD at {self.learning_rate:g}"


RECIPES = (Recipe("healthy", 2, 64, 1.0, 0.02), Recipe("ill-conditioned", 20, 32, 4.0, 0.05))


@dataclass(frozen=True)
class Run:
    """A model in training, and what watches it.

    Attributes:
        name: Its name.
        model: The model.
        optimizer: Its optimizer.
        monitor: Its monitor.
        history: All that the monitor has said.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    monitor: Monitor
    history: History = field(default_factory=History)


def network(recipe: Recipe, seed: int) -> nn.Sequential:
    """The network of a recipe: (B, 64) to (B, 10)."""
    generator = torch.Generator().manual_seed(seed)

    def linear(inputs: int, outputs: int, gain: float, bias: bool) -> nn.Linear:
        # By way of the meta device: no draw from the global random state.
        layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
        nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs), generator=generator)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    widths = [64, *[recipe.width] * recipe.depth]
    hidden = [part for pair in pairwise(widths) for part in (linear(*pair, recipe.gain, False), nn.Tanh())]
    # A small output layer: both runs start at the loss of a guess, ln 10.
    return nn.Sequential(*hidden, linear(widths[-1], 10, 0.3, True))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def prepare(recipe: Recipe, *, seed: int, sinks: Sequence[Sink], **options: Any) -> Run:
    """A run at its start.

    Args:
        recipe: How it is trained.
        seed: The seed of its weights, and of its monitor.
        sinks: Where its readings go; they are closed with its monitor.
        options: What else `Monitor` is to know.

    Returns:
        The run.
    """
    model = network(recipe, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate)
    history = History()
    monitor = Monitor(model, optimizer, loss_of, run=recipe.name, seed=seed, sinks=[history, *sinks], **options)
    return Run(recipe.name, model, optimizer, monitor, history)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread for a while: layers this small gain nothing by a second, and lose by waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(runs: Sequence[Run], batches: Iterator[Batch], steps: int, done: Callable[[int], None]) -> None:
    """Train all runs together, one step of each on the same batch.

    Args:
        runs: The runs.
        batches: The batches.
        steps: How many steps.
        done: Called after each step with its number, from 1.
    """
    for step in range(1, steps + 1):
        batch = next(batches)
        for run in runs:
            run.optimizer.zero_grad()
            loss_of(run.model, batch).backward()
            run.optimizer.step()
            run.monitor.step(batch)
        done(step)


def looks(every: int, steps: int, first: int = 3) -> Callable[[int], bool]:
    """A schedule: the first few steps, where most goes wrong, every so many after them, and the last."""
    return lambda step: step <= first or step % every == 0 or step == steps
