"""The verdict before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError
from gradmon._reading import Reading
from gradmon._types import Loss
from gradmon.preflight._coefficients import LIMIT
from gradmon.preflight.causes import Cause, causes_of, signs_of
from gradmon.preflight.look import Look, look
from gradmon.preflight.passes import check_budget
from gradmon.preflight.score import parts, probability
from gradmon.preflight.suggestion import LearningRates, suggestion

LEAST = 8
"""The passes without which there is hardly anything to say."""


@dataclass(frozen=True)
class Preflight:
    """What can be said before the first step.

    Attributes:
        risk: The probability that the run fails, calibrated on the development half of the zoo of docs/preflight.md;
            1 where the loss or the gradient is not finite or zero; None where something that it is made of is missing.
        causes: Why, the weightiest first; empty where nothing was found, which does not mean that all is well.
        parts: What each part adds to the log of the odds of a failure.
        learning_rates: The suggested learning rates. Take them where a cause asks for it: elsewhere they harm more runs
            than they help.
        initialisation: What to change about initialisation or architecture, in words; None for nothing.
        batch_size: What the noise of the gradient says about the batch size; None where it is not known.
        look: All that was measured; what is missing in it, and why.
        reason: Why there is no risk; None where there is one.
    """

    risk: float | None
    causes: tuple[Cause, ...]
    parts: Mapping[str, float]
    learning_rates: LearningRates
    initialisation: str | None
    batch_size: str | None
    look: Look
    reason: str | None = None

    @property
    def flagged(self) -> bool:
        """Whether the run will probably fail: the risk is above the limit that the development half of the zoo set."""
        return self.risk is not None and self.risk >= LIMIT

    @property
    def verdict(self) -> str:
        """One line."""
        if self.risk is None:
            return "The risk cannot be told"
        words = f"risk {100 * self.risk:.0f} %"
        if self.flagged:
            return f"This run will probably fail ({words})"
        if self.causes and self.risk < 0.5:
            return f"This run probably trains; look at what was found ({words})"
        if self.causes:
            return f"This run may fail ({words})"
        return f"Nothing found that would make this run fail ({words})"

    def risk_after(self, loss: float) -> float | None:
        """The risk once the loss after 20 steps is known.

        Args:
            loss: The loss on the same kind of examples after 20 steps; it may be infinite or NaN.

        Returns:
            The probability that the run fails; None where the risk or the loss at chance is not known.

        Raises:
            ArgumentError: `loss` is no number.
        """
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("loss", "be a number", type(loss).__name__)
        if self.risk is None or self.look.chance is None or not self.parts:
            return self.risk if self.risk == 1 else None
        progress = loss / self.look.chance.loss
        return probability(sum(parts(signs_of(self.look), progress=progress).values()))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain types that JSON holds; None for what is missing or not finite."""
        from gradmon.preflight.page import as_dict

        return as_dict(self)

    def to_readings(self, step: int | None = None) -> list[Reading]:
        """The numbers as readings, under names that begin with ``preflight_``; NaN with a reason for what is missing.

        Args:
            step: The step that they belong to.
        """
        from gradmon.preflight.page import as_readings

        return as_readings(self, step)

    def __str__(self) -> str:
        from gradmon.preflight.page import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from gradmon.preflight.page import as_html

        return as_html(self)


def preflight(model: nn.Module, optimizer: Optimizer, loss: Loss, batches: object, *, budget: int = 40) -> Preflight:
    """Say before the first step whether a run will train, why not, and what to change.

    It looks at the outputs and the gradient of a few batches, tries steps of the optimizer on copies, and measures what
    the loss is at chance. Model, gradients, buffers, modes, optimizer, random states, and the generators of a
    `DataLoader` and its samplers are afterwards as before.

    Args:
        model: The model, in the mode in which it trains.
        optimizer: Its optimizer.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batches: One batch (a tensor, tuple, mapping, dataclass, or list of tensors), or an iterable of batches such as
            a `DataLoader`; of several the first is what the step is taken on, and up to 64 examples of the next ones
            are what everything else is measured on. Only an iterator is moved on.
        budget: How many passes there may be, at least 8; one is one call of the loss.

    Returns:
        The verdict.

    Raises:
        ArgumentError: An argument is not what it must be, or the loss fails.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> batch = torch.randn(64, 4), torch.randint(3, (64,))
        >>> preflight(model, optimizer, loss, batch).causes[0].name
        'rate_too_high'
    """
    return judged(look(model, optimizer, loss, batches, check_budget(budget, LEAST)))


def judged(seen: Look) -> Preflight:
    """The verdict on what was measured."""
    causes = causes_of(seen)
    settled = any(math.isinf(cause.weight) for cause in causes)
    reason = None if settled else _unknown(seen)
    found = {} if settled else parts(signs_of(seen))
    risk = 1.0 if settled else probability(sum(found.values())) if reason is None else None
    structural = [cause for cause in causes if cause.name in ("vanishing", "exploding", "chaotic", "sharp")]
    return Preflight(
        risk=risk,
        causes=causes,
        parts=found,
        learning_rates=suggestion(seen.rates, seen.scan, seen.passes),
        initialisation=structural[0].remedy if structural else None,
        batch_size=_batch_size(seen),
        look=seen,
        reason=reason,
    )


def _unknown(seen: Look) -> str | None:
    """Why the risk cannot be told; None where it can."""
    if seen.begun:
        return (
            "the loss is well below that at chance: the network has learned something already, if only how frequent "
            "each class is, or the loss is of another kind; the risk is known for networks that start from nothing"
        )
    if seen.out_sd is None:
        return seen.reasons.get("out_sd", "the outputs were not found")
    if seen.offset is None:
        return seen.scan.reason or "the learning rate was not found"
    return None


def _batch_size(seen: Look) -> str | None:
    """What the noise says: not whether the run fails, but how good its gradients are."""
    noise, size = seen.noise_scale, seen.batch
    if noise is None:
        return None
    if math.isinf(noise):
        return f"{seen.probe} examples do not tell the gradient from its noise: a batch of {size} holds little of it"
    says = "more than enough" if noise < size / 10 else "mostly noise" if noise > 10 * size else "sensible"
    equal = f"{noise:.0f}" if noise >= 10 else f"{noise:.1f}"
    return f"a batch of {size} is {says} at the start: signal and noise are equal at about {equal} examples"
