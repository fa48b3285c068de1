"""The readings that are no metrics: what was around a step, and what went wrong in the monitor itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradmon._batches import example_count
from gradmon._errors import GradmonError
from gradmon._reading import Reading
from gradmon._types import Batch
from gradmon.metrics import Metric
from gradmon.publishing import Failures, Publisher
from gradmon.reading import Pending


def circumstances(step: int, rates: Sequence[float], batch: Batch, dim: int) -> list[Reading]:
    """Learning rate and batch size; they come first, so that remedies can name them.

    Args:
        step: The number of the step.
        rates: The learning rates of its parameter groups.
        batch: Its batch.
        dim: The dimension that holds the examples.
    """
    readings = [Reading("learning_rate", max(rates), step)] if rates else []
    try:
        readings.append(Reading("batch_size", float(example_count(batch, dim)), step))
    except GradmonError as error:
        readings.append(Reading("batch_size", math.nan, step, reason=str(error)))
    return readings


def troubles(step: int, failures: Failures, publisher: Publisher) -> list[Reading]:
    """What went wrong so far in the monitor itself."""
    counts = {
        "monitor_failures": sum(dict(failures).values()),
        "sink_errors": publisher.sink_errors,
        "sink_dropped": publisher.sink_dropped,
    }
    return [Reading(name, float(count), step) for name, count in counts.items()]


def missing(due: Sequence[Metric], step: int, pending: Pending | None, reason: str) -> list[Reading]:
    """What was due at a step, and what waited for it, where there is no number."""
    waiting = [] if pending is None else [(metric.name, pending.number) for metric, _ in pending.waiting]
    found = [*waiting, *((metric.name, step) for metric in due)]
    return [Reading(name, math.nan, number, reason=reason) for name, number in found]
