"""The course of a number in a few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*%#"


def sparkline(values: Sequence[float], width: int, levels: str = BLOCKS) -> str:
    """The last values, lowest to highest level; logarithmic where they are positive and span more than a decade.

    Args:
        values: The values, oldest first.
        width: How many of them at most.
        levels: The characters, lowest first.

    Returns:
        At most `width` characters; infinite values have the outermost levels, NaN is a space.

    Example:
        >>> sparkline([1, 2, 3, 8], 4, levels="_-=#")
        '__-#'
    """
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return "".join(_outside(value, levels) for value in shown)
    scale = math.log if min(finite) > 0 and max(finite) > 10 * min(finite) else float
    low, high = scale(min(finite)), scale(max(finite))
    top = len(levels) - 1
    # A number that hardly moves is drawn as a flat line in the middle, not as noise from floor to ceiling.
    flat = high - low <= (0.02 * max(abs(low), abs(high)) if scale is float else 0)
    return "".join(
        _outside(value, levels) if not math.isfinite(value)
        else levels[top // 2 if flat else round((scale(value) - low) / (high - low) * top)]
        for value in shown
    )  # fmt: skip


def _outside(value: float, levels: str) -> str:
    if math.isnan(value):
        return " "
    return levels[-1] if value > 0 else levels[0]
