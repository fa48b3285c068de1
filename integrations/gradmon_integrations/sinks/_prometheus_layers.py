"""Which layers have a series of their own, and one number for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from gradmon_integrations.sinks._prometheus_names import OTHER

_SHARES = frozenset({"weight_condition", "step_condition", "step_ratio", "step_share", "batch_share"})
"""Metrics of which each layer has a part; all layers together make 1."""


class Layers:
    """The layers of one metric in one run: the first few have names, the rest is one.

    Args:
        name: The metric.
        most: How many layers have a series of their own.
    """

    def __init__(self, name: str, most: int) -> None:
        self._together = _way(name)[1]
        self._most = most
        self._named: set[str] = set()
        self._rest: dict[str, float] = {}

    def admits(self, layer: str) -> bool:
        """Whether a layer has a series of its own; one that is called like the rest never has."""
        if layer not in self._named and layer != OTHER and layer not in self._rest and len(self._named) < self._most:
            self._named.add(layer)
        return layer in self._named

    def put_aside(self, layer: str, value: float) -> bool:
        """Keep the newest value of a layer without a series of its own; tell whether the layer is new among those."""
        new = layer not in self._rest
        self._rest[layer] = value
        return new and layer != OTHER

    def rest(self) -> float:
        """All layers without a series of their own in one number; NaN where there is no sensible one."""
        values = self._rest.values()
        if len(values) == 1:
            return next(iter(values))
        return math.nan if any(map(math.isnan, values)) else self._together(values)


def layered_meaning(name: str, meaning: str) -> str:
    """The help text of a metric's layers.

    Args:
        name: The metric.
        meaning: What it says of the whole model.

    Returns:
        The same for a layer, and what the number for the rest of the layers is.
    """
    one = "one layer's part" if name in _SHARES else "one layer"
    return f'{meaning} ({one}; layer="{OTHER}": {_way(name)[0]})'


def _way(name: str) -> tuple[str, Callable[[Collection[float]], float]]:
    """One number for several layers: what it is, and how it is made."""
    if name.endswith("_norm"):
        return "the root of the sum of squares over the rest", lambda values: math.hypot(*values)
    if name in _SHARES:
        return "the sum over the rest", sum
    if name == "update_ratio":
        return "the largest of the rest", max
    return "NaN, for there is no one number for the rest", lambda _: math.nan
