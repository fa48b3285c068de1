"""When a finite difference can be trusted."""

from __future__ import annotations

import math

from gradmon._errors import Unavailable

_WORST = 0.5


def resolution(epsilon: float, size: float, change: float, scale: float) -> float:
    """The estimated relative rounding error of a change of the gradient.

    A gradient is rounded by about epsilon of itself, and by what it would move if the weights (or inputs) were rounded,
    which is ``epsilon / scale`` of the change. Twice the sum of both, because the roundings inside the model, which
    nobody sees, come on top; a change that is exactly zero has only the second.

    Args:
        epsilon: The relative rounding error of one number.
        size: The norm of the gradient.
        change: The norm of its change.
        scale: The relative radius at which the change was taken.
    """
    if scale == 0:
        return math.inf
    return 2 * epsilon * ((size / change if change > 0 else 0.0) + 1 / scale)


def trusted(found: float, scale: float) -> float:
    """The resolution, if it is good enough.

    Raises:
        Unavailable: It is worse than 0.5.
    """
    if found > _WORST:
        raise Unavailable(f"rounding: relative error about {found:.2g} at scale {scale:.2g}")
    return found
