"""What is known of a run that is watched from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gradmon._errors import GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks.jsonl import standing
from gradmon_integrations.display.history import History
from gradmon_integrations.display.words import duration

_REMEMBERED = 256
STALLED = "stalled or killed"


class SourceError(GradmonError):
    """There is nothing to be had from a source now; the message says why."""


class Source(Protocol):
    """Where runs are read from."""

    def read(self) -> Sequence[Watched]:
        """All runs, with what is new.

        Raises:
            SourceError: It cannot be read now; a later attempt may succeed.
            ArgumentError: It never will.
        """
        ...


@dataclass
class Watched:
    """One process of a run.

    Attributes:
        run: Its name.
        rank: The process's rank.
        history: The readings of the whole model, and the alerts.
        info: What describes it.
        step: The newest step; None before the first.
        began: When it began, in seconds since 1970, as all times here; None if unknown.
        newest: When it was last heard of.
        succeeded: Whether it came to its end by itself; None where nothing says that it ended.
        ended: When it ended.
        lost: Why its source cannot be read any more; empty while it can.
        resumed: Whether it was started anew since the newest reading.
    """

    run: str
    rank: int
    history: History = field(default_factory=lambda: History(_REMEMBERED))
    info: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    began: float | None = None
    newest: float | None = None
    succeeded: bool | None = None
    ended: float | None = None
    lost: str = ""
    resumed: bool = False
    _since: list[Alert] = field(default_factory=list[Alert])

    @property
    def label(self) -> str:
        """The name, with the rank where it is not 0."""
        return f"{self.run} rank {self.rank}" if self.rank else self.run

    def take(self, readings: Iterable[Reading], alerts: Iterable[Alert] = ()) -> None:
        """Add what is new; a run that was resumed from before its newest step goes on from there."""
        found = list(readings)
        steps = [reading.step for reading in found if reading.step is not None]
        if steps:
            if self.resumed and self.step is not None and min(steps) <= self.step:
                self._rewind(min(steps))
            self.step, self.resumed = max(steps), False
            self._since.clear()
        if found:
            self.history.write(found)
        for alert in alerts:
            self.history.alert(alert)
            if self.resumed:
                self._since.append(alert)

    def renew(self, readings: Iterable[Reading]) -> None:
        """Take what is now said of the newest step, in the place of what was."""
        for reading in readings:
            known = self.history.series.get(reading.name)
            if known and known[-1].step == reading.step:
                known[-1] = reading
            else:
                self.history.write([reading])

    def condition(self, now: float, silence: float) -> tuple[str, bool]:
        """How it is getting on, and whether that is as it should be.

        Args:
            now: The time.
            silence: After how many seconds without a word it counts as stalled.
        """
        if self.succeeded is not None:
            return ("finished", True) if self.succeeded else ("ended by an error", False)
        if self.lost:
            return f"out of reach: {self.lost}", False
        if self.newest is not None and now - self.newest > silence:
            return STALLED, False
        return ("waiting for the first look" if self.step is None else "running"), True

    def state(self, now: float, silence: float) -> tuple[str, bool]:
        """The same, and of a run that is silent for how long; arguments as for `condition`."""
        words, good = self.condition(now, silence)
        if words == STALLED and self.newest is not None:
            words = f"{words}, silent for {duration(now - self.newest)}"
        return words, good

    def _rewind(self, step: int) -> None:
        """Forget what was said of a step and those after it."""
        before, self.history = self.history, History(_REMEMBERED)
        for readings in before.series.values():
            self.history.write([reading for reading in readings if reading.step is None or reading.step < step])
        earlier = before.alerts[: max(0, len(before.alerts) - len(self._since))]
        for alert in [*standing(earlier, step, self._since), *self._since]:
            self.history.alert(alert)
