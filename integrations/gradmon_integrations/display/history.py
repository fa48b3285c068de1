"""What is shown and judged: everything that a monitor has said so far, or the newest part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from gradmon._reading import Alert, Reading

_T = TypeVar("_T")


class History:
    """A sink that keeps the readings of the whole model by name, and the alerts.

    Args:
        most: How many readings of each metric, and how many alerts, are kept at least; None for all. Up to twice as
            many are held, so that not every new one moves all the others.

    Attributes:
        series: The readings of each metric, oldest first.
        alerts: Every change of an alert, oldest first.
        active: The alerts that fire now, oldest first.
        writes: How often readings came.
    """

    immediate = True
    """What is asked for between two steps has to be there."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.series: dict[str, list[Reading]] = {}
        self.alerts: list[Alert] = []
        self.active: list[Alert] = []
        self.writes = 0

    def write(self, readings: Sequence[Reading]) -> None:
        """Keep the readings."""
        self.writes += 1
        for reading in readings:
            if reading.layer is None:
                self._keep(self.series.setdefault(reading.name, []), reading)

    def alert(self, alert: Alert) -> None:
        """Keep the alert, and what is active."""
        self._keep(self.alerts, alert)
        self.active = [other for other in self.active if (other.rule, other.layer) != (alert.rule, alert.layer)]
        if alert.state == "firing":
            self.active.append(alert)

    def _keep(self, kept: list[_T], new: _T) -> None:
        kept.append(new)
        if self._most is not None and len(kept) > 2 * self._most:
            del kept[: -self._most]

    def close(self) -> None:
        """Do nothing: what was kept stays readable."""

    def newest(self, name: str) -> Reading | None:
        """The newest reading of a metric; None before the first."""
        found = self.series.get(name)
        return found[-1] if found else None

    def values(self, name: str) -> list[float]:
        """The numbers of a metric, oldest first, without NaN."""
        return [reading.value for reading in self.series.get(name, []) if not math.isnan(reading.value)]
