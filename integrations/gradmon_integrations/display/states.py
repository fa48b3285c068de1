"""Is a number good or bad? What the alert rules say, for colours and for the verdict; and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple

from gradmon._reading import Alert
from gradmon.alerts import Above, Below, Outside, Rule, default_rules

State = Literal["firing", "noted", "beyond", "fine", "free", "missing"]
"""An alert is active; one of severity info is; past a limit, no alert yet; within limits; without any; no number."""


class Limit(NamedTuple):
    """The limit of one alert rule.

    Attributes:
        rule: The alert's name.
        above: Whether what is above is bad, rather than what is below.
        value: The limit.
    """

    rule: str
    above: bool
    value: float

    def passed_by(self, value: float) -> bool:
        """Whether a number is on the bad side."""
        return value > self.value if self.above else value < self.value

    def __str__(self) -> str:
        return f"{'>' if self.above else '<'} {number(self.value)}"


@cache
def limits(metric: str) -> tuple[Limit, ...]:
    """The limits that the default alert rules set to a metric, upper ones first."""
    found = [limit for rule in default_rules() if getattr(rule, "metric", None) == metric for limit in _limits_of(rule)]
    return tuple(sorted(found, key=lambda limit: not limit.above))


def _limits_of(rule: Rule) -> list[Limit]:
    if isinstance(rule, (Above, Below)):
        return [Limit(rule.name, isinstance(rule, Above), rule.limit)]
    if isinstance(rule, Outside):
        return [Limit(rule.name, True, rule.high), Limit(rule.name, False, rule.low)]
    return []


@cache
def metric_of(rule: str) -> str | None:
    """The metric that a default alert rule looks at; None if it looks at all of them, or is not known."""
    found = [str(getattr(known, "metric", "")) for known in default_rules() if known.name == rule]
    return found[0] or None if found else None


def state_of(metric: str, value: float | None, active: Iterable[Alert]) -> State:
    """What the alert rules think of a metric now."""
    severities = {alert.severity for alert in active if metric_of(alert.rule) == metric}
    if severities:
        return "noted" if severities == {"info"} else "firing"
    if value is None or math.isnan(value):
        return "missing"
    if any(limit.passed_by(value) for limit in limits(metric)):
        return "beyond"
    return "fine" if limits(metric) else "free"


def number(value: float) -> str:
    """Three significant digits, and an exponent only where zeros would have to be counted."""
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if 999.5 <= abs(value) < 99999.5:
        return f"{value:.0f}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def written(name: str, value: float) -> str:
    """A reading's number as it is shown: a share of the time in percent."""
    if name == "monitor_overhead" and math.isfinite(value):
        return f"{number(100 * value)} %"
    return number(value)
