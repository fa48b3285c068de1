"""The checks that samplers share."""

from __future__ import annotations

import math

from gradmon._errors import ArgumentError


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Accept a positive integer.

    Raises:
        ArgumentError: It is something else, or larger than `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ArgumentError(name, "be a positive integer" if most is None else f"be 1 to {most}", value)


def check_radius(name: str, value: object) -> None:
    """Accept a positive finite number.

    Raises:
        ArgumentError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ArgumentError(name, "be a positive number", value)
