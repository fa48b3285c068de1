"""The course of one number, and as much of it as can be seen in a drawing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from gradmon._reading import Reading

MOST_POINTS = 400
"""More than that cannot be told apart in a drawing."""


class Point(NamedTuple):
    """A number of a step."""

    step: int
    value: float


@dataclass(frozen=True)
class Series:
    """The readings of one metric, in the order of their steps.

    Attributes:
        points: One a step; of a step that was repeated after a resume, the newer one. NaN where there is no number.
        reasons: How often a number is missing, by reason.
    """

    points: tuple[Point, ...]
    reasons: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, readings: Iterable[Reading]) -> Series:
        """Put readings in order. Those without a step are numbered, from 1."""
        kept: dict[int, Reading] = {}
        for place, reading in enumerate(readings, start=1):
            kept[place if reading.step is None else reading.step] = reading
        missing = Counter(one.reason or "no reason given" for one in kept.values() if math.isnan(one.value))
        return cls(tuple(Point(step, kept[step].value) for step in sorted(kept)), dict(missing.most_common()))

    @cached_property
    def finite(self) -> list[float]:
        """The numbers that can be drawn."""
        return [point.value for point in self.points if math.isfinite(point.value)]

    @cached_property
    def infinite(self) -> list[Point]:
        """The points that lie outside of any drawing."""
        return [point for point in self.points if math.isinf(point.value)]

    @property
    def missing(self) -> int:
        """How often there is no number."""
        return sum(self.reasons.values())

    @property
    def newest(self) -> float:
        """The newest reading; NaN if it is no number."""
        return self.points[-1].value

    @property
    def last(self) -> Point | None:
        """The newest number that there is; None if there is none."""
        return next((point for point in reversed(self.points) if not math.isnan(point.value)), None)


class Drawn(NamedTuple):
    """What a drawing shows of a series.

    Attributes:
        pieces: The line; a new piece begins after a gap.
        missing: The steps at which there is no number.
        infinite: The points outside of the drawing.
        points: How many points the pieces have together.
        thinned: Whether that is fewer than there are.
    """

    pieces: list[list[Point]]
    missing: list[int]
    infinite: list[Point]
    points: int
    thinned: bool


def drawn(series: Series, most: int = MOST_POINTS) -> Drawn:
    """Choose points: all of them, or the lowest and the highest of equally many equal parts of the range of steps.

    Args:
        series: The series.
        most: How many points, at least 4.

    Returns:
        The choice. The first, the last, the lowest and the highest number are always among it. Where it is thinned,
        only parts without any number interrupt the line.
    """
    if len(series.points) <= most:
        parts = [[point] for point in series.points]
    else:
        first, last = series.points[0].step, series.points[-1].step
        count = (most - 2) // 2
        parts: list[list[Point]] = [[] for _ in range(count)]
        for point in series.points:
            parts[min(count - 1, (point.step - first) * count // (last - first))].append(point)
    pieces: list[list[Point]] = [[]]
    missing: list[int] = []
    infinite: list[Point] = []
    for part in parts:
        finite = [point for point in part if math.isfinite(point.value)]
        extremes = {min(finite, key=_value), max(finite, key=_value)} if finite else set[Point]()
        pieces[-1].extend(sorted(extremes))
        if not finite and part:
            pieces.append([])
        missing.extend(point.step for point in part[:1] if any(math.isnan(one.value) for one in part))
        infinite.extend(max(outside, key=_value) for outside in [[p for p in part if math.isinf(p.value)]] if outside)
    pieces = [piece for piece in pieces if piece]
    if pieces and len(series.points) > most:
        _complete(series, pieces)
    count = sum(map(len, pieces))
    return Drawn(pieces, missing, infinite, count, count < len(series.finite))


def _complete(series: Series, pieces: list[list[Point]]) -> None:
    """Add the first and the last number, which need not be extremes."""
    finite = [point for point in series.points if math.isfinite(point.value)]
    if pieces[0][0] != finite[0]:
        pieces[0].insert(0, finite[0])
    if pieces[-1][-1] != finite[-1]:
        pieces[-1].append(finite[-1])


def _value(point: Point) -> float:
    return point.value
