"""The loss of a model that knows nothing: measured, by giving its output the same value for all examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._objective import Objective
from gradmon._tensors import length
from gradmon.preflight.calls import Calls, Replacement
from gradmon.preflight.passes import Passes

_SAME = 1e-3
"""How close, relative to it, a measured loss is to the one that it is taken for."""
_ROUNDS = 3
_BRACKETS = 12
_STRETCHES = 6
_NEAR = 0.02
"""By how much of it the loss of the best constant output may be missed."""
_FAR = 100.0
"""An output at which a class has no probability left."""


@dataclass(frozen=True)
class Chance:
    """What the loss is at chance, and the natural unit of the outputs.

    Attributes:
        loss: The loss at chance, on the probe.
        kind: ``classification`` where an output of zeros costs what a guess among all classes does, ``binary`` where it
            costs what a coin does, ``other`` for the best output that is the same for all examples.
        classes: How many classes there are; None where there are none.
        scale: The unit of the outputs: 1 for logits; otherwise how far the best constant output must move until the
            loss at chance has doubled, which for a square loss is the targets' standard deviation. None where it was
            not found.
        head: Whether the last linear map or convolution makes the outputs.
    """

    loss: float
    kind: Literal["classification", "binary", "other"]
    classes: int | None
    scale: float | None
    head: bool


def find_chance(objective: Objective, passes: Passes, seen: Calls, examples: int) -> Chance:
    """Find it: one pass for classification, about ten for a square loss, up to some twenty elsewhere.

    Args:
        objective: The objective on the probe, inside its sandbox.
        passes: Counts them.
        seen: The calls of a forward pass on the probe.
        examples: The number of examples in the probe.

    Raises:
        Unavailable: The loss depends on more than the output, or is not finite there.
    """
    reason = "neither a last layer nor an output of the model was found"
    for head, replacement in _places(seen):
        search = _Search(objective, passes, replacement)
        start = search.at(replacement.value)
        if not math.isfinite(start.loss):
            reason = "the loss of an output of zeros is not finite"
            continue
        output = seen.last.output if head and seen.last is not None else seen.output
        assert output is not None
        classes = _classes(start, output, examples)
        if classes is not None:
            return Chance(start.loss, "classification", classes, 1.0, head)
        ones = search.at(torch.ones_like(start.value))
        if search.alone and _shifted(start, ones):
            if start.loss <= 0:
                raise Unavailable("the loss of an output of zeros is not positive")
            if _repelled(start, search):
                raise Unavailable(
                    "examples count against their classes, as in a policy gradient: a guess is no yardstick"
                )
            return Chance(start.loss, "classification", start.value.numel(), 1.0, head)
        if _coin(start, ones, 1.0) and _coin(start, search.at(2 * ones.value), 2.0):
            return Chance(start.loss, "binary", 2, 1.0, head)
        best = search.best(start) if search.alone else start
        if best is None:
            raise Unavailable("the loss of the best constant output was not found")
        scale = search.unit(best) if search.alone and best.loss > 0 else None
        if not search.alone:
            reason = "the loss depends on more than what the last layer makes"
        elif best.loss <= 0:
            raise Unavailable("the loss of the best constant output is not positive")
        else:
            return Chance(best.loss, "other", None, scale, head)
    raise Unavailable(reason)


def _places(seen: Calls) -> list[tuple[bool, Replacement]]:
    """Where the output may be: at the last call, or what the model returns."""
    found: list[tuple[bool, Replacement]] = []
    call = seen.last
    if call is not None:
        named = isinstance(call.weight, torch.nn.Parameter)
        units = call.output.shape[call.channels]
        value = torch.zeros(units, dtype=call.output.dtype, device=call.output.device)
        place = Replacement(call.weight if named else None, None if named else call.number, value, call.channels)
        found.append((True, place))
    output = seen.output
    if output is not None and output.is_floating_point() and output.ndim > 0:
        channels = 1 if output.ndim > 3 else output.ndim - 1
        units = output.shape[channels] if output.ndim > 1 else 1  # one number for each example has no units
        value = torch.zeros(units, dtype=output.dtype, device=output.device)
        found.append((False, Replacement(None, None, value, channels)))
    return found


@dataclass(frozen=True)
class _Seen:
    value: Tensor
    loss: float
    slope: Tensor
    rounding: float

    @property
    def same(self) -> float:
        """How close a loss is to the one that it is taken for."""
        return max(_SAME, self.rounding)

    @property
    def level(self) -> bool:
        """Whether the loss stays, as far as the slope tells, when the same is added to all units."""
        steep = float(self.slope.abs().sum())
        return abs(float(self.slope.sum())) <= _SAME * steep + self.rounding * abs(self.loss)


def _classes(start: _Seen, output: Tensor, examples: int) -> int | None:
    """The number of classes that an output of zeros speaks of; None for another kind of loss.

    Its loss is ln C, as a mean or a sum over the examples, and does not change when the same is added to all units.
    """
    if not start.level:
        return None
    for classes in sorted({output.shape[1] if output.ndim > 1 else 0, output.shape[-1]}, reverse=True):
        if classes > 1 and _times(start, math.log(classes), output, examples) is not None:
            return classes
    return None


def _shifted(start: _Seen, ones: _Seen) -> bool:
    """Whether the loss stays when the same is added to all units, as that of classes does, whatever multiplies it."""
    steep = float(start.slope.abs().sum())
    return steep > 0 and start.level and abs(ones.loss - start.loss) <= 1e-5 * max(abs(start.loss), steep)


def _repelled(start: _Seen, search: _Search) -> bool:
    """Whether some class is rewarded for having no probability: then the loss has no least value."""
    units = start.slope.numel()
    if float(start.slope.max()) * units * math.log(units) <= start.loss:  # no steeper than where a class has no example
        return False
    away = torch.zeros_like(start.value)
    away[start.slope.argmax()] = -_FAR
    return search.at(away).loss < 0


def _coin(start: _Seen, moved: _Seen, by: float) -> bool:
    """Whether an output of zeros costs ln 2 and one of `by` what the logistic loss says, whatever multiplies both."""
    bent = moved.loss - start.loss - by * float(start.slope.sum())
    expected = start.loss * (math.log1p(math.exp(by)) - math.log(2) - by / 2) / math.log(2)
    return start.loss > 0 and abs(bent - expected) <= start.same * abs(expected)


def _times(start: _Seen, one: float, output: Tensor, examples: int) -> float | None:
    """As a sum over how many a loss has a known value; 1 for a mean, None if it has not."""
    counts = {1, examples, output.numel(), output[..., :1].numel()}
    return next((count for count in sorted(counts) if abs(start.loss - count * one) <= start.same * count * one), None)


def _loss_of(seen: _Seen) -> float:
    return seen.loss if math.isfinite(seen.loss) else math.inf


class _Search:
    """The loss as a function of an output that is the same for all examples."""

    def __init__(self, objective: Objective, passes: Passes, replacement: Replacement) -> None:
        self._objective, self._passes, self._replacement = objective, passes, replacement
        # At an output of zeros a layer behind it may have no gradient by chance: all points have to say so.
        self.alone = True

    def at(self, value: Tensor) -> _Seen:
        """The loss at an output, and its gradient; notes if it depends on something else: one pass."""
        value = value.detach().clone().requires_grad_()
        place = self._replacement
        calls = Calls(replacement=Replacement(place.weight, place.number, value, place.channels))
        with self._objective.at(), self._passes.heard(calls):
            loss = self._objective.evaluate()
            *parts, slope = self._objective.differentiate(loss, [value])
        alone = all(part is None or not bool(part.to_dense().any()) for part in parts)
        self.alone = self.alone and alone and slope is not None
        found = torch.zeros_like(value) if slope is None else slope
        rounding = 2 * max(torch.finfo(value.dtype).eps, torch.finfo(loss.dtype).eps)
        return _Seen(value.detach(), float(loss.detach()), found.detach().double(), rounding)

    def best(self, start: _Seen) -> _Seen | None:
        """The best constant output; None where it was not found."""
        found = self._along_slope(start)
        if length(found.slope) <= _SAME * length(start.slope):
            return found
        return self._bracketed(found)

    def _along_slope(self, start: _Seen) -> _Seen:
        """The best of a few secants along the gradient; exact for square losses after one."""
        best, stride = start, 1.0
        for _ in range(_ROUNDS):
            steep = length(best.slope)
            if steep == 0:
                break
            tried = self.at(best.value - stride * best.slope.to(best.value.dtype))
            bend = float(((best.slope - tried.slope) * best.slope).sum()) / (stride * steep**2)
            if not math.isfinite(tried.loss) or not math.isfinite(bend):
                stride /= 8
                continue
            if tried.loss < best.loss and bend <= 0:
                best, stride = tried, 2 * stride
                continue
            if bend <= 0:
                stride /= 8
                continue
            stride = 1 / bend
            found = self.at(best.value - stride * best.slope.to(best.value.dtype))
            gain = best.loss - min(found.loss, tried.loss)
            best = min((best, tried, found), key=_loss_of)
            if gain <= 0.01 * abs(best.loss) or length(best.slope) <= 0.05 * steep:
                break
        return best

    def _bracketed(self, start: _Seen) -> _Seen | None:
        """The best constant output, by a root of the slope of each unit; None where it was not found.

        All units move at once. A convex loss lies above its tangent: what it can still fall by is at most the sum of
        slope times the distance to the far end of the bracket.
        """
        low, high = (torch.full_like(start.slope, side * math.inf) for side in (-1, 1))
        below, above = torch.zeros_like(low), torch.zeros_like(high)
        seen, best = start, start
        stride = abs(start.loss) / float(start.slope.abs().sum())
        for turn in range(_BRACKETS + 1):
            place, slope = seen.value.double(), seen.slope
            rising, falling = slope >= 0, slope <= 0
            high, above = torch.where(rising, place, high), torch.where(rising, slope, above)
            low, below = torch.where(falling, place, low), torch.where(falling, slope, below)
            best = min(best, seen, key=_loss_of)
            far = torch.where(slope > 0, place - low, high - place).masked_fill(slope == 0, 0.0)
            if float((slope.abs() * far).nan_to_num(0.0, math.inf).sum()) <= _NEAR * abs(seen.loss):
                return best
            if turn == _BRACKETS:
                return None
            # A secant, then a half, so that a bracket shrinks whatever the slope looks like.
            part = torch.full_like(low, 0.5) if turn % 2 else (below / (below - above)).clamp(0.02, 0.98)
            between = low + part.nan_to_num(0.5) * (high - low)
            out = torch.where(high.isinf(), low + stride, high - stride)
            goal = torch.where(low.isinf() | high.isinf(), out, between)
            stride *= 2
            seen = self.at(torch.where(slope == 0, place, goal).to(start.value.dtype))
            if not math.isfinite(seen.loss) or not bool(seen.slope.isfinite().all()):
                return None
        return None

    def unit(self, best: _Seen) -> float | None:
        """How far the output must move, in all units alike, until the loss has doubled."""
        distance, power, grown = math.sqrt(abs(best.loss)), 2.0, math.nan
        before: tuple[float, float] | None = None
        for _ in range(_STRETCHES):
            moved = self.at(best.value + distance)
            grown = (moved.loss - best.loss) / best.loss
            if not math.isfinite(grown):
                return None
            if grown <= _NEAR:  # nothing can be told from it: the best output is known no better
                distance, before = 16 * distance, None
                continue
            if before is not None and distance != before[0]:
                slope = math.log(grown / before[1]) / math.log(distance / before[0])
                power = min(max(slope, 0.5), 2.0)
            before = distance, grown
            distance /= grown ** (1 / power)  # exact for a square loss
            if abs(grown - 1) < 0.1:
                break
        return distance if 0.5 < grown < 2 else None
