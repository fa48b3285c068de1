"""Families of series. They keep their numbers themselves, and make samples of them when Prometheus asks.

The client library's own ``Gauge`` and its like are not used: they add ``_created`` series unless a setting of the whole
process says otherwise, and where ``PROMETHEUS_MULTIPROC_DIR`` is set they write into the program's own export.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Exemplar, Metric, Sample

from gradmon_integrations.sinks._prometheus_names import RUN, text

Lock = AbstractContextManager[object]


@dataclass(slots=True)
class Series:
    """One number and its labels.

    Attributes:
        labels: From label name to value.
        value: The number.
        exemplar: Where the newest increase of the number came from; of counters only.
    """

    labels: dict[str, str]
    value: float = 0.0
    exemplar: Exemplar | None = None


class Family:
    """All gauges or counters of one name: a collector of the client library.

    Args:
        lock: Held while the series are read; whoever writes to them holds it too.
        kind: ``gauge`` or ``counter``.
        name: The name; that of a counter without ``_total``.
        meaning: The help text.
        labels: The names of the labels.
    """

    def __init__(
        self,
        lock: Lock,
        kind: Literal["gauge", "counter"],
        name: str,
        meaning: str,
        labels: Sequence[str] = RUN,
    ) -> None:
        self._lock = lock
        self._kind, self._name, self._meaning, self._labels = kind, name, text(meaning), tuple(labels)
        self._sample = f"{name}_total" if kind == "counter" else name
        self._series: dict[tuple[str, ...], Series] = {}

    def series(self, *values: str) -> Series:
        """The series of these labels, made when it is first asked for."""
        series = self._series.get(values)
        if series is None:
            labels = dict(zip(self._labels, map(text, values), strict=True))
            series = self._series[values] = Series(labels)
        return series

    def describe(self) -> Iterator[Metric]:
        """The family without its samples."""
        yield filled(self._name, self._meaning, self._kind, ())

    def collect(self) -> Iterator[Metric]:
        """The family with its samples; nothing as long as it has none."""
        with self._lock:
            samples = [Sample(self._sample, s.labels, s.value, None, s.exemplar) for s in self._series.values()]
        if samples:
            yield filled(self._name, self._meaning, self._kind, samples)


def filled(name: str, meaning: str, kind: str, samples: Iterable[Sample]) -> Metric:
    """A family as the client library shows it; its unit is the last word of its name."""
    metric = Metric(name, meaning, kind, "seconds" if name.endswith("_seconds") else "")
    metric.samples = list(samples)
    return metric


def exemplar(step: int | None, value: float) -> Exemplar | None:
    """Where an increase by `value` came from; None where it has no step."""
    return None if step is None else Exemplar({"step": str(step)}, value, time.time())
