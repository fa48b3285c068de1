"""The names of TensorBoard's series: what is before the first slash is the group in which its chart is shown."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradmon_integrations.sinks._catalogue import metric_group, metric_meaning, metric_remedy

LOG10 = "log10_"
LAYER = "layer-"
OVER_LAYERS = "layers"
LATEST = "latest"

# TensorBoard's charts begin with a linear axis, on which these, which vary by decades, are one spike and a flat line.
_BY_DECADES = frozenset({"weight_condition", "step_condition", "input_condition", "noise_scale", "sharpness"})


class Series(NamedTuple):
    """Where the readings of one name, and of one layer, go.

    Attributes:
        tag: The series of the values.
        logarithm: The series of their decimal logarithms, where there is one.
        meaning: What they say, in words.
    """

    tag: str
    logarithm: str | None
    meaning: str


def series(name: str, layer: str | None) -> Series:
    """Where a reading goes.

    Args:
        name: The reading's name.
        layer: Its layer; None for the whole model.

    Returns:
        ``<group>/<name>``, and for some ``<group>/log10_<name>``; ``layer-<name>/<layer>`` for a layer.
    """
    meaning = metric_meaning(name)
    if layer is not None:
        return Series(f"{LAYER}{name}/{layer}", None, f"Of one layer: {meaning}" if meaning else "")
    remedy = metric_remedy(name)
    meaning = f"{meaning} **When it is bad:** {remedy}" if remedy else meaning
    return Series(whole_tag(name), whole_tag(LOG10 + name) if name in _BY_DECADES else None, meaning)


def whole_tag(name: str) -> str:
    """The tag of a reading of the whole model, or, where the name begins with ``log10_``, of its logarithm."""
    return f"{metric_group(name.removeprefix(LOG10))}/{name}"


def log10(value: float) -> float:
    """The decimal logarithm; NaN where there is none, at zero and below, so that the chart shows the missing point."""
    return math.log10(value) if value > 0 else math.nan
