"""Runs that train by guesses beside one that trains by backpropagation, watched alike."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Monitor, Reading, every
from gradmon._errors import ArgumentError, Unavailable
from gradmon._types import Loss
from gradmon.sinks import Sink
from gradmon_integrations.workloads.data import Data
from gradmon_integrations.workloads.guessers.bias import last_layer
from gradmon_integrations.workloads.guessers.comparing import (
    STEP_COSINE,
    cosines,
    one_step_effectiveness,
    true_gradient,
)
from gradmon_integrations.workloads.guessers.estimate import estimate_gradient
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.mixer import LocalMixer, local_losses
from gradmon_integrations.workloads.guessers.optimizer import GuessedGradient
from gradmon_integrations.workloads.guessers.structure import effective_ranks

Batch = tuple[Tensor, Tensor]
METRICS = ("loss", "grad_norm", "step_ratio", "noise_scale", "gradient_coherence", STEP_COSINE)
"""What the monitor looks at, of the true gradient."""


class Residual(nn.Module):
    """``relu(x + conv(relu(norm(conv(x)))))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same."""
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


def _mlp(depth: int, width: int) -> Callable[[Data], nn.Module]:
    def make(data: Data) -> nn.Module:
        sizes = [math.prod(data.train_inputs.shape[1:]), *[width] * (depth - 1), data.classes]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

    return make


def _convolutional(data: Data) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(data.train_inputs.shape[1], 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, data.classes),
    )


def _residual(data: Data) -> nn.Module:
    stem = nn.Conv2d(data.train_inputs.shape[1], 16, 3, 2, 1)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, Residual(16), Residual(16), pooled, nn.Linear(16, data.classes))


def _mixer(data: Data) -> nn.Module:
    return LocalMixer(tuple(data.train_inputs.shape[1:]), data.classes)


MODELS: dict[str, Callable[[Data], nn.Module]] = {
    "mlp-3x128": _mlp(3, 128),
    "mlp-6x128": _mlp(6, 128),
    "mlp-6x256": _mlp(6, 256),
    "conv": _convolutional,
    "residual": _residual,
    "local-mixer": _mixer,
}
"""By name: the network for some data; "mlp-DxW" has D linear layers, W wide, with ReLU in between."""


def each(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example, (B,)."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Plan:
    """How a run is trained.

    Attributes:
        model: A name in `MODELS`.
        steps: How many steps.
        rate: AdamW's learning rate.
        batch_size: Examples of a batch, drawn with replacement.
        look: Look every so many steps.
        exact_last: Whether the last layer gets its true gradient.
        per_layer: Whether every layer gets a pass of its own.
        guesses: How many guesses are averaged.
    """

    model: str = "mlp-3x128"
    steps: int = 300
    rate: float = 1e-3
    batch_size: int = 128
    look: int = 50
    exact_last: bool = False
    per_layer: bool = False
    guesses: int = 1


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        accuracy: On the test examples, in [0, 1].
        loss: The mean loss of the last 20 batches.
        cosines: Of a fresh guess to the true gradient, at each look; without the last layer where that is exact.
        effectiveness: One step along a fresh guess against one along the gradient, at each look.
    """

    accuracy: float = math.nan
    loss: float = math.nan
    cosines: list[float] = field(default_factory=list)
    effectiveness: list[float] = field(default_factory=list)


def train(
    data: Data,
    plan: Plan,
    guesser: Guesser | None,
    seed: int,
    watching: Sequence[Sink] = (),
    telling: Sequence[Sink] = (),
    run: str = "run",
) -> Outcome:
    """Train one network.

    Args:
        data: The data.
        plan: How.
        guesser: What to guess; None for backpropagation.
        seed: Of weights, batches and guesses.
        watching: Where the monitor's readings go.
        telling: Where the readings about guesses go: `guess_cosine`, `guess_effectiveness`, `effective_rank`.
        run: The run's name.

    Raises:
        ArgumentError: There is no such model.
    """
    if plan.model not in MODELS:
        raise ArgumentError("model", f"be one of {', '.join(MODELS)}", repr(plan.model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[plan.model](data)
    loss: Loss = local_losses if isinstance(model, LocalMixer) else each
    base = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    drawing, guessing, trying = (torch.Generator().manual_seed(seed + 1000 * offset) for offset in range(3))
    middle, spread = data.train_inputs.mean(), data.train_inputs.std()
    optimizer: torch.optim.Optimizer = base
    if guesser is not None:
        optimizer = GuessedGradient(
            base,
            guesser,
            model,
            guesses=plan.guesses,
            per_layer=plan.per_layer,
            exact_last=plan.exact_last,
            generator=guessing,
        )
    outcome, losses = Outcome(), list[float]()
    with ExitStack() as stack:
        monitor = stack.enter_context(
            Monitor(
                model, optimizer, loss, metrics=METRICS, schedule=every(plan.look), alerts=(), run=run, sinks=watching
            )
        )
        for step in range(1, plan.steps + 1):
            chosen = torch.randint(len(data.train_targets), (plan.batch_size,), generator=drawing)
            batch = (data.train_inputs[chosen] - middle) / spread, data.train_targets[chosen]
            if guesser is not None and step % plan.look == 0:
                readings = look(model, loss, batch, guesser, plan, trying, step, outcome)
                for sink in telling:
                    sink.write(readings)
            if isinstance(optimizer, GuessedGradient):
                value = optimizer.step(lambda batch=batch: loss(model, batch))
            else:
                optimizer.zero_grad()
                value = loss(model, batch).mean()
                value.backward()
                optimizer.step()
            losses.append(float(value.detach()))
            monitor.step(batch)
    outcome.loss = statistics.mean(losses[-20:])
    outcome.accuracy = accuracy(model, (data.test_inputs - middle) / spread, data.test_targets)
    return outcome


def look(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    guesser: Guesser,
    plan: Plan,
    generator: torch.Generator,
    step: int,
    outcome: Outcome,
) -> list[Reading]:
    """A fresh guess compared with the true gradient, as readings; the numbers go to the outcome too."""
    truth = true_gradient(model, loss, batch)
    estimate = estimate_gradient(
        model,
        loss,
        batch,
        guesser,
        guesses=plan.guesses,
        per_layer=plan.per_layer,
        exact_last=plan.exact_last,
        generator=generator,
    )
    found = cosines(estimate, truth, last_layer(model, loss, batch) if plan.exact_last else None)
    cosine = found.without_last if plan.exact_last else found.whole  # what is exact is no guess
    try:
        gain, reason = one_step_effectiveness(model, loss, batch, estimate, truth), None
    except Unavailable as error:
        gain, reason = math.nan, error.reason
    outcome.cosines.append(cosine)
    outcome.effectiveness.append(gain)
    none = "zero gradient or guess"
    readings = [
        Reading("guess_cosine", cosine, step, reason=none if math.isnan(cosine) else None),
        Reading("guess_effectiveness", gain, step, reason=reason),
    ]
    for layer, value in found.layers.items():
        readings.append(Reading("guess_cosine", value, step, layer, reason=none if math.isnan(value) else None))
    for name, rank in effective_ranks(model).items():
        layer = name.rpartition(".")[0] or name
        readings.append(Reading("effective_rank", rank, step, layer, reason="zero" if math.isnan(rank) else None))
    return readings


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The share of the examples that is told right, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            right = [
                model(part).argmax(1) == labels
                for part, labels in zip(inputs.split(1024), targets.split(1024), strict=True)
            ]
    finally:
        model.train(training)
    return float(torch.cat(right).float().mean())
