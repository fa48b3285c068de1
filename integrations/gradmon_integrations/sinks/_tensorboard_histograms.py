"""How the readings of a model's layers are distributed, now and then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gradmon._reading import Reading
from gradmon_integrations.sinks._tensorboard_tags import OVER_LAYERS

_FEWEST = 4
_BINS = 30  # as many as TensorBoard draws
_LARGEST = 3.4e38  # of what TensorBoard holds its bins in; NaN is not below it either


class LayerHistograms:
    """Histograms over layers, at most one a metric in so many writes."""

    def __init__(self, every: int) -> None:
        """Choose how often.

        Args:
            every: In how many writes a metric may have one histogram.
        """
        self._every = every
        self._writes = 0
        self._last: dict[str, int] = {}

    def due(self, readings: Iterable[Reading]) -> dict[tuple[str, int | None], list[float]]:
        """What is due in one write.

        Args:
            readings: All of the write.

        Returns:
            The finite values over the layers, by metric and step.
        """
        self._writes += 1
        values: defaultdict[tuple[str, int | None], list[float]] = defaultdict(list)
        for reading in readings:
            if reading.layer is not None and abs(reading.value) <= _LARGEST:
                values[reading.name, reading.step].append(reading.value)
        found = {
            key: layers
            for key, layers in values.items()
            if len(layers) >= _FEWEST and self._writes - self._last.get(key[0], -self._every) >= self._every
        }
        self._last.update({name: self._writes for name, _ in found})
        return found


def histogram(name: str, values: list[float]) -> Any:
    """The value of an event that shows one."""
    import numpy as np
    from torch.utils.tensorboard import summary

    array = np.array(values)
    low, high = array.min(), array.max()
    # Between numbers that rounding alone tells apart, there is no room for bins.
    bins = min(_BINS, len(values)) if high - low > 1e-6 * max(abs(low), abs(high)) else 1
    return summary.histogram(f"{OVER_LAYERS}/{name}", array, bins=bins).value[0]
