"""What a sink does with what it is told of its run: it sets the run's series."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._prometheus_families import Series, exemplar
from gradmon_integrations.sinks._prometheus_layers import Layers
from gradmon_integrations.sinks._prometheus_names import OTHER
from gradmon_integrations.sinks._prometheus_registry import CUMULATIVE, Registry

_UNNAMED = "default"


class Run:
    """The series of one run and one rank. All methods may be called from any thread.

    Args:
        registry: The families, which other runs may share.
        run: The label; None means the name that `bind` gives.
        rank: The label; like `run` it is that of `bind` unless `run` is given.
        layers: How many layers of a metric have a series of their own.

    Attributes:
        begun: Whether there is anything to be seen.
    """

    def __init__(self, registry: Registry, run: str | None, rank: int, layers: int) -> None:
        self._registry = registry
        self._fixed = run is not None
        self._labels = (run or _UNNAMED, str(rank))
        self._most = layers
        self._forget()

    @property
    def labels(self) -> tuple[str, str]:
        """The run and the rank."""
        return self._labels

    def bind(self, run: str, rank: int) -> None:
        """Take over these labels, unless `run` was given, and begin: the run is on, and its counters exist.

        A run that goes on under the same name keeps its counters, its alerts and its layers.
        """
        with self._registry.lock:
            if not self._fixed and self._labels != (run, str(rank)):
                self._labels = (run, str(rank))
                self._forget()
            self._begin()

    def describe(self, info: Mapping[str, object]) -> None:
        """Say what the run is."""
        with self._registry.lock:
            self._registry.info.set(*self._labels, info)

    def write(self, readings: Sequence[Reading]) -> None:
        """Set one series a reading."""
        known, labels = self._registry, self._labels
        with known.lock:
            if not self.begun:
                self._begin()
            crowded = {name for reading in readings if (name := self._set(reading)) is not None}
            for name in crowded:
                self._own(name, OTHER).value = self._layers[name].rest()
            known.last_probe.series(*labels).value = time.time()
            known.alerts_firing.series(*labels).value = len(self._firing)
            steps = [reading.step for reading in readings if reading.step is not None]
            total = known.readings_total.series(*labels)
            total.value += len(readings)
            if steps:
                known.last_step.series(*labels).value = max(steps)
                total.exemplar = exemplar(max(steps), len(readings))

    def alert(self, alert: Alert) -> None:
        """Count the alert."""
        known, labels = self._registry, self._labels
        with known.lock:
            if not self.begun:
                self._begin()
            key = (alert.rule, alert.layer)
            if alert.state == "firing":
                known.alerts_total.series(*labels).value += key not in self._firing
                self._firing.add(key)
            else:
                self._firing.discard(key)
            known.alerts_firing.series(*labels).value = len(self._firing)
            firing = sum(rule == alert.rule for rule, _ in self._firing)
            known.alert(alert.rule).series(*labels).value = firing

    def finish(self, succeeded: bool) -> None:
        """Say how the run ended."""
        with self._registry.lock:
            self._registry.finished.series(*self._labels).value = float(succeeded)

    def _begin(self) -> None:
        known, labels = self._registry, self._labels
        known.started.series(*labels).value = time.time()
        known.finished.series(*labels).value = 0.0
        # Prometheus sees the first increase of a counter only where it has seen it at zero.
        for family in (known.alerts_total, known.readings_total, known.dropped_total, *known.cumulative.values()):
            family.series(*labels)
        known.probe_duration.of(*labels)
        known.alerts_firing.series(*labels).value = len(self._firing)
        self.begun = True

    def _forget(self) -> None:
        self.begun = False
        self._shown: dict[tuple[str, str | None], Series] = {}
        self._layers: dict[str, Layers] = {}
        self._firing: set[tuple[str, str | None]] = set()

    def _set(self, reading: Reading) -> str | None:
        """Set the series of a reading; where it is one of the rest of the layers, the metric's name."""
        name, layer, value = reading.name, reading.layer, float(reading.value)
        shown = self._shown.get((name, layer))
        if shown is not None and layer != OTHER:
            shown.value = value
        elif layer is not None:
            return self._set_layer(name, layer, value)
        elif name == "probe_seconds":
            self._registry.probe_duration.observe(*self._labels, value, reading.step)
        elif name in CUMULATIVE:
            # Not a number says nothing about a count.
            if value >= 0:
                self._registry.cumulative[name].series(*self._labels).value = value
        else:
            self._own(name, None).value = value
        return None

    def _set_layer(self, name: str, layer: str, value: float) -> str | None:
        layers = self._layers.setdefault(name, Layers(name, self._most))
        if layers.admits(layer):
            self._own(name, layer).value = value
            return None
        self._registry.dropped_total.series(*self._labels).value += layers.put_aside(layer, value)
        return name

    def _own(self, name: str, layer: str | None) -> Series:
        series = self._shown.get((name, layer))
        if series is None:
            labels = self._labels if layer is None else (*self._labels, layer)
            family = self._registry.reading(name, layered=layer is not None)
            series = self._shown[name, layer] = family.series(*labels)
        return series


def check(run: str | None, rank: int, layers: int) -> None:
    """See that a run can be shown with these arguments.

    Raises:
        ArgumentError: `run` is empty, `rank` negative, or `layers` not a number of layers.
    """
    if run is not None and not run:
        raise ArgumentError("run", "be a name or None", repr(run))
    if rank < 0:
        raise ArgumentError("rank", "not be negative", rank)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
        raise ArgumentError("layers", "be a whole number that is not negative", repr(layers))
