"""Readings on their way to a trainer's own logger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradmon import Alert, Reading

Send = Callable[[dict[str, float], int], object]
"""Takes numbers by name, and the step they belong to."""


class Forwarding:
    """A sink that hands finite readings on, under ``gradmon/name`` or ``gradmon/name/layer``.

    Args:
        send: Takes them, once for each step.
        prefix: What their names begin with.
    """

    immediate = True  # loggers belong to the thread of the training

    def __init__(self, send: Send, prefix: str = "gradmon") -> None:
        self._send, self._prefix = send, prefix

    def write(self, readings: Sequence[Reading]) -> None:
        """Hand the readings on."""
        steps: dict[int, dict[str, float]] = {}
        for reading in readings:
            if reading.step is not None and math.isfinite(reading.value):
                name = reading.name if reading.layer is None else f"{reading.name}/{reading.layer}"
                steps.setdefault(reading.step, {})[f"{self._prefix}/{name}"] = reading.value
        for step, numbers in sorted(steps.items()):
            self._send(numbers, step)

    def alert(self, alert: Alert) -> None:
        """Do nothing: a trainer's logger takes numbers."""

    def close(self) -> None:
        """Do nothing: the logger is the trainer's."""
