"""One metric of every layer over the steps, as shades."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from gradmon_integrations.display.states import number
from gradmon_integrations.report.drawing import Drawing, shortened
from gradmon_integrations.report.lines import RIGHT, horizontal, steps_axis
from gradmon_integrations.report.scale import Scale
from gradmon_integrations.report.series import Series

SHADES = 8
MOST_LAYERS = 64
_COLUMNS = 72
_TOP = 10
_LABEL = 12
"""The height of a layer's name."""
_LONGEST, _LETTER = 15, 8.8
"""The letters of a layer's name, and the width of one where text is largest, on a phone."""


def heat_map(
    key: str,
    title: str,
    description: str,
    layers: Mapping[str, Series],
    steps: tuple[int, int],
    shades: Scale,
) -> Markup:
    """Draw the layers, the first one at the top; where several readings fall into one cell, the largest.

    Args:
        key: What the drawing's ids begin with.
        title: Its name.
        description: What is to be seen, in words.
        layers: The series, by layer.
        steps: The first and the last step of the page.
        shades: From numbers to shades, from 0 to `SHADES`.

    Returns:
        The drawing; a cell without a number stays empty, and one of nothing but zeros has an outline only.
    """
    row = min(20.0, max(7.0, round(380 / max(1, len(layers)), 1)))
    bottom = _TOP + row * len(layers)
    drawing = Drawing(key, title, description, bottom + 72)
    columns = _columns(layers, steps)
    left = round(16 + _LETTER * min(_LONGEST, max((len(layer) for layer in layers), default=0)), 1)
    width = (RIGHT - left) / columns
    cells: dict[str, list[str]] = {}
    for place, (layer, series) in enumerate(layers.items()):
        y = _TOP + place * row
        stride = math.ceil(_LABEL / row)
        if place % stride == 0:
            drawing.text("tick", left - 6, y + row / 2 + 4.5, shortened(layer, _LONGEST), "end", tip=layer)
        for kind, first, count in _runs(_row(series, columns, steps, shades)):
            x, wide = left + first * width, count * width
            cells.setdefault(kind, []).append(_box(x, y, wide, row))
    for kind in sorted(cells):
        drawing.add("path", f"cell {kind}", d="".join(cells[kind]))
    steps_axis(drawing, horizontal(steps, left), bottom)
    _legend(drawing, shades, bottom + 48)
    return drawing.markup()


def shade_scale(values: Sequence[float], *, log: bool) -> Scale:
    """The scale of the shades of numbers."""
    wanted = [value for value in values if value > 0 or not log] or [1.0]
    low, high = min(wanted), max(wanted)
    if log:
        return Scale(low, high if high > low else low * 10, 0.0, SHADES, True)
    return Scale(low, high if high > low else low + 1.0, 0.0, SHADES)


def _columns(layers: Mapping[str, Series], steps: tuple[int, int]) -> int:
    """So many that a cell is about as wide as the readings are apart, also where a run is shorter than the others."""
    count = max(len(series.points) for series in layers.values())
    first = min(series.points[0].step for series in layers.values())
    last = max(series.points[-1].step for series in layers.values())
    if count < 2 or last == first:
        return 1 if steps[0] == steps[1] else _COLUMNS
    return max(1, min(_COLUMNS, (steps[1] - steps[0]) * (count - 1) // (last - first)))


def _row(series: Series, columns: int, steps: tuple[int, int], shades: Scale) -> list[str | None]:
    """The class of each cell of a layer. Between two readings the first one holds."""
    first, last = steps
    held: list[list[float]] = [[] for _ in range(columns)]
    for point in series.points:
        place = (point.step - first) * columns // (last - first) if last > first else 0
        held[min(columns - 1, place)].append(point.value)
    newest = max((place for place, values in enumerate(held) if values), default=0)
    row: list[str | None] = []
    for place, values in enumerate(held):
        known = [value for value in values if not math.isnan(value)]
        if known:
            row.append(_shade(max(known), shades))
        else:
            row.append(row[-1] if row and not values and place < newest else None)
    return row


def _shade(value: float, shades: Scale) -> str:
    if value == 0:
        return "zero"
    return f"h{min(SHADES - 1, int(shades.place(value)))}"


def _runs(row: Sequence[str | None]) -> list[tuple[str, int, int]]:
    """Neighbouring cells of one class, as class, first place and count."""
    found: list[tuple[str, int, int]] = []
    for place, kind in enumerate(row):
        if kind is None:
            continue
        if found and found[-1][0] == kind and found[-1][1] + found[-1][2] == place:
            found[-1] = (kind, found[-1][1], found[-1][2] + 1)
        else:
            found.append((kind, place, 1))
    return found


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _legend(drawing: Drawing, shades: Scale, y: float) -> None:
    """The shades from the lowest number to the highest."""
    wide = 18.0
    left = RIGHT - 60 - SHADES * wide
    drawing.text("tick", left - 6, y + 16, number(shades.low), "end")
    for place in range(SHADES):
        drawing.add("path", f"cell h{place}", d=_box(left + place * wide, y + 5, wide, 13))
    drawing.text("tick", left + SHADES * wide + 6, y + 16, number(shades.high))
