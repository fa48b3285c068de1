"""Names and texts that Prometheus accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "gradmon_"
RUN: tuple[str, ...] = ("run", "rank")
OTHER = "other"
"""The layer under which those without a series of their own are shown together."""

# A scrape adds job and instance itself, and renames an exporter's own; the others mean something else.
_RESERVED = frozenset({*RUN, "job", "instance", "layer", "le", "quantile"})


def metric_name(name: str) -> str:
    """The name under which a reading is shown."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def label_names(keys: Iterable[str]) -> dict[str, str]:
    """A label for each key, no two alike; names with a meaning of their own get a trailing underscore.

    Args:
        keys: Free texts.

    Returns:
        From key to label name, in the order of the keys.

    Example:
        >>> label_names(["job", "1st", "lr.max", "lr-max", "__name__"])
        {'job': 'job_', '1st': '_1st', 'lr.max': 'lr_max', 'lr-max': 'lr_max_', '__name__': '_name__'}
    """
    labels: dict[str, str] = {}
    taken = set(_RESERVED)
    for key in keys:
        label = re.sub(r"[^a-zA-Z0-9_]", "_", key)
        # Labels that begin with two underscores belong to Prometheus, which drops them.
        label = re.sub(r"^(?:_+|(?=\d)|$)", "_", label)
        while label in taken:
            label += "_"
        taken.add(label)
        labels[key] = label
    return labels


def text(value: object) -> str:
    """A value as a label's value; what UTF-8 cannot say, such as parts of odd file names, becomes a question mark."""
    said = str(value).lower() if isinstance(value, bool) else str(value)
    return said.encode("utf-8", "replace").decode("utf-8")
