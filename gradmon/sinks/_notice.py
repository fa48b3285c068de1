"""What notifiers share: which alerts are worth a message, and what it says."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from typing import Any

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Severity

_RANK: dict[Severity, int] = {"info": 0, "warning": 1, "critical": 2}

_Key = tuple[str, str | None]


class Notices:
    """Chooses among alerts, and puts them into words.

    A rule that fires again within `pause` seconds of its last message is told of when they are over, if it still fires;
    that it resolved is told of only where it was told that it fired.

    Args:
        least: The least severity that is worth a message.
        resolved: Whether to tell when an alert resolves.
        pause: Seconds.

    Attributes:
        run: The run's name.
        rank: The process's rank.

    Raises:
        ArgumentError: `least` is no severity, or `pause` no number of at least 0.
    """

    def __init__(self, least: Severity, resolved: bool, pause: float) -> None:
        if least not in _RANK:
            raise ArgumentError("least", 'be "info", "warning" or "critical"', repr(least))
        if isinstance(pause, bool) or not isinstance(pause, (int, float)) or not 0 <= pause < math.inf:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("pause", "be a number of seconds of at least 0", pause)
        self._least, self._resolved, self._pause = _RANK[least], resolved, pause
        self._told: dict[_Key, float] = {}
        self._firing: dict[_Key, Alert] = {}
        self._known: set[_Key] = set()
        self._over: dict[_Key, Alert] = {}
        self._refused: dict[_Key, float] = {}
        self.run, self.rank = "run", 0

    def take(self, alert: Alert) -> None:
        """Take note of an alert."""
        if _RANK[alert.severity] < self._least:
            return
        key = (alert.rule, alert.layer)
        if alert.state == "firing":
            self._firing[key] = alert
            if self._over.pop(key, None) is not None:  # nobody was told that it had resolved
                self._known.add(key)
            return
        self._firing.pop(key, None)
        if key in self._known:
            self._known.discard(key)
            if self._resolved:
                self._over[key] = alert
                self._refused.pop(key, None)

    def deliver(self, send: Callable[[Alert], None]) -> None:
        """Send what is due; where a message is not accepted, there is another attempt after the pause.

        Args:
            send: Sends one message.

        Raises:
            GradmonError: One was not accepted; the others have been sent all the same.
        """
        error: GradmonError | None = None
        for alert in self._due():
            try:
                send(alert)
            except GradmonError as failure:
                error = failure
                if alert.state == "resolved":
                    key = (alert.rule, alert.layer)
                    self._over[key], self._refused[key] = alert, time.monotonic()
            else:
                if alert.state == "firing":
                    self._known.add((alert.rule, alert.layer))
        if error is not None:
            raise error

    def _due(self) -> list[Alert]:
        now, found = time.monotonic(), list[Alert]()
        ready = [key for key in self._over if now - self._refused.get(key, -math.inf) >= self._pause]
        over = [self._over.pop(key) for key in ready]
        for key, alert in self._firing.items():
            if key not in self._known and now - self._told.get(key, -math.inf) >= self._pause:
                self._told[key] = now
                found.append(alert)
        return over + found

    def title(self, alert: Alert) -> str:
        """One line: which rule of which run fires or has resolved."""
        where = f" in {alert.layer}" if alert.layer else ""
        return f"[gradmon] {self._who()}: {alert.rule}{where} {alert.state} ({alert.severity})"

    def text(self, alert: Alert) -> str:
        """A few lines: what was seen, and what to change."""
        lines = [alert.message]
        if alert.state == "firing" and alert.remedy:
            lines.append(f"Remedy: {alert.remedy}")
        step = "" if alert.step is None else f", step {alert.step}"
        lines.append(f"{self._who()}{step}, on {socket.gethostname()}")
        return "\n".join(lines)

    def fields(self, alert: Alert) -> dict[str, Any]:
        """Everything, as plain types that strict JSON can hold: NaN is None, the infinities are strings."""
        value: float | str | None = alert.value
        if math.isnan(alert.value):
            value = None
        elif math.isinf(alert.value):
            value = str(alert.value)
        return {
            "run": self.run,
            "rank": self.rank,
            "host": socket.gethostname(),
            "time": time.time(),
            **alert._asdict(),
            "value": value,
            "blame": list(alert.blame),
        }

    def _who(self) -> str:
        return f"{self.run} rank {self.rank}" if self.rank else self.run
