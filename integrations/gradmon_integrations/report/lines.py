"""The course of one metric in all runs: lines, the healthy band, gaps, and when an alert was firing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from gradmon_integrations.display.states import Limit, number
from gradmon_integrations.report.drawing import WIDTH, Drawing, path
from gradmon_integrations.report.episodes import Episode
from gradmon_integrations.report.scale import Scale, is_logarithmic, span
from gradmon_integrations.report.series import Series, drawn

LEFT, RIGHT, TOP, BOTTOM = 66, 470, 30, 202
"""The edges of what is drawn in."""
_HEIGHT = 244
_BAR = 5
_STRIP = 11
_NAME = 130
"""The width of a limit's name where text is largest, on a phone."""
_MARKED = 60
"""Up to so many points each has a mark of its own."""


@dataclass(frozen=True)
class Line:
    """A run's part of a drawing.

    Attributes:
        label: The run.
        style: The class of its colour and kind of line.
        series: The numbers.
        ends: The run's first and last step.
        episodes: When alerts on the metric were firing.
    """

    label: str
    style: str
    series: Series
    ends: tuple[int, int]
    episodes: Sequence[Episode] = ()


def line_chart(
    key: str, name: str, description: str, lines: Sequence[Line], limits: Sequence[Limit], steps: tuple[int, int]
) -> Markup:
    """Draw one metric.

    Args:
        key: What the drawing's ids begin with.
        name: The metric.
        description: What is to be seen, in words.
        lines: One a run.
        limits: What the alert rules say about it.
        steps: The first and the last step of the page.

    Returns:
        The drawing.
    """
    values = [value for line in lines for value in line.series.finite]
    across = horizontal(steps)
    log = is_logarithmic(name, values)
    # Crosses and triangles have a strip of their own.
    bottom = BOTTOM - _STRIP if any(line.series.missing for line in lines) else BOTTOM
    top = TOP + _STRIP if any(line.series.infinite for line in lines) else TOP
    up = span(values, [limit.value for limit in limits], log=log, start=bottom, end=top)
    drawing = Drawing(key, f"{name} over the steps", description, _HEIGHT)
    _band(drawing, limits, up)
    axes(drawing, across, up)
    _limits(drawing, limits, up)
    taken: list[tuple[float, float]] = []
    for place, line in enumerate(lines):
        taken += _line(drawing, line, across, up)
        # One row a run, all of them between the upper edge and what is drawn in.
        row = min(_BAR + 1.0, (TOP - 2) / len(lines))
        _firing(drawing, line, across, y=TOP - 2 - row * (place + 1), height=max(0.8 * row, 0.5))
    _limit_names(drawing, limits, up, taken)
    if not values:
        drawing.text("quiet", (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, "no finite number", "middle")
    return drawing.markup()


def horizontal(steps: tuple[int, int], left: float = LEFT) -> Scale:
    """The axis of the steps."""
    first, last = steps
    # A single step is drawn in the middle.
    return Scale(first - 0.5, first + 0.5, left, RIGHT) if first == last else Scale(first, last, left, RIGHT)


def axes(drawing: Drawing, across: Scale, up: Scale) -> None:
    """Draw grid lines and their numbers."""
    for tick in up.ticks():
        y = up.place(tick)
        drawing.add("path", "mesh", d=path([(LEFT, y), (RIGHT, y)]))
        drawing.text("tick", LEFT - 6, y + 4.5, number(tick), "end")
    steps_axis(drawing, across, BOTTOM)


def steps_axis(drawing: Drawing, across: Scale, bottom: float) -> None:
    """Draw the axis of the steps below a drawing, with the first and the last step at its ends."""
    drawing.add("path", "axis", d=path([(across.start, bottom), (across.end, bottom)]))
    ends = sorted({math.ceil(across.low), math.floor(across.high)})
    inner = [tick for tick in across.ticks() if tick == int(tick)] if len(ends) == 2 else []
    room = 0.13 * (across.high - across.low)
    kept = [tick for tick in inner if across.low + room < tick < across.high - room]
    for tick in [*ends, *kept]:
        x = across.place(tick)
        drawing.add("path", "axis", d=path([(x, bottom), (x, bottom + 4)]))
        drawing.text("tick", x, bottom + 18, f"{tick:.0f}", "end" if x > WIDTH - 30 else "middle")
    drawing.text("tick", (across.start + across.end) / 2, bottom + 36, "step", "middle")


def _band(drawing: Drawing, limits: Sequence[Limit], up: Scale) -> None:
    """Shade where no rule speaks."""
    if not limits:
        return
    high = min([limit.value for limit in limits if limit.above], default=up.high)
    low = max([limit.value for limit in limits if not limit.above], default=up.low)
    top, bottom = up.place(high), up.place(low)
    if bottom > top:
        drawing.add("rect", "band", x=LEFT, y=top, width=RIGHT - LEFT, height=bottom - top)


def _limits(drawing: Drawing, limits: Sequence[Limit], up: Scale) -> None:
    for limit in limits:
        if up.holds(limit.value):
            y = up.place(limit.value)
            drawing.add("path", "limit", d=path([(LEFT, y), (RIGHT, y)]))


def _limit_names(drawing: Drawing, limits: Sequence[Limit], up: Scale, taken: Sequence[tuple[float, float]]) -> None:
    """Write the limits beside their lines, at the corner where they cover least of what is drawn."""
    for limit in limits:
        if up.holds(limit.value):
            y = up.place(limit.value)
            rows = [row for row in (y - 5, y + 15) if TOP + 10 < row < BOTTOM - 2]
            corners = [(x, row) for x in (RIGHT - 4, LEFT + 4 + _NAME) for row in rows]
            x, row = min(corners, key=lambda corner: _covered(*corner, taken), default=(RIGHT - 4, y - 5))
            text = f"alert {'above' if limit.above else 'below'} {number(limit.value)}"
            drawing.text("limit-name", x, row, text, "end")


def _covered(x: float, y: float, taken: Sequence[tuple[float, float]]) -> int:
    return sum(x - _NAME < across < x and y - 15 < up < y + 5 for across, up in taken)


def _along(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places on a line, near enough to each other that no name fits between them."""
    found = list(places[:1])
    for (x, y), (to_x, to_y) in pairwise(places):
        count = 1 + int(max(abs(to_x - x), abs(to_y - y)) // 8)
        found += [(x + (to_x - x) * part / count, y + (to_y - y) * part / count) for part in range(1, count + 1)]
    return found


def _line(drawing: Drawing, line: Line, across: Scale, up: Scale) -> list[tuple[float, float]]:
    """Draw a run; return where something is drawn now."""
    shown = drawn(line.series)
    taken: list[tuple[float, float]] = []
    for piece in shown.pieces:
        places = [(across.place(point.step), up.place(point.value)) for point in piece]
        if len(places) > 1:
            drawing.add("path", f"line {line.style}", d=path(places))
        taken += _along(places)
    few = shown.points <= _MARKED
    for piece in shown.pieces:
        for point in piece if few or len(piece) == 1 else ():
            tip = f"{line.label}: {number(point.value)} at step {point.step}"
            x, y = across.place(point.step), up.place(point.value)
            drawing.add("circle", f"dot {line.style}", tip=tip, cx=x, cy=y, r=2.4 if few else 1.6)
    for point in shown.infinite:
        x, tip = across.place(point.step), f"{line.label}: {number(point.value)} at step {point.step}"
        edge, side = (TOP, TOP + 8.0) if point.value > 0 else (BOTTOM, BOTTOM - 8.0)
        triangle = path([(x, edge), (x - 4, side), (x + 4, side)]) + "Z"
        drawing.add("path", f"dot {line.style}", tip=tip, d=triangle)
    if shown.missing:
        crosses = "".join(_cross(across.place(step), BOTTOM - 5.0) for step in shown.missing)
        drawing.add("path", f"gap {line.style}", d=crosses)
    return taken


def _cross(x: float, y: float) -> str:
    return path([(x - 2.5, y - 2.5), (x + 2.5, y + 2.5)]) + path([(x - 2.5, y + 2.5), (x + 2.5, y - 2.5)])


def _firing(drawing: Drawing, line: Line, across: Scale, y: float, height: float) -> None:
    for episode in line.episodes:
        start, end = episode.drawn(*line.ends)
        x, width = across.place(start), max(2.0, across.place(end) - across.place(start))
        tip = f"{line.label}: {episode.alert.rule}, {episode.steps}"
        drawing.add("rect", f"bar {line.style}", tip=tip, x=min(x, RIGHT - width), y=y, width=width, height=height)
