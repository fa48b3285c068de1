"""The way out of the monitor: newest readings, alert rules, sinks; and what becomes of errors on that way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading
from gradmon.alerts import Rule, default_rules
from gradmon.sinks import RunAware, Sink, make_sink

_LOG = logging.getLogger("gradmon")
_T = TypeVar("_T")


class Failures(Counter[str]):
    """How often what failed; each kind is logged the first time.

    Args:
        run: The run's name, for the log.
    """

    def __init__(self, run: str = "") -> None:
        super().__init__()
        self.run = run

    def note(self, where: str, error: Exception) -> None:
        """Count an error, and log it if it is the first one there."""
        if getattr(error, "_gradmon_noted", False):  # one error, of which several metrics hear
            return
        error.__dict__["_gradmon_noted"] = True
        self[where] += 1
        if self[where] == 1:
            _LOG.error("%s: %s failed; training goes on", self.run, where, exc_info=error)

    def guard(self, where: str, work: Callable[[], _T], otherwise: _T) -> _T:
        """What the work returns; where it fails, that is noted, and something else is returned."""
        try:
            return work()
        except Exception as error:
            self.note(where, error)
            return otherwise


class Publisher:
    """Hands readings to the rules, and readings and alerts to the sinks.

    Args:
        alerts: ``"default"``, rules, or None for none.
        failures: Where errors of rules and sinks are counted; they go no further.

    Raises:
        ArgumentError: `alerts` holds what is no rule, or two of one name.
    """

    def __init__(self, alerts: str | Iterable[Rule] | None, failures: Failures) -> None:
        self._rules = default_rules() if alerts == "default" else _checked(alerts)
        self._failures = failures
        self._sinks: list[Sink] = []
        self._active: dict[tuple[str, str | None], Alert] = {}
        self._readings: dict[str, Reading] = {}

    @property
    def readings(self) -> dict[str, Reading]:
        """The newest reading of each metric, by name; those of layers by ``"name/layer"``."""
        return dict(self._readings)

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that fire now, oldest first."""
        return list(self._active.values())

    def open(self, sinks: Sink | str | Iterable[Sink | str] | None, run: str, rank: int) -> None:
        """Make the sinks and tell them the run; where one cannot be made, those before it are closed.

        Raises:
            ArgumentError: `sinks` is not what it must be.
        """
        if sinks is not None and not isinstance(sinks, (str, Sink, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("sinks", "be sinks or strings", repr(sinks))
        try:
            for sink in [sinks] if isinstance(sinks, (str, Sink)) else sinks or ():
                self._sinks.append(make_sink(sink))
            for sink in self._sinks:
                if isinstance(sink, RunAware):
                    sink.bind(run, rank)
        except BaseException:
            self.close()
            raise

    def publish(self, readings: Sequence[Reading]) -> None:
        """Take new readings: to the rules one by one, to every sink together, and then the alerts."""
        changes: list[Alert] = []
        for reading in readings:
            self._readings[reading.name if reading.layer is None else f"{reading.name}/{reading.layer}"] = reading
            for rule in self._rules:
                alert = self._failures.guard(f"alert {rule.name}", lambda a=rule, r=reading: a(r), None)
                if alert is not None:
                    changes.append(alert)
        self._to_sinks(lambda sink: sink.write(readings))
        for alert in changes:
            self._active.pop((alert.rule, alert.layer), None)
            if alert.state == "firing":
                self._active[(alert.rule, alert.layer)] = alert
            self._to_sinks(lambda sink, change=alert: sink.alert(change))

    def _to_sinks(self, give: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            self._failures.guard(f"sink {type(sink).__name__}", lambda s=sink: give(s), None)

    def close(self) -> None:
        """Close the sinks; a second call does nothing."""
        self._to_sinks(lambda sink: sink.close())
        self._sinks = []

    def state_dict(self) -> dict[str, Any]:
        """Rules, active alerts and newest readings, as plain types."""
        return {
            "rules": {rule.name: rule.state_dict() for rule in self._rules if hasattr(rule, "state_dict")},  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            "alerts": [_plain(alert) for alert in self._active.values()],
            "readings": {name: _plain(reading) for name, reading in self._readings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        for rule in self._rules:
            if rule.name in state["rules"] and hasattr(rule, "load_state_dict"):
                rule.load_state_dict(state["rules"][rule.name])  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        alerts = [Alert(**_fields(alert)) for alert in state["alerts"]]
        self._active = {(alert.rule, alert.layer): alert for alert in alerts}
        self._readings = {name: Reading(**_fields(reading)) for name, reading in state["readings"].items()}


def _plain(held: Reading | Alert) -> dict[str, Any]:
    return {**held._asdict(), "blame": list(held.blame)}


def _fields(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {**plain, "blame": tuple(plain["blame"])}


def _checked(alerts: str | Iterable[Rule] | None) -> list[Rule]:
    if alerts is not None and (isinstance(alerts, str) or not isinstance(alerts, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("alerts", 'be "default" or rules', repr(alerts))
    rules = [] if alerts is None else list(alerts)
    for rule in rules:
        if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("alerts", 'be "default" or rules with a name, callable with a reading', repr(rule))
    names = Counter(rule.name for rule in rules)
    if len(names) < len(rules):
        raise ArgumentError("alerts", "be rules with different names", f"{names.most_common(1)[0][0]!r} twice")
    return rules
