"""The learning rate at which one step changes half of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.optim import Optimizer

from gradmon._errors import ArgumentError, Unavailable
from gradmon._objective import Gradient, Objective
from gradmon._tensors import length, ran_out, wide
from gradmon._types import Batch
from gradmon.preflight.rates import Rates, with_rates
from gradmon.probes.step import trial_step

HALF = 0.5
"""The relative change of the gradient that is looked for."""
_STEP = math.sqrt(10)
_FLAT = 1e-6
"""So small differences are none."""
_FAR = 8
"""How many factors of sqrt(10) it is looked for from the default learning rate, either way."""


@dataclass(frozen=True)
class Point:
    """One trial step.

    Attributes:
        rate: The main group's learning rate.
        change: ``||h(w + omega) - h(w)|| / ||h(w)||`` on the probe; infinite where it is not finite.
    """

    rate: float
    change: float


@dataclass(frozen=True)
class Scan:
    """What trial steps at several learning rates do to the gradient.

    Attributes:
        points: The trial steps, by learning rate.
        half: The main group's learning rate at which half of the gradient changes; None where it was not found.
        bound: ``"below"`` where it lies below `half`, ``"above"`` where it lies above; None where it is `half`.
        reason: Why there is none.
    """

    points: tuple[Point, ...] = ()
    half: float | None = None
    bound: str | None = None
    reason: str | None = None


def scan(
    objective: Objective,
    optimizer: Optimizer,
    rates: Rates,
    probe: Gradient,
    training: Batch | None,
) -> Scan:
    """Walk from the default learning rate, in factors of sqrt(10), to where a step changes half of the gradient.

    The step is one of the real optimizer, on copies, with the gradient of the training batch; the gradient that it
    changes is that of the probe. Between the last two rates the logarithm of the change is taken to be linear in that
    of the rate. At most 10 passes.

    Args:
        objective: The objective on the probe, inside its sandbox.
        optimizer: The optimizer.
        rates: Its learning rates.
        probe: The gradient on the probe.
        training: The batch that the step is taken on; None for the probe.

    Returns:
        What was found; without a number, and with a reason, where there is none.
    """
    if rates.reason is not None:
        return Scan(reason=rates.reason)
    size = _length(probe.parts)
    if size == 0:
        return Scan(reason="zero gradient")
    if not math.isfinite(size):
        return Scan(reason="non-finite gradient")
    points: dict[int, Point] = {}
    try:
        gradient = probe if training is None else objective.gradient(batch=training)
        step = [None if place in gradient.unused else part for place, part in enumerate(gradient.parts)]
        if not math.isfinite(_length(gradient.parts)):
            return Scan(reason="non-finite gradient on the training batch")

        def change(place: int) -> float:
            rate = rates.default * _STEP**place
            after = trial_step(
                with_rates(optimizer, rates.at(rate)), objective.weights.parameters, objective.base, step
            )
            points[place] = Point(rate, _change(objective, after, probe.parts, size))
            return points[place].change

        place = 0
        upwards = change(place) < HALF
        while abs(place) < _FAR:
            place += 1 if upwards else -1
            if (change(place) < HALF) != upwards:
                break
    except Unavailable as missing:
        return Scan(_sorted(points), reason=missing.reason)
    changes = [point.change for point in points.values()]
    if len(changes) > 2 and 0 < max(changes) < math.inf and min(changes) > (1 - _FLAT) * max(changes):
        return Scan(
            _sorted(points), reason=f"the next step of {type(optimizer).__name__} is as long at any learning rate"
        )
    return _found(_sorted(points), upwards)


def _found(points: tuple[Point, ...], upwards: bool) -> Scan:
    """The rate between the two points on either side of a half; the last point where all lie on one."""
    for low, high in pairwise(points):
        if low.change < HALF <= high.change:
            if low.change <= 0 or not math.isfinite(high.change):
                return Scan(points, math.sqrt(low.rate * high.rate))
            part = math.log(HALF / low.change) / math.log(high.change / low.change)
            return Scan(points, low.rate * (high.rate / low.rate) ** part)
    return Scan(points, points[-1].rate, "above") if upwards else Scan(points, points[0].rate, "below")


def _sorted(points: dict[int, Point]) -> tuple[Point, ...]:
    return tuple(points[place] for place in sorted(points))


def _change(objective: Objective, after: Sequence[Tensor], probe: Sequence[Tensor], size: float) -> float:
    try:
        moved = objective.gradient(after).parts
    except (Unavailable, ArgumentError):
        raise
    except Exception as error:
        if ran_out(error):
            raise
        return math.inf  # a model that refuses what is not finite
    change = math.sqrt(sum(length(wide(a) - wide(b)) ** 2 for a, b in zip(moved, probe, strict=True))) / size
    return change if math.isfinite(change) else math.inf


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(length(part) ** 2 for part in parts))
