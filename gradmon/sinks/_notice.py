"""What notifiers share: which alerts are worth a message, and what it says."""

from __future__ import annotations

import math
import socket
import time
from typing import Any

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Severity

_RANK: dict[Severity, int] = {"info": 0, "warning": 1, "critical": 2}


class Notices:
    """Chooses among alerts, and puts them into words.

    A rule that fires again within `pause` seconds of its last message is not told of again; that it resolved is told of
    only where it was told that it fired.

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
        self._told: dict[tuple[str, str | None], float] = {}
        self._firing: set[tuple[str, str | None]] = set()
        self.run, self.rank = "run", 0

    def wanted(self, alert: Alert) -> bool:
        """Whether to send a message; to be asked once for each alert."""
        if _RANK[alert.severity] < self._least:
            return False
        key, now = (alert.rule, alert.layer), time.monotonic()
        if alert.state == "resolved":
            was_told = key in self._firing
            self._firing.discard(key)
            return self._resolved and was_told
        if now - self._told.get(key, -math.inf) < self._pause:
            return False
        self._told[key] = now
        self._firing.add(key)
        return True

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
