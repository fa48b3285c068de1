"""Rules on the value of one metric."""

from __future__ import annotations

import math

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading, Severity
from gradmon.alerts._rule import Judgement, Remedy, Switching, apart, check_limit, check_metric, speaks_of

_LENGTHS = ("loss", "grad_norm")


class Above(Switching):
    """Fires while a metric is above a limit.

    Args:
        metric: The metric.
        limit: The limit.
        name: The alert's name; None for ``<metric>_high``.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many readings in a row must be above before it fires.
        clear_after: How many in a row must not be before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.

    Example:
        >>> rule = Above("step_ratio", 1.0)
        >>> rule(Reading("step_ratio", 1.4, step=10)).message
        'step_ratio is 1.4, above 1.'
    """

    def __init__(
        self,
        metric: str,
        limit: float,
        *,
        name: str | None = None,
        severity: Severity = "warning",
        remedy: Remedy = "",
        after: int = 1,
        clear_after: int = 1,
    ) -> None:
        check_metric(metric)
        check_limit("limit", limit)
        super().__init__(f"{metric}_high" if name is None else name, severity, remedy, after, clear_after)
        self.metric, self.limit = metric, limit
        self.listens = self.wanted(metric)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if above; None for other metrics, layers and NaN."""
        if not speaks_of(reading, self.metric):
            return None
        bad = reading.value > self.limit
        return Judgement(bad, lambda: _told(reading, "above" if bad else "not above", self.limit))


class Below(Switching):
    """Fires while a metric is below a limit.

    Args:
        metric: The metric.
        limit: The limit.
        name: The alert's name; None for ``<metric>_low``.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many readings in a row must be below before it fires.
        clear_after: How many in a row must not be before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        metric: str,
        limit: float,
        *,
        name: str | None = None,
        severity: Severity = "warning",
        remedy: Remedy = "",
        after: int = 1,
        clear_after: int = 1,
    ) -> None:
        check_metric(metric)
        check_limit("limit", limit)
        super().__init__(f"{metric}_low" if name is None else name, severity, remedy, after, clear_after)
        self.metric, self.limit = metric, limit
        self.listens = self.wanted(metric)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if below; None for other metrics, layers and NaN."""
        if not speaks_of(reading, self.metric):
            return None
        bad = reading.value < self.limit
        return Judgement(bad, lambda: _told(reading, "below" if bad else "not below", self.limit))


class Outside(Switching):
    """Fires while a metric is outside of a range.

    Args:
        metric: The metric.
        low: What is below is bad.
        high: What is above is bad.
        name: The alert's name; None for ``<metric>_out_of_range``.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many readings in a row must be outside before it fires.
        clear_after: How many in a row must not be before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        metric: str,
        low: float,
        high: float,
        *,
        name: str | None = None,
        severity: Severity = "warning",
        remedy: Remedy = "",
        after: int = 1,
        clear_after: int = 1,
    ) -> None:
        check_metric(metric)
        check_limit("low", low)
        check_limit("high", high)
        if not low < high:
            raise ArgumentError("high", f"be above `low`, {low}", high)
        super().__init__(f"{metric}_out_of_range" if name is None else name, severity, remedy, after, clear_after)
        self.metric, self.low, self.high = metric, low, high
        self.listens = self.wanted(metric)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if outside; None for other metrics, layers and NaN."""
        if not speaks_of(reading, self.metric):
            return None
        if self.low <= reading.value <= self.high:
            return Judgement(
                False, lambda: f"{self.metric} is {reading.value:.4g}, within {self.low:.4g} and {self.high:.4g}."
            )
        side, limit = ("below", self.low) if reading.value < self.low else ("above", self.high)
        return Judgement(True, lambda: _told(reading, side, limit))


class NonFinite(Switching):
    """Fires while the loss or the gradient is not finite.

    Args:
        name: The alert's name.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        *,
        name: str = "nonfinite",
        severity: Severity = "critical",
        remedy: Remedy = "Lower the learning rate, clip the gradient, and look for a division by zero or a log of "
        "zero.",
    ) -> None:
        super().__init__(name, severity, remedy, 1, 1)

    def __call__(self, reading: Reading) -> Alert | None:
        """An alert if this reading makes the rule fire or resolve; None otherwise."""
        if reading.reason is None and reading.name not in _LENGTHS:  # nearly all: every reading comes by here
            return None
        return super().__call__(reading)

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad for any reading that is missing for this reason, or an infinite loss; a finite loss or norm is good."""
        if reading.reason == "non-finite gradient":
            return Judgement(True, lambda: "The loss or the gradient is not finite.")
        if reading.name not in _LENGTHS or reading.layer is not None or math.isnan(reading.value):
            return None
        bad = math.isinf(reading.value)
        return Judgement(bad, lambda: f"The {reading.name} is {reading.value:.4g}.")


def _told(reading: Reading, side: str, limit: float) -> str:
    value, limited = apart(reading.value, limit)
    return f"{reading.name} is {value}, {side} {limited}."
