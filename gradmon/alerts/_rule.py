"""What all alert rules share: hysteresis, and the state of each layer on its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gradmon._errors import ArgumentError, told
from gradmon._reading import Alert, Reading, Severity, State

Remedy = str | Callable[[Reading, Mapping[str, float]], str]
"""What to change, in words; or how to say it with numbers, from the reading and the newest values of `CONTEXT`."""
CONTEXT = frozenset({"learning_rate", "batch_size", "update_ratio", "step_ratio"})
"""The readings that remedies may want to know."""


@runtime_checkable
class Rule(Protocol):
    """Turns readings into alerts. A rule that also has `state_dict` and `load_state_dict` is saved with the monitor.

    A rule that has an attribute `listens`, a set of names, gets the readings of these names only; one with ``layered =
    False`` none of single layers.
    """

    @property
    def name(self) -> str:
        """Lower-case words joined by underscores."""
        ...

    def __call__(self, reading: Reading) -> Alert | None:
        """An alert if this reading makes the rule fire or resolve; None otherwise."""
        ...


class Judgement(NamedTuple):
    """What a rule thinks of one reading.

    Attributes:
        bad: Whether it speaks for firing.
        message: Says what was seen, in words; asked for only where the state changes.
    """

    bad: bool
    message: Callable[[], str]


class Switching(ABC):
    """A rule that fires after some bad readings in a row, and resolves after some good ones.

    Args:
        name: The alert's name.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        after: How many bad readings in a row make it fire.
        clear_after: How many good ones in a row make it resolve.

    Attributes:
        listens: The names of the readings that it looks at; None for all.
        layered: Whether it looks at readings of single layers.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    listens: frozenset[str] | None = None
    layered = False

    def __init__(self, name: str, severity: Severity, remedy: Remedy, after: int, clear_after: int) -> None:
        if not isinstance(name, str) or not name or name != name.lower() or " " in name:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("name", "be lower-case words joined by underscores", repr(name))
        if severity not in ("info", "warning", "critical"):
            raise ArgumentError("severity", 'be "info", "warning" or "critical"', repr(severity))
        if not isinstance(remedy, str) and not callable(remedy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("remedy", "be words, or a function of a reading and what is known", repr(remedy))
        check_count("after", after, 1)
        check_count("clear_after", clear_after, 1)
        self.name = name
        self.severity: Severity = severity
        self.remedy = remedy
        self.after = after
        self.clear_after = clear_after
        self._firing: dict[str | None, bool] = {}
        self._against: dict[str | None, int] = {}
        self._known: dict[str, float] = {}

    def wanted(self, metric: str) -> frozenset[str]:
        """The readings that a rule on one metric looks at: its own, and what its remedy wants to know."""
        return CONTEXT | {metric} if callable(self.remedy) else frozenset({metric})

    @abstractmethod
    def judge(self, reading: Reading) -> Judgement | None:
        """What to think of a reading; None if it says nothing."""

    def __call__(self, reading: Reading) -> Alert | None:
        """An alert if this reading makes the rule fire or resolve; None otherwise."""
        layer = reading.layer
        if layer is None and reading.name in CONTEXT:
            self._known[reading.name] = reading.value
            if not math.isfinite(reading.value):  # what was known before is so no more
                del self._known[reading.name]
        found = self.judge(reading)
        if found is None:
            return None
        firing = self._firing.get(layer, False)
        against = self._against.get(layer, 0) + 1 if found.bad != firing else 0
        if against < (self.clear_after if firing else self.after):
            self._firing[layer], self._against[layer] = firing, against
            return None
        self._firing[layer], self._against[layer] = not firing, 0
        state: State = "resolved" if firing else "firing"
        message, blame = found.message(), () if firing else reading.blame
        if blame:
            message += f" Mostly in {', '.join(f'`{name}`' for name in blame)}."
        remedy = "" if firing else self._advice(reading)
        return Alert(self.name, self.severity, state, reading.value, reading.step, layer, message, remedy, blame)

    def _advice(self, reading: Reading) -> str:
        """What the remedy says; that it fails is no reason to lose the alert."""
        if isinstance(self.remedy, str):
            return self.remedy
        try:
            return str(self.remedy(reading, dict(self._known)))
        except Exception as error:
            return f"The rule's remedy failed: {told(error)}"

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as plain types."""
        return {"switch": [[layer, firing, self._against[layer]] for layer, firing in self._firing.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._firing = {layer: bool(firing) for layer, firing, _ in state["switch"]}
        self._against = {layer: int(count) for layer, _, count in state["switch"]}


def check_count(name: str, value: object, least: int) -> None:
    """Accept an integer that is large enough.

    Raises:
        ArgumentError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(name, f"be an integer of at least {least}", value)


def check_metric(metric: object) -> None:
    """Accept the name of a metric.

    Raises:
        ArgumentError: It is something else.
    """
    if not isinstance(metric, str) or not metric:
        raise ArgumentError("metric", "be the name of a metric", repr(metric))


def check_limit(name: str, limit: object) -> None:
    """Accept a number.

    Raises:
        ArgumentError: It is something else.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit):
        raise ArgumentError(name, "be a number", limit)


def apart(value: float, limit: float) -> tuple[str, str]:
    """A number and a limit, in four digits, or in as many as tell them apart."""
    shown = f"{value:.4g}", f"{limit:.4g}"
    for digits in range(5, 18):
        if shown[0] != shown[1] or value == limit:
            break
        shown = f"{value:.{digits}g}", f"{limit:.{digits}g}"
    return shown


def speaks_of(reading: Reading, metric: str) -> bool:
    """Whether a reading has a number of the whole model for a metric; NaN neither fires nor resolves."""
    return reading.name == metric and reading.layer is None and not math.isnan(reading.value)
