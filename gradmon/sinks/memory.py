"""A sink for notebooks and tests."""

from __future__ import annotations

from collections.abc import Sequence

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading


class MemorySink:
    """Keeps everything in two lists.

    Attributes:
        readings: Every reading, in the order in which it came.
        alerts: Every alert, in the order in which it came.
    """

    immediate = True

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.alerts: list[Alert] = []

    @classmethod
    def from_spec(cls, argument: str) -> MemorySink:
        """Make the sink of the string ``"memory"``.

        Raises:
            ArgumentError: Something follows the name.
        """
        if argument:
            raise ArgumentError("sinks", "say 'memory' and nothing after it", repr(f"memory:{argument}"))
        return cls()

    def series(self, name: str, layer: str | None = None) -> list[tuple[int | None, float]]:
        """One number's history, as (step, value); without a layer, the readings of the whole model."""
        return [(r.step, r.value) for r in self.readings if r.name == name and r.layer == layer]

    def write(self, readings: Sequence[Reading]) -> None:
        """Append the readings."""
        self.readings.extend(readings)

    def alert(self, alert: Alert) -> None:
        """Append the alert."""
        self.alerts.append(alert)

    def close(self) -> None:
        """Do nothing: the lists stay readable."""
