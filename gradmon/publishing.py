"""The way out of the monitor: newest readings, alert rules, sinks; and what becomes of errors on that way."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading
from gradmon.alerts import CONTEXT, Rule, default_rules
from gradmon.sinks import Background, EndAware, InfoAware, LogSink, RunAware, Sink, make_sink

_LOG = logging.getLogger("gradmon")
_T = TypeVar("_T")
_PATIENCE = 60.0
"""The most seconds that closing waits for the sinks."""

OnAlert = Literal["log", "stop"] | Callable[[Alert], object] | None
_TAKEN: weakref.WeakValueDictionary[int, Sink] = weakref.WeakValueDictionary()
"""The sinks with a run's name that are some monitor's."""
Info = Mapping[str, str | int | float | bool]


class Failures(Counter[str]):
    """How often what failed; each kind is logged the first time.

    Args:
        run: The run's name, for the log.
    """

    def __init__(self, run: str = "") -> None:
        super().__init__()
        self.run = run
        self._lock = threading.Lock()

    def note(self, where: str, error: Exception) -> None:
        """Count an error, and log it if it is the first one there; what its way here holds is let go of."""
        self._note(where, error)
        # Its frames hold tensors, and whoever keeps the error. A frozen dataclass would refuse an assignment.
        BaseException.with_traceback(error, None)

    def _note(self, where: str, error: Exception) -> None:
        if getattr(error, "_gradmon_noted", False):  # one error, of which several metrics hear
            return
        error.__dict__["_gradmon_noted"] = True
        with self._lock:  # sinks have threads of their own
            self[where] += 1
            first = self[where] == 1
        if first:
            with contextlib.suppress(Exception):  # a handler or a filter of the caller's
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
        on_alert: What else to do about an alert.
        writes: Whether this process writes; of several ranks with the same readings only the first does.

    Attributes:
        should_stop: Whether an alert has asked for the end of the training.

    Raises:
        ArgumentError: `alerts` holds what is no rule, or two of one name; `on_alert` is not what it must be.
    """

    def __init__(
        self,
        alerts: str | Iterable[Rule] | None,
        failures: Failures,
        on_alert: OnAlert | object = None,
        *,
        writes: bool = True,
    ) -> None:
        self._rules = default_rules() if alerts == "default" else _checked(alerts)
        if on_alert not in ("log", "stop", None) and not callable(on_alert):
            raise ArgumentError("on_alert", 'be "log", "stop", callable with an alert, or None', repr(on_alert))
        self._failures, self._on_alert = failures, on_alert
        self._log = LogSink(_LOG)
        self._sinks: list[Sink] = []
        self._listening: dict[tuple[str, bool], list[Rule]] = {}
        self._active: dict[tuple[str, str | None], Alert] = {}
        self._readings: dict[str, Reading] = {}
        self.should_stop = False
        self.writes = writes
        self._process = os.getpid()

    @property
    def readings(self) -> dict[str, Reading]:
        """The newest reading of each metric, by name; those of layers by ``"name/layer"``."""
        return dict(self._readings)

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that fire now, oldest first."""
        return list(self._active.values())

    @property
    def sink_errors(self) -> int:
        """How often a sink has failed."""
        # A copy, because sinks count from threads of their own.
        return sum(count for where, count in dict(self._failures).items() if where.startswith("sink "))

    @property
    def sink_dropped(self) -> int:
        """How many readings and alerts were dropped because a sink was too slow."""
        return sum(sink.dropped for sink in self._sinks if isinstance(sink, Background))

    def open(
        self, sinks: Sink | str | Iterable[Sink | str] | None, run: str, rank: int, info: Info | None = None
    ) -> None:
        """Make the sinks and tell them the run; where one cannot be made, those before it are closed.

        A process that does not write leaves them alone.

        Raises:
            ArgumentError: `sinks` is not what it must be.
        """
        if sinks is not None and not isinstance(sinks, (str, Sink, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("sinks", "be sinks or strings", repr(sinks))
        self._log.bind(run, rank)
        if not self.writes:
            return
        try:
            for given in [sinks] if isinstance(sinks, (str, Sink)) else sinks or ():
                sink = make_sink(given)
                if _TAKEN.get(id(sink)) is sink:
                    must = "be no other monitor's, whose readings would get this run's name"
                    raise ArgumentError("sinks", must, f"the {type(sink).__name__} of another one")
                if isinstance(sink, RunAware):
                    with contextlib.suppress(TypeError):  # one that cannot be referred to weakly
                        _TAKEN[id(sink)] = sink
                if not getattr(sink, "immediate", False):
                    where = f"sink {type(sink).__name__}"
                    # Not `self`: the thread would keep a monitor that is forgotten, and with it itself.
                    note = self._failures.note
                    sink = Background(sink, lambda error, where=where, note=note: note(where, error))
                self._sinks.append(sink)
            for sink in self._sinks:
                if isinstance(sink, RunAware):
                    sink.bind(run, rank)
                if isinstance(sink, InfoAware):
                    sink.describe(info or {})
        except BaseException:
            self.close()
            raise

    def publish(self, readings: Sequence[Reading]) -> None:
        """Take new readings: to the rules one by one, to every sink together, and then the alerts."""
        if self._process != os.getpid() or not readings:
            return
        changes: list[Alert] = []
        for reading in readings:
            self._readings[reading.name if reading.layer is None else f"{reading.name}/{reading.layer}"] = reading
        # First what remedies speak of: they are to speak of this step.
        for reading in sorted(readings, key=lambda reading: reading.name not in CONTEXT):
            whole = reading.layer is None
            rules = self._listening.get((reading.name, whole))
            for rule in self._listeners(reading.name, whole) if rules is None else rules:
                try:
                    alert = rule(reading)
                    if alert is not None and not isinstance(alert, Alert):  # pyright: ignore[reportUnnecessaryIsInstance]
                        raise TypeError(f"must return an Alert or None. Got {alert!r}.")
                except Exception as error:
                    self._failures.note(f"alert {rule.name}", error)
                    continue
                if alert is not None:
                    changes.append(alert)
        self._to_sinks(lambda sink: sink.write(readings))
        for alert in changes:
            self._active.pop((alert.rule, alert.layer), None)
            if alert.state == "firing":
                self._active[(alert.rule, alert.layer)] = alert
            self._to_sinks(lambda sink, change=alert: sink.alert(change))
            self._failures.guard("on_alert", lambda change=alert: self._act(change), None)

    def _load(self, rule: Rule, states: Mapping[str, Any]) -> bool:
        """Have a rule take up what was saved; whether it has. A rule of the same name may have been another one."""
        if rule.name not in states or not hasattr(rule, "load_state_dict"):
            return False

        def load() -> bool:
            rule.load_state_dict(states[rule.name])  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            return True

        return self._failures.guard(f"alert {rule.name}", load, False)

    def _listeners(self, name: str, whole: bool) -> list[Rule]:
        """The rules that look at readings of a name; those that do not say what they look at get everything."""
        found: list[Rule] = []
        for rule in self._rules:
            if self._failures.guard(f"alert {rule.name}", lambda rule=rule: _listens(rule, name, whole), False):
                found.append(rule)
        self._listening[name, whole] = found
        return found

    def _act(self, alert: Alert) -> None:
        """Do about an alert what was asked for."""
        act = self._on_alert
        stops = act == "stop" and alert.state == "firing" and alert.severity == "critical"
        if not self.writes:
            self.should_stop = self.should_stop or stops
        elif act in ("log", "stop"):
            if not any(isinstance(sink, LogSink) or getattr(sink, "logs_alerts", False) for sink in self._sinks):
                self._log.alert(alert)
            if stops and not self.should_stop:
                self.should_stop = True
                _LOG.critical("%s: the training should stop: %s", self._failures.run, alert.message)
        elif callable(act):
            act(alert)

    def _to_sinks(self, give: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            held = sink.sink if isinstance(sink, Background) else sink
            self._failures.guard(f"sink {type(held).__name__}", lambda s=sink: give(s), None)

    def flush(self, seconds: float) -> bool:
        """Wait until all sinks have taken what they were given; whether they have, in that time."""
        deadline = time.monotonic() + seconds
        return not [
            sink for sink in self._sinks if isinstance(sink, Background) and not sink.wait(deadline - time.monotonic())
        ]

    def close(self, succeeded: bool | None = None, steps: int = 0) -> None:
        """Tell the sinks how the run ended, if that is known, and close them; a second call does nothing.

        Args:
            succeeded: How it ended; None if that is not known, or was told.
            steps: How many steps it had. If nothing was looked at in them, that is logged, lest it pass for good news.
        """
        if succeeded and steps and self.writes and not self._readings and not self._failures:
            sooner = f"schedule=every({max(1, steps // 10)}) would have looked"
            _LOG.warning(
                "%s: nothing was looked at: none of the %d steps was due; %s", self._failures.run, steps, sooner
            )
        if self._process != os.getpid():  # forked: the run, its files and its ports are the parent's
            self._sinks = []
        for sink in self._sinks:
            _TAKEN.pop(id(sink.sink if isinstance(sink, Background) else sink), None)
        if succeeded is not None:
            self._to_sinks(lambda sink: sink.finish(succeeded) if isinstance(sink, EndAware) else None)
        self._to_sinks(lambda sink: sink.close())
        if not self.flush(_PATIENCE):
            for sink in self._sinks:
                if isinstance(sink, Background) and not sink.wait(0):
                    late = TimeoutError(f"{type(sink.sink).__name__} did not come to its end in {_PATIENCE:g} s")
                    self._failures.note(f"sink {type(sink.sink).__name__}", late)
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
        loaded = {rule.name for rule in self._rules if self._load(rule, state["rules"])}
        # Nobody would resolve those of rules that are not there any more, or begin anew.
        alerts = [Alert(**_fields(alert)) for alert in state["alerts"] if alert["rule"] in loaded]
        self._active = {(alert.rule, alert.layer): alert for alert in alerts}
        for alert in alerts:  # sinks that show what fires have not heard of them in this process
            self._to_sinks(lambda sink, still=alert: sink.alert(still) if _shows(sink) else None)
        self._readings = {name: Reading(**_fields(reading)) for name, reading in state["readings"].items()}


def _listens(rule: Rule, name: str, whole: bool) -> bool:
    """Whether a rule looks at readings of a name, of the whole model or of layers."""
    names = getattr(rule, "listens", None)
    return (names is None or name in frozenset(names)) and (whole or bool(getattr(rule, "layered", True)))


def _shows(sink: Sink) -> bool:
    """Whether it shows what fires, rather than what happens."""
    return isinstance(sink, Background) or getattr(sink, "logs_alerts", False)


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


def ended_well(error: BaseException | None, around: BaseException | None) -> bool:
    """Whether a run that ends on the way of an exception ends well; `around` was on its way before the run began."""
    return error is None or error is around or isinstance(error, KeyboardInterrupt)
