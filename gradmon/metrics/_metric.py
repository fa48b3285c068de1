"""What a metric is: a pure function of evidence, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Better = Literal["low", "high", "middle", "none"]
Group = Literal["step-consistency", "batch-dissonance", "variance-sources", "health"]


class Value(NamedTuple):
    """What a metric found.

    Attributes:
        value: The number.
        scale: The relative radius of a finite difference.
        resolution: The estimated relative rounding error; a value with more than 0.5 is not shown.
        reason: Why the value is infinite, if it is.
    """

    value: float
    scale: float | None = None
    resolution: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number about a model's gradient.

    Attributes:
        name: Lower-case words joined by underscores.
        needs: The types of evidence that `compute` takes, in this order.
        compute: From evidence to a `Value`, or a plain float; raises `Unavailable` where there is no number.
        better: Which end of the range is good.
        source: Where the definition comes from.
        group: Which question it helps to answer.
        meaning: What it says, in one sentence.
        remedy: What to do when it is bad.
        layers: From the same evidence to one number per layer: a norm or ratio of that layer, or, for condition
            numbers, ratios and shares, the layer's part (0 to 1) of the squared numerator.
        on_demand: Whether it is computed only when it is asked for by name.
        costly: Whether it takes many passes, so that a monitor computes it only when it is asked for by name.
    """

    name: str
    needs: tuple[type, ...]
    compute: Callable[..., Value | float]
    better: Better
    source: str
    group: Group | str = "gradmon"
    meaning: str = ""
    remedy: str = ""
    layers: Callable[[Any], Mapping[str, float]] | None = None
    on_demand: bool = False
    costly: bool = False
