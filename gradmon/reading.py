"""From evidence to readings, of which none ever fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Step
from gradmon._reading import Reading
from gradmon._snapshot import RandomState
from gradmon.measure import readings_from
from gradmon.metrics import Metric
from gradmon.publishing import Failures


@dataclass(frozen=True)
class Pending:
    """A probed step whose comparison with the next batch is still to come."""

    number: int
    step: Step
    before: list[Tensor]
    after: list[Tensor]
    waiting: list[tuple[Metric, list[Any]]]
    random: RandomState | None


class Reader:
    """Makes readings of metrics; where one is not available or fails, NaN with the reason.

    Args:
        failures: Where failures are noted.
        layers: Whether to add readings for each layer.
    """

    def __init__(self, failures: Failures, layers: bool) -> None:
        self._failures, self._layers = failures, layers

    def safely(
        self, where: str, look: Callable[[], list[Reading]], metrics: Sequence[Metric], step: int
    ) -> list[Reading]:
        """The readings of some metrics; where the look fails as a whole, NaN with the error for each."""
        try:
            return look()
        except Exception as error:
            self._failures.note(where, error)
            reason = f"{type(error).__name__}: {error}"
            return [Reading(metric.name, math.nan, step, reason=reason) for metric in metrics]

    def read(
        self, metric: Metric, gather: Callable[[], list[Any]], step: int, *, only_gather: bool = False
    ) -> list[Reading]:
        """The readings of one metric; with `only_gather` none, unless its evidence cannot be had."""
        try:
            evidence = gather()
            return [] if only_gather else readings_from(metric, evidence, layers=self._layers, step=step)
        except Unavailable as missing:
            return [Reading(metric.name, math.nan, step, reason=missing.reason)]
        except Exception as error:
            self._failures.note(f"metric {metric.name}", error)
            return [Reading(metric.name, math.nan, step, reason=f"{type(error).__name__}: {error}")]
