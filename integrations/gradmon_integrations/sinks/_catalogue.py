"""What the core says about its readings, for titles and help texts."""

from __future__ import annotations

_OF_THE_RUN = frozenset({"learning_rate", "batch_size"})


def metric_group(name: str) -> str:
    """Where a reading belongs.

    Args:
        name: The reading's name.

    Returns:
        The metric's group, such as ``step-consistency``; ``health`` or ``monitor`` for what a monitor says beside the
        metrics; ``gradmon`` for names that the core does not know.
    """
    if name in _own():
        return "health" if name in _OF_THE_RUN else "monitor"
    return str(getattr(_metric(name), "group", "gradmon"))


def metric_meaning(name: str) -> str:
    """What a reading says, in words; empty where nothing is known."""
    from gradmon.preflight.page import MEANINGS

    return str(getattr(_metric(name), "meaning", "")).strip() or _own().get(name) or MEANINGS.get(name, "")


def metric_remedy(name: str) -> str:
    """What to do when a metric is bad; empty where nothing is known."""
    return str(getattr(_metric(name), "remedy", "")).strip()


def _metric(name: str) -> object:
    # Imported late: a process that only forwards readings has no use for the metrics' own imports.
    from gradmon.metrics import METRICS

    return METRICS.get(name)


def _own() -> dict[str, str]:
    from gradmon.metrics import OWN

    return OWN
