"""Alerts and runs as Markdown, for TensorBoard's text tab."""

from __future__ import annotations

import html
import re
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from gradmon._reading import Alert

_LINES = 100
"""How many alerts the table shows; TensorBoard keeps some ten copies of it in memory."""

_WIDTH = 30


class AlertLog:
    """All alerts so far, as one table.

    Attributes:
        fired: How many began to fire.
    """

    def __init__(self) -> None:
        self._alerts: deque[Alert] = deque(maxlen=_LINES)
        self._firing: dict[tuple[str, str | None], Alert] = {}
        self._count = 0
        self.fired = 0

    def add(self, alert: Alert) -> None:
        """Take one more."""
        self._alerts.appendleft(alert)
        self._count += 1
        self._firing.pop((alert.rule, alert.layer), None)
        if alert.state == "firing":
            self._firing[(alert.rule, alert.layer)] = alert
            self.fired += 1

    def markdown(self) -> str:
        """What fires now, and the table, the newest alert first."""
        names = ", ".join(f"`{alert.rule}`{_where(alert)}" for alert in self._firing.values())
        lines = [f"**Firing now:** {names}" if names else "Nothing fires now.", ""]
        header = ("step", "state", "severity", "rule", "value", "message", "remedy", "layers")
        lines += _table(header, (_row(alert) for alert in self._alerts))
        if self._count > len(self._alerts):
            lines += ["", f"{self._count - len(self._alerts)} older ones are left out."]
        return "\n".join(lines)


def alert_markdown(alert: Alert) -> str:
    """One alert, in a few lines."""
    lines = [f"**{alert.state}** ({alert.severity}){_where(alert)}, value {alert.value:.4g}", _escaped(alert.message)]
    if alert.remedy:
        lines.append(f"**Remedy:** {_escaped(alert.remedy)}")
    if alert.blame:
        lines.append(f"**Layers to blame:** {_layers(alert)}")
    return "\n\n".join(lines)


def run_markdown(run: str | None, info: Mapping[str, str | int | float | bool]) -> str:
    """What a run is, as a table."""
    head = [f"Run `{_code(run)}`", ""] if run else []
    return "\n".join(head + _table(("what", "value"), ((key, _escaped(str(value))) for key, value in info.items())))


def _row(alert: Alert) -> tuple[str, ...]:
    state = f"**{alert.state}**" if alert.state == "firing" else alert.state
    step = "" if alert.step is None else str(alert.step)
    rule, message, remedy = f"`{_code(alert.rule)}`", _wrapped(alert.message), _wrapped(alert.remedy)
    return (step, state, alert.severity, rule, f"{alert.value:.4g}", message, remedy, _layers(alert))


def _layers(alert: Alert) -> str:
    names = alert.blame or ((alert.layer,) if alert.layer else ())
    return ", ".join(f"`{_code(name)}`" for name in names)


def _where(alert: Alert) -> str:
    return f" in `{_code(alert.layer)}`" if alert.layer else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _code(text: str) -> str:
    """Text that cannot end the code span, or the cell, that it is in."""
    return " ".join(text.replace("`", "'").replace("|", "¦").split())


def _wrapped(text: str) -> str:
    """Text in short lines: beside a cell with a long one, TensorBoard breaks the words of the others."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), _escaped(text))
    return "<br>".join(textwrap.wrap(whole, _WIDTH, break_long_words=False)).replace("\0", " ")


def _escaped(text: str) -> str:
    """Text that is neither HTML nor the end of a cell; code spans stay."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
