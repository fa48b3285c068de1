"""What the views and the verdict look at: everything that a monitor has said so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmon._reading import Alert, Reading


class History:
    """A sink that keeps the readings of the whole model by name, and the alerts.

    Attributes:
        series: The readings of each metric, oldest first.
        alerts: Every change of an alert, oldest first.
        active: The alerts that fire now, oldest first.
        writes: How often readings came.
    """

    def __init__(self) -> None:
        self.series: dict[str, list[Reading]] = {}
        self.alerts: list[Alert] = []
        self.active: list[Alert] = []
        self.writes = 0

    def write(self, readings: Sequence[Reading]) -> None:
        """Keep the readings."""
        self.writes += 1
        for reading in readings:
            if reading.layer is None:
                self.series.setdefault(reading.name, []).append(reading)

    def alert(self, alert: Alert) -> None:
        """Keep the alert, and what is active."""
        self.alerts.append(alert)
        self.active = [other for other in self.active if (other.rule, other.layer) != (alert.rule, alert.layer)]
        if alert.state == "firing":
            self.active.append(alert)

    def close(self) -> None:
        """Do nothing: what was kept stays readable."""

    def newest(self, name: str) -> Reading | None:
        """The newest reading of a metric; None before the first."""
        found = self.series.get(name)
        return found[-1] if found else None

    def values(self, name: str) -> list[float]:
        """The numbers of a metric, oldest first, without NaN."""
        return [reading.value for reading in self.series.get(name, []) if not math.isnan(reading.value)]
