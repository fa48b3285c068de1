"""A run as the page looks at it: its readings by metric and layer, its alerts, and where it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gradmon._reading import Reading
from gradmon.sinks import RunLog
from gradmon_integrations.display.history import History
from gradmon_integrations.display.states import metric_of
from gradmon_integrations.report.episodes import Episode, episodes_of
from gradmon_integrations.report.runs import Source
from gradmon_integrations.report.series import Series

STYLES = 8
"""How many colours and kinds of line there are; more runs begin again."""


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        source: Where it comes from.
        place: Its number on the page, from 0.
    """

    source: Source
    place: int

    @property
    def label(self) -> str:
        """What it is called."""
        return self.source.label

    @property
    def log(self) -> RunLog:
        """What its file holds."""
        return self.source.log

    @property
    def style(self) -> str:
        """The class of its colour."""
        return f"r{self.place % STYLES}"

    @cached_property
    def history(self) -> History:
        """What the verdict looks at."""
        history = History()
        history.write(self.log.readings)
        for alert in self.log.alerts:
            history.alert(alert)
        return history

    @cached_property
    def series(self) -> dict[str, Series]:
        """The whole model's metrics, by name, in the order in which they came."""
        return {name: Series.of(readings) for name, readings in self.history.series.items()}

    @cached_property
    def layers(self) -> dict[str, dict[str, Series]]:
        """The layers' metrics: for each name one series a layer, in the order in which they came."""
        found: dict[str, dict[str, list[Reading]]] = {}
        for reading in self.log.readings:
            if reading.layer is not None:
                found.setdefault(reading.name, {}).setdefault(reading.layer, []).append(reading)
        return {name: {layer: Series.of(readings) for layer, readings in held.items()} for name, held in found.items()}

    @cached_property
    def episodes(self) -> list[Episode]:
        """Its alerts."""
        return episodes_of(self.log.alerts)

    @cached_property
    def steps(self) -> list[int]:
        """The steps at which there are readings of the whole model, in order."""
        return sorted({point.step for series in self.series.values() for point in series.points})

    @cached_property
    def ends(self) -> tuple[int, int]:
        """Its first and last step; (0, 1) where it has none."""
        layered = [series for held in self.layers.values() for series in held.values()]
        every = [*self.series.values(), *layered]
        points = [point for series in every for point in (series.points[0], series.points[-1])]
        found = [point.step for point in points]
        found.extend(alert.step for alert in self.log.alerts if alert.step is not None)
        return (min(found), max(found)) if found else (0, 1)

    def episodes_about(self, metric: str) -> list[Episode]:
        """The alerts on a metric."""
        return [episode for episode in self.episodes if metric_of(episode.alert.rule) == metric]


def span_of(runs: Sequence[RunData]) -> tuple[int, int]:
    """The first and the last step of all runs: the horizontal axis that all drawings share."""
    # A run without readings has no part in it.
    ends = [run.ends for run in runs if run.log.readings or run.log.alerts] or [(0, 1)]
    return min(first for first, _ in ends), max(last for _, last in ends)
