"""When which alert was firing: one row a rule."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from gradmon_integrations.report.drawing import Drawing, path, shortened
from gradmon_integrations.report.episodes import Fired
from gradmon_integrations.report.lines import LEFT, RIGHT, horizontal, steps_axis

_ROW, _TOP = 40, 6
_LETTERS = 36
"""As many as there is room for where text is largest, on a phone."""


def timeline(
    key: str, label: str, description: str, fired: Sequence[Fired], ends: tuple[int, int], steps: tuple[int, int]
) -> Markup:
    """Draw the episodes of each rule.

    Args:
        key: What the drawing's ids begin with.
        label: The run.
        description: What is to be seen, in words.
        fired: The rules.
        ends: The run's first and last step.
        steps: The first and the last step of the page.

    Returns:
        The drawing.
    """
    across, bottom = horizontal(steps), _TOP + _ROW * len(fired) + 4
    drawing = Drawing(key, f"Alerts of {label} over the steps", description, bottom + 42)
    for row, one in enumerate(fired):
        y = _TOP + row * _ROW
        drawing.text(f"row-name {one.severity}", LEFT, y + 13, shortened(f"{one.rule} ({one.severity})", _LETTERS))
        drawing.add("path", "mesh", d=path([(LEFT, y + 26), (RIGHT, y + 26)]))
        for episode in one.episodes:
            start, end = episode.drawn(*ends)
            width = max(4.0, across.place(end) - across.place(start))
            x = min(across.place(start), RIGHT - width)
            where = f" in {episode.alert.layer}" if episode.alert.layer is not None else ""
            tip = f"{one.rule}{where}: {episode.steps}"
            drawing.add("rect", f"bar {one.severity}", tip=tip, x=x, y=y + 19, width=width, height=14, rx=2)
    steps_axis(drawing, across, bottom)
    return drawing.markup()
