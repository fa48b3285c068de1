"""What changes the gradient from one step to the next: the step's share and the batch's, one above the other."""

from __future__ import annotations

from statistics import median

from markupsafe import Markup

from gradmon_integrations.report.drawing import Drawing, path
from gradmon_integrations.report.lines import BOTTOM, LEFT, RIGHT, TOP, axes, horizontal
from gradmon_integrations.report.scale import Scale
from gradmon_integrations.report.series import Series, drawn

_HEIGHT = 244
_HIGH, _WIDE = 0.1, 240


def share_chart(key: str, label: str, description: str, step_share: Series, steps: tuple[int, int]) -> Markup:
    """Draw the two shares, which add up to 1, as areas.

    Args:
        key: What the drawing's ids begin with.
        label: The run.
        description: What is to be seen, in words.
        step_share: The lower area; the upper one is the rest.
        steps: The first and the last step of the page.

    Returns:
        The drawing.
    """
    across, up = horizontal(steps), Scale(0.0, 1.0, BOTTOM, TOP)
    drawing = Drawing(key, f"step_share and batch_share of {label} over the steps", description, _HEIGHT)
    shown = drawn(step_share)
    for piece in shown.pieces:
        edge = [(across.place(point.step), up.place(point.value)) for point in piece]
        if len(edge) == 1:
            # A single number has no width of its own.
            x, y = edge[0]
            edge = [(max(LEFT, x - 3.0), y), (min(RIGHT, x + 3.0), y)]
        first, last = edge[0][0], edge[-1][0]
        drawing.add("path", "batch-area", d=path([(first, TOP), *edge, (last, TOP)]) + "Z")
        drawing.add("path", "step-area", d=path([(first, BOTTOM), *edge, (last, BOTTOM)]) + "Z")
        drawing.add("path", "edge", d=path(edge))
    axes(drawing, across, up)
    if shown.pieces:
        # An area that is hardly there has no room for a name.
        left, right = across.place(shown.pieces[0][0].step), across.place(shown.pieces[-1][-1].step)
        share = median(step_share.finite)
        if share < 1 - _HIGH and right - left > _WIDE:
            drawing.text("area-name batch", left + 8, TOP + 18, "the next batch: batch_share")
        if share > _HIGH and right - left > _WIDE:
            drawing.text("area-name step", left + 8, BOTTOM - 8, "the step: step_share")
    else:
        drawing.text("quiet", (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, "no number", "middle")
    return drawing.markup()
