"""When each alert fired, and until when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gradmon._reading import Alert, Severity

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
"""The most severe first."""


@dataclass(frozen=True)
class Episode:
    """An alert from the step at which it fired to that at which it was resolved.

    Attributes:
        alert: The firing one; one whose beginning the file does not hold is known by its end alone.
        start: The step at which it fired; None where the file does not hold it.
        end: The step at which it was resolved; None where it still fired when the file ended.
        over: Whether it was resolved.
    """

    alert: Alert
    start: int | None
    end: int | None = None
    over: bool = False

    def drawn(self, first: int, last: int) -> tuple[int, int]:
        """From where to where it is drawn, in a run whose first and last step are these."""
        return (
            first if self.start is None else self.start,
            last if not self.over or self.end is None else self.end,
        )

    @property
    def steps(self) -> str:
        """From when to when, in words."""
        begin = "before the file begins" if self.start is None else f"step {self.start}"
        if not self.over:
            return f"{begin} to the end"
        return f"{begin} to {'an unknown step' if self.end is None else self.end}"


@dataclass(frozen=True)
class Fired:
    """All episodes of one rule.

    Attributes:
        rule: Its name.
        severity: The highest one that it had.
        episodes: In the order in which they began; never empty.
    """

    rule: str
    severity: Severity
    episodes: tuple[Episode, ...]

    @property
    def firing(self) -> bool:
        """Whether it still fired when the file ended."""
        return any(not episode.over for episode in self.episodes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that it spoke of or blamed, those named most often first."""
        counts: dict[str, int] = {}
        for episode in self.episodes:
            alert = episode.alert
            named = {*alert.blame} if alert.layer is None else {alert.layer, *alert.blame}
            for layer in sorted(named):
                counts[layer] = counts.get(layer, 0) + 1
        return tuple(sorted(counts, key=lambda layer: -counts[layer]))


def episodes_of(alerts: Iterable[Alert]) -> list[Episode]:
    """Pair what fired with what was resolved, for each rule and layer on its own.

    Args:
        alerts: In the order in which they came.

    Returns:
        The episodes, in the order in which they began. An alert that fires again while it fires goes on: that happens
        where a run was resumed.
    """
    found: list[Episode] = []
    opened: dict[tuple[str, str | None], int] = {}
    for alert in alerts:
        key = (alert.rule, alert.layer)
        if alert.state == "firing":
            if key not in opened:
                opened[key] = len(found)
                found.append(Episode(alert, alert.step))
        elif key in opened:
            place = opened.pop(key)
            found[place] = replace(found[place], end=alert.step, over=True)
        else:
            found.append(Episode(alert, None, alert.step, over=True))
    return found


def by_rule(episodes: Iterable[Episode]) -> list[Fired]:
    """The episodes of each rule, the most severe rules first."""
    rules: dict[str, list[Episode]] = {}
    for episode in episodes:
        rules.setdefault(episode.alert.rule, []).append(episode)
    fired = [
        Fired(rule, min((one.alert.severity for one in held), key=_rank), tuple(held)) for rule, held in rules.items()
    ]
    return sorted(fired, key=lambda one: _rank(one.severity))


def _rank(severity: str) -> int:
    # A file of a newer version may know a severity that is not known here.
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
