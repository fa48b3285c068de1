"""Functions that work entry by entry, once they have been called: what goes through them, forward or backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradmon_integrations.workloads.guessers.tape import STEPS, value_and_slope


@dataclass(frozen=True)
class Pull:
    """A function that works entry by entry, at what it was called with.

    Attributes:
        value: What a function of `STEPS` made: it tells the slopes, and is kept as a layer's input anyway.
        slopes: Those of another function.
    """

    value: Tensor | None
    slopes: Tensor | None

    def along(self, y: Tensor) -> Tensor:
        """What y becomes."""
        if self.value is not None:
            return torch.ops.aten.threshold_backward(y, self.value, 0)
        assert self.slopes is not None
        return y * self.slopes

    def slope(self) -> Tensor:
        """The slopes."""
        return self.value.sign() if self.value is not None else cast("Tensor", self.slopes)


def applied(function: Any, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Pull]:
    """What a function makes of x, and how it goes on from there."""
    if function in STEPS:
        value = function(x, *args, **kwargs).detach()
        return value, Pull(value, None)
    value, slopes = value_and_slope(function, x, args, kwargs)
    return value.detach(), Pull(None, slopes)


def through(y: Tensor, pulls: Iterable[Pull]) -> Tensor:
    """What y becomes by one after the other."""
    for pull in pulls:
        y = pull.along(y)
    return y


def slope_of(pulls: Iterable[Pull]) -> Tensor | None:
    """The product of their slopes; None where there are none."""
    slope = None
    for pull in pulls:
        slope = pull.slope() if slope is None else pull.along(slope)
    return slope
