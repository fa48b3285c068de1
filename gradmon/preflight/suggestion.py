"""The learning-rate scan as a function of its own: a curve, and one suggestion for each parameter group."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import GradmonError, Unavailable
from gradmon._objective import Objective
from gradmon._parameters import Weights, check_trains
from gradmon._types import Loss
from gradmon.preflight.causes import BEYOND
from gradmon.preflight.examples import take
from gradmon.preflight.look import first_gradient
from gradmon.preflight.passes import Passes, check_budget
from gradmon.preflight.rates import Rates, rates_of
from gradmon.preflight.scan import HALF, Scan, scan

LEAST_SCAN = 3
"""The passes without which nothing can be said: the gradient, the step's, and the gradient after it."""


TOO_SHORT = 0.01
"""A learning rate of so little of the default, at which half of the gradient changes, hardly ever trains."""


@dataclass(frozen=True)
class LearningRates:
    """What the scan found.

    Attributes:
        groups: The suggested learning rate of each parameter group, in their present proportions; None where there is
            none. For a schedule that is known by its peak, the suggested peak.
        now: The learning rates of the groups: the peak of a schedule where one is known.
        scan: The trial steps.
        default: The default learning rate of the main group, the one with the most weights.
        main: The place of the main group.
        gain: How many times as long a step becomes when many of them point the same way, as with momentum.
        passes: How many passes it took.
        reason: Why there is no suggestion.
    """

    groups: tuple[float, ...] | None
    now: tuple[float, ...]
    scan: Scan
    default: float
    main: int
    gain: float
    passes: int
    reason: str | None = None

    @property
    def half(self) -> float | None:
        """The main group's learning rate at which steps change half of the gradient, once their gain has set in."""
        return None if self.scan.half is None else self.scan.half / self.gain

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return {
            "groups": None if self.groups is None else list(self.groups),
            "now": list(self.now),
            "half": self.half,
            "bound": self.scan.bound,
            "default": _finite(self.default),
            "gain": self.gain,
            "points": [[point.rate, _finite(point.change)] for point in self.scan.points],
            "passes": self.passes,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        if self.groups is None or self.half is None:
            return f"No learning rate to suggest: {self.reason}."
        where = {None: "at", "below": "below", "above": "above"}[self.scan.bound]
        pairs = [f"{now:.3g} -> {rate:.2g}" for now, rate in zip(self.now, self.groups, strict=True)]
        lines = [
            f"Learning rate: {', '.join(pairs)}{BEYOND[self.scan.bound]}",
            f"  half of the gradient changes {where} {self.half:.3g}; by default it is {self.default:.3g};",
            f"  the suggestion is their geometric mean. {self.passes} passes.",
        ]
        if self.half < TOO_SHORT * self.default:
            lines.append("  So short steps lead nowhere: initialise anew; if they stay that short,")
            lines.append("  add residual connections and normalisation.")
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw the change of the gradient against the learning rate. Needs matplotlib.

        Args:
            axes: Where to draw; None for new axes.

        Returns:
            The axes.

        Raises:
            GradmonError: matplotlib is missing.
        """
        if axes is None:
            try:
                pyplot: Any = importlib.import_module("matplotlib.pyplot")
            except ImportError as error:
                message = f'The plot needs matplotlib ({error}). To install it: pip install "gradmon[figures]"'
                raise GradmonError(message) from error
            axes = pyplot.subplots()[1]
        points = [point for point in self.scan.points if math.isfinite(point.change) and point.change > 0]
        axes.plot([point.rate / self.gain for point in points], [point.change for point in points], "o-")
        axes.axhline(HALF, linestyle=":", color="grey")
        if self.groups is not None:
            axes.axvline(self.groups[self.main], color="C2", label=f"suggested: {self.groups[self.main]:.2g}")
        axes.axvline(self.now[self.main], color="C1", linestyle="--", label=f"now: {self.now[self.main]:.2g}")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="change of the gradient in one step")
        axes.legend()
        return axes


def suggestion(rates: Rates, found: Scan, passes: int) -> LearningRates:
    """The suggestion ``lr* = sqrt(lr_half lr_default)`` for each group, from a scan."""
    best, groups = None, None
    if found.half is not None:
        best = math.sqrt(found.half / rates.gain * rates.default)
        groups = rates.at(best)
    reason = found.reason if best is None else None
    return LearningRates(groups, rates.groups, found, rates.default, rates.main, rates.gain, passes, reason)


def suggest_lr(
    model: nn.Module, optimizer: Optimizer, loss: Loss, batches: object, *, budget: int = 12
) -> LearningRates:
    """Suggest a learning rate, from how much of the gradient one step changes.

    Tried are steps of the real optimizer, on copies. Between its default learning rate and the one at which a step
    changes half of the gradient lies the suggestion, their geometric mean. The groups' learning rates keep their
    proportions; where a schedule has noted its start or its peak in the groups, that is what is suggested. Nothing of
    the model, the optimizer, loaders or random states changes.

    Args:
        model: The model, in the mode in which it trains.
        optimizer: Its optimizer.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batches: One batch (a tensor, tuple, mapping, dataclass, or list of tensors), or an iterable of batches; of
            several the first is what the step is taken on, and the next ones are where the gradient is looked at.
        budget: How many passes there may be, at least 3; one is one call of the loss.

    Returns:
        The suggestion, the curve, and what they were made of.

    Raises:
        ArgumentError: An argument is not what it must be, or the loss fails.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> batch = torch.randn(64, 3), torch.randint(2, (64,))
        >>> suggest_lr(model, optimizer, loss, batch).groups[0] < 10
        True
    """
    check_budget(budget, LEAST_SCAN)
    passes = Passes(budget)
    weights = Weights(model)
    rates = rates_of(optimizer, weights.parameters)
    check_trains(optimizer, weights.parameters)
    counted = passes.counted(loss)
    taken = take(batches, weights.device)
    with Objective(model, counted, taken.probe, weights) as objective:
        gradient = first_gradient(objective)
        try:
            training = None if taken.training is taken.probe else taken.training
            found = scan(objective, optimizer, rates, gradient, training)
        except Unavailable as missing:
            found = Scan(reason=missing.reason)
    return suggestion(rates, found, passes.taken)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
