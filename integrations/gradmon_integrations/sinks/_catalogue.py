"""What the core says about its metrics, for titles and help texts."""

from __future__ import annotations


def metric_group(name: str) -> str:
    """The group of a metric, such as ``step-consistency``; ``gradmon`` for names that the core does not know."""
    return str(getattr(_metric(name), "group", "gradmon"))


def metric_meaning(name: str) -> str:
    """What a metric says, in words; empty where nothing is known."""
    return str(getattr(_metric(name), "meaning", "")).strip()


def _metric(name: str) -> object:
    # Imported late: a process that only forwards readings has no use for the metrics' own imports.
    from gradmon.metrics import METRICS

    return METRICS.get(name)
