"""Rules on what becomes of a number over time, or layer by layer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from gradmon._errors import ArgumentError
from gradmon._reading import NOT_TRAINED, Reading, Severity
from gradmon.alerts._rule import Judgement, Remedy, Switching, check_count, check_metric, speaks_of


class DeadLayer(Switching):
    """Fires for each layer whose gradient is exactly zero while that of the model is not.

    It sees readings of layers only: a monitor makes them with ``layers=True``.

    Args:
        name: The alert's name.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many readings in a row must be zero before it fires.
        clear_after: How many in a row must not be before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    listens = frozenset({"grad_norm"})
    layered = True

    def __init__(
        self,
        *,
        name: str = "dead_layer",
        severity: Severity = "warning",
        remedy: Remedy = "Does the loss depend on it? If so: lower the learning rate, or use another activation than "
        "ReLU, and look at its initialisation.",
        after: int = 3,
        clear_after: int = 1,
    ) -> None:
        super().__init__(name, severity, remedy, after, clear_after)
        self._whole = 0.0

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if zero, not if frozen; None for the whole model, other NaN, and while the whole gradient is zero."""
        if reading.name != "grad_norm":
            return None
        if reading.layer is not None and reading.reason == NOT_TRAINED:
            return Judgement(False, lambda: f"`{reading.layer}` is not trained any more.")
        if math.isnan(reading.value):
            return None
        if reading.layer is None:
            self._whole = reading.value
            return None
        if self._whole == 0:
            return None
        if reading.value == 0:
            return Judgement(True, lambda: f"No gradient arrives at `{reading.layer}`.")
        return Judgement(False, lambda: f"The gradient of `{reading.layer}` has the norm {reading.value:.4g}.")


class Stalled(Switching):
    """Fires while a metric that should fall does not.

    ``median(newer half) > median(older half) - fall * |median(older half)|`` of a window of readings. It judges once
    the window is full.

    Args:
        metric: The metric.
        fall: By which part the newer half must be lower than the older, in (0, 1).
        window: How many readings to look back, at least 4.
        name: The alert's name; None for ``<metric>_stalled``.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many readings in a row must show it before it fires.
        clear_after: How many in a row must not before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        metric: str = "loss",
        fall: float = 0.01,
        *,
        window: int = 100,
        name: str | None = None,
        severity: Severity = "info",
        remedy: Remedy = "",
        after: int = 3,
        clear_after: int = 3,
    ) -> None:
        check_metric(metric)
        if isinstance(fall, bool) or not isinstance(fall, (int, float)) or not 0 < fall < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("fall", "be in (0, 1)", fall)
        check_count("window", window, 4)
        super().__init__(f"{metric}_stalled" if name is None else name, severity, remedy, after, clear_after)
        self.metric, self.fall = metric, fall
        self.listens = self.wanted(metric)
        self._values: deque[float] = deque(maxlen=window)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if it did not fall; None for other metrics, layers, what is not finite, and until the window is full."""
        if not speaks_of(reading, self.metric) or math.isinf(reading.value):
            return None
        self._values.append(reading.value)
        count = len(self._values)
        if count < (self._values.maxlen or 0):
            return None
        values = list(self._values)
        older, newer = median(values[: count // 2]), median(values[count // 2 :])
        bad = newer > older - self.fall * abs(older)
        verb = "has not fallen" if bad else "falls"
        return Judgement(
            bad, lambda: f"The {self.metric} {verb}: {older:.4g} before, {newer:.4g} in the last {count // 2} looks."
        )

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as plain types."""
        return {**super().state_dict(), "values": list(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        super().load_state_dict(state)
        self._values.clear()
        self._values.extend(state["values"])


class Rising(Switching):
    """Fires when the sum of some counts rises, and resolves when it does not any more.

    Args:
        counts: The names of the readings, each a count so far, in the order in which they come.
        what: What they count, in words.
        name: The alert's name.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        clear_after: How many readings in a row must not have risen before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        counts: Iterable[str],
        what: str,
        *,
        name: str,
        severity: Severity = "warning",
        remedy: Remedy = "",
        clear_after: int = 5,
    ) -> None:
        super().__init__(name, severity, remedy, 1, clear_after)
        self.counts = tuple(counts)
        if isinstance(counts, str) or not self.counts or not all(isinstance(count, str) for count in self.counts):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("counts", "be names of readings", repr(counts))
        self.listens = frozenset(self.counts)
        self.what = what
        self._now: dict[str, float] = {}
        self._before = 0.0

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if risen; None for other readings, layers and NaN, and until all counts are there."""
        if reading.name not in self.counts or reading.layer is not None or math.isnan(reading.value):
            return None
        self._now[reading.name] = reading.value
        if reading.name != self.counts[-1]:
            return None
        now, before = sum(self._now.values()), self._before
        self._before = now
        return Judgement(
            now > before, lambda: f"{self.what}: {now:.0f} so far, {max(0.0, now - before):.0f} of them new."
        )

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as plain types."""
        return {**super().state_dict(), "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        super().load_state_dict(state)
        self._before = float(state["before"])
