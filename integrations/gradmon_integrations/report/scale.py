"""From numbers to places in a drawing: ranges, logarithms and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_TICKS = 6
_LARGEST, _SMALLEST = 1e300, 1e-290
"""Beyond that the difference of two numbers may be infinite, or lose its digits."""
_FLAT = 0.05


@dataclass(frozen=True)
class Scale:
    """A range of numbers, drawn from `start` to `end`.

    Attributes:
        low: The number at `start`.
        high: The number at `end`.
        start: A coordinate.
        end: A coordinate.
        log: Whether equal distances are equal ratios; both ends are positive then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The coordinate of a number; that of the nearest end where it is outside."""
        value = min(max(value, self.low), self.high)
        low, high = self._measured(self.low), self._measured(self.high)
        part = (self._measured(value) - low) / (high - low)
        return round(self.start + part * (self.end - self.start), 1)

    def holds(self, value: float) -> bool:
        """Whether a number is inside."""
        return self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """Round numbers inside, from two to six where there are so many."""
        found = self._log_ticks() if self.log else _linear_ticks(self.low, self.high)
        # What is at an end but for rounding is outside.
        return [tick for tick in found if self.holds(tick)]

    def _measured(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _log_ticks(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        decades = last - first + 1
        if decades >= 3:
            stride = math.ceil(decades / _MOST_TICKS)
            return [10.0**power for power in range(first, last + 1, stride)]
        found = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
        found = [tick for tick in found if self.holds(tick)]
        return found if len(found) >= 2 else _linear_ticks(self.low, self.high)


def span(values: Sequence[float], limits: Sequence[float], *, log: bool, start: float, end: float) -> Scale:
    """A scale on which all numbers can be seen, and the limits that are not far from them.

    Args:
        values: Finite numbers.
        limits: What to show besides, where it does not crush the numbers.
        log: Whether equal distances are to be equal ratios; then numbers that are not positive do not count.
        start: The coordinate of the lowest number.
        end: The coordinate of the highest number.

    Returns:
        The scale; linear if no number is positive.
    """
    log = log and any(value > 0 for value in values)
    wanted = [min(max(value, -_LARGEST), _LARGEST) for value in values if value > 0 or not log] or [0.0]
    low, high = min(wanted), max(wanted)
    if log:
        low, high = max(low, _SMALLEST), max(high, _SMALLEST)
        near = [limit for limit in limits if limit > 0 and low / 100 <= limit <= high * 100]
        low, high = min(low, *near) if near else low, max(high, *near) if near else high
        margin = max((high / low) ** 0.05, 1.3) if high / low < math.inf else 10.0
        return Scale(low / margin, min(high * margin, _LARGEST * 10), start, end, True)
    if 0 < low < high / 2:
        low = 0.0
    size = high - low or abs(high) or 1.0
    near = [limit for limit in limits if low - size <= limit <= high + size]
    low, high = min([low, *near]), max([high, *near])
    largest = max(abs(low), abs(high))
    # A number that hardly moves is a flat line; its ticks could not be told apart either.
    flat = high - low <= max(_FLAT * largest, _SMALLEST)
    margin = 0.5 * max(largest or 1.0, _SMALLEST) if flat else 0.05 * (high - low)
    return Scale(low - margin if low else -0.4 * margin, high + margin, start, end)


def is_logarithmic(name: str, values: Sequence[float]) -> bool:
    """Whether a metric is better drawn on a logarithmic axis: norms, condition numbers, and what spans two decades."""
    if name.endswith(("_norm", "_condition")):
        return True
    return bool(values) and min(values) > 0 and max(values) >= 100 * min(values)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]
