"""A histogram, with the newest observation of each bucket."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import Exemplar, Metric, Sample
from prometheus_client.utils import floatToGoString

from gradmon_integrations.sinks._prometheus_families import Lock, exemplar, filled
from gradmon_integrations.sinks._prometheus_names import RUN, text


@dataclass(slots=True)
class Distribution:
    """What was observed in one run.

    Attributes:
        labels: From label name to value.
        counts: How many observations fell into each bucket.
        exemplars: The newest observation of each bucket.
        total: The sum of the observations.
    """

    labels: dict[str, str]
    counts: list[int]
    exemplars: list[Exemplar | None]
    total: float = 0.0


class Histogram:
    """All histograms of one name: a collector of the client library.

    Args:
        lock: Held while the numbers are read; whoever writes them holds it too.
        name: The name.
        meaning: The help text.
        bounds: The upper bounds of the buckets in ascending order, without infinity.
    """

    def __init__(self, lock: Lock, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self._lock, self._name, self._meaning = lock, name, meaning
        self._bounds = tuple(bounds)
        self._told = tuple(floatToGoString(bound) for bound in (*bounds, math.inf))
        self._runs: dict[tuple[str, str], Distribution] = {}

    def of(self, run: str, rank: str) -> Distribution:
        """The histogram of a run, made when it is first asked for."""
        found = self._runs.get((run, rank))
        if found is None:
            size = len(self._told)
            labels = dict(zip(RUN, (text(run), rank), strict=True))
            found = self._runs[run, rank] = Distribution(labels, [0] * size, [None] * size)
        return found

    def observe(self, run: str, rank: str, value: float, step: int | None) -> None:
        """Take one observation; one that is not finite or negative would spoil the sum for good, and is left out."""
        if not 0 <= value < math.inf:
            return
        to = self.of(run, rank)
        bucket = bisect.bisect_left(self._bounds, value)
        to.counts[bucket] += 1
        to.total += value
        to.exemplars[bucket] = exemplar(step, value) or to.exemplars[bucket]

    def describe(self) -> Iterator[Metric]:
        """The family without its samples."""
        yield filled(self._name, self._meaning, "histogram", ())

    def collect(self) -> Iterator[Metric]:
        """The family with its samples; nothing as long as it has none."""
        with self._lock:
            samples = [sample for run in self._runs.values() for sample in self._samples(run)]
        if samples:
            yield filled(self._name, self._meaning, "histogram", samples)

    def _samples(self, run: Distribution) -> Iterator[Sample]:
        upto = 0
        for bound, count, newest in zip(self._told, run.counts, run.exemplars, strict=True):
            upto += count
            yield Sample(f"{self._name}_bucket", {**run.labels, "le": bound}, upto, None, newest)
        yield Sample(f"{self._name}_count", run.labels, upto)
        yield Sample(f"{self._name}_sum", run.labels, run.total)
