"""A rule on the course of one metric."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from gradmon._errors import ArgumentError
from gradmon._reading import Reading, Severity
from gradmon.alerts._rule import (
    Judgement,
    Remedy,
    Switching,
    check_count,
    check_limit,
    check_metric,
    speaks_of,
)

Direction = Literal["up", "down", "both"]
_FAR: dict[Direction, str] = {"up": "far above", "down": "far below", "both": "far from"}


class Drift(Switching):
    """Fires while a metric is far from where it has been, in robust standard deviations.

    ``|x - median| > deviations * max(1.4826 MAD, floor * |median|)`` over the window of readings before it. Readings
    that are far off do not enter the window, so that a drift is not learnt as normal; only a whole window of nothing
    but such readings is the new level.

    Args:
        metric: The metric.
        deviations: How many robust standard deviations.
        window: How many readings to look back, at least 3.
        least: How many readings must have been seen before it judges, 3 to `window`.
        floor: The least spread, relative to the median: a metric that hardly moves does not fire at a small move.
        direction: ``up``, ``down`` or ``both``.
        name: The alert's name; None for ``<metric>_drift``.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers; it also knows ``usual``, the median.
        after: How many readings in a row must be off before it fires.
        clear_after: How many in a row must not be before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        metric: str,
        deviations: float = 10.0,
        *,
        window: int = 50,
        least: int = 10,
        floor: float = 0.1,
        direction: Direction = "both",
        name: str | None = None,
        severity: Severity = "warning",
        remedy: Remedy = "",
        after: int = 1,
        clear_after: int = 1,
    ) -> None:
        check_metric(metric)
        for argument, value in (("deviations", deviations), ("floor", floor)):
            check_limit(argument, value)
            if value < 0 or (argument == "deviations" and value == 0):
                raise ArgumentError(argument, "be a positive number" if argument != "floor" else "be at least 0", value)
        check_count("window", window, 3)
        check_count("least", least, 3)
        if least > window:
            raise ArgumentError("least", f"be at most `window`, {window}", least)
        if direction not in ("up", "down", "both"):
            raise ArgumentError("direction", 'be "up", "down" or "both"', repr(direction))
        super().__init__(f"{metric}_drift" if name is None else name, severity, remedy, after, clear_after)
        self.metric, self.deviations, self.least, self.floor = metric, deviations, least, floor
        self.direction: Direction = direction
        self.listens = self.wanted(metric)
        self._values: deque[float] = deque(maxlen=window)
        self._off: deque[float] = deque(maxlen=window)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if far off; None for other metrics, layers, NaN, and until enough readings have been seen."""
        if not speaks_of(reading, self.metric):
            return None
        if len(self._values) < self.least:
            self._remember(reading.value)
            return None
        centre = self._known["usual"] = median(self._values)
        spread = 1.4826 * median(abs(value - centre) for value in self._values)
        off = reading.value - centre
        wanted = {"up": off > 0, "down": off < 0, "both": True}[self.direction]
        scale = max(spread, self.floor * abs(centre))
        # Where most readings are 0, as with a loss that has a margin, nothing says how far is far.
        bad = wanted and (scale > 0 or not self.floor) and abs(off) > self.deviations * scale
        if bad:
            self._suspect(reading.value)
        else:
            self._off.clear()
            self._remember(reading.value)
        side = f"{'' if bad else 'not '}{_FAR[self.direction]}"
        return Judgement(bad, lambda: f"{self.metric} is {reading.value:.4g}, {side} its median {centre:.4g}.")

    def _remember(self, value: float) -> None:
        if math.isfinite(value):
            self._values.append(value)

    def _suspect(self, value: float) -> None:
        """Set a value aside; where there is nothing else any more, it is the new level."""
        if math.isfinite(value):
            self._off.append(value)
        if len(self._off) == self._off.maxlen:
            self._values = deque(self._off, maxlen=self._off.maxlen)
            self._off.clear()

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as plain types."""
        return {**super().state_dict(), "values": list(self._values), "off": list(self._off)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        super().load_state_dict(state)
        self._values.clear()
        self._values.extend(state["values"])
        self._off.clear()
        self._off.extend(state["off"])
