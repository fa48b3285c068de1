"""Base and average gradient, from the same weights and on the same batches, with or without a monitor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gradmon.monitor import Monitor
from gradmon_integrations.workloads.average_gradient.optimizer import AverageGradient
from gradmon_integrations.workloads.data import Data
from gradmon_integrations.workloads.models import INITS, MODELS
from gradmon_integrations.workloads.train import Batch, batches, centred


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        model: One of `MODELS`.
        depth: Its hidden layers; None for the model's own number.
        width: Their units; likewise.
        init: One of `INITS`.
        lr: The learning rate of RMSprop.
        batch_size: The examples of a batch.
        epochs: How many epochs.
        iterations: Those of the average gradient; 1 is RMSprop alone.
        measure: Whether to measure RD.
    """

    model: str = "A"
    depth: int | None = None
    width: int | None = None
    init: str = "glorot"
    lr: float = 7.5e-4
    batch_size: int = 128
    epochs: int = 10
    iterations: int = 2
    measure: bool = False


@dataclass
class Run:
    """A network in training.

    Attributes:
        model: The network.
        optimizer: An `AverageGradient` around RMSprop, also for 1 iteration.
        losses: The loss of each batch before its step.
        monitor: What watches it, if something does.
    """

    model: nn.Module
    optimizer: AverageGradient
    losses: list[float] = field(default_factory=list)
    monitor: Monitor | None = None

    def step(self, batch: Batch) -> None:
        """Train on a batch, and let the monitor look."""
        self.losses.append(float(self.optimizer.step(lambda: loss_of(self.model, batch))))
        if self.monitor is not None:
            self.monitor.step(batch)

    def last_loss(self, steps: int) -> float:
        """The mean loss of the last steps; infinite where one was not finite."""
        mean = sum(self.losses[-steps:]) / max(1, len(self.losses[-steps:]))
        return mean if math.isfinite(mean) else math.inf


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of a batch."""
    return cross_entropy(model(batch[0]), batch[1])


def prepare(recipe: Recipe, data: Data, seed: int) -> Run:
    """A run at its start: equal seeds have equal weights, whatever the optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[recipe.model](data, recipe.depth, recipe.width)
        INITS[recipe.init](model)
    base: Optimizer = torch.optim.RMSprop(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=recipe.lr, foreach=True
    )
    return Run(model, AverageGradient(base, iterations=recipe.iterations, measure=recipe.measure))


def stream(recipe: Recipe, data: Data, seed: int) -> Iterator[Batch]:
    """The batches of a run, of all examples, centred; equal seeds have equal batches."""
    return batches(centred(data.inputs), data.targets, recipe.batch_size, recipe.epochs, seed)


def trained(recipe: Recipe, data: Data, seed: int, done: Callable[[Run], None] = lambda run: None) -> Run:
    """A run at its end.

    Args:
        recipe: How it is trained.
        data: On what.
        seed: The seed of its weights and batches.
        done: Called after each step.
    """
    run = prepare(recipe, data, seed)
    for batch in stream(recipe, data, seed):
        run.step(batch)
        done(run)
    return run


def mean_and_sem(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some numbers, and its standard error; NaN for the latter where there is only one."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
