"""A guess of known cosine and no bias: what a guess is worth apart from its bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon._tensors import wide
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, check_kind


@dataclass(frozen=True)
class CosineMatched:
    """A unit vector whose cosine to the true gradient is exactly c, in an otherwise random direction.

    ``v = c u + sqrt(1 - c^2) r`` with u the direction of the gradient g and r a random unit vector orthogonal to it;
    ``g^ = (v . g) v / c^2``, whose mean is g: unbiased. To know u it is told the true gradient, by backpropagation: it
    is an oracle to compare with, not a way to train without one. Where g is zero, so is the estimate.
    Nothing is orthogonal to a g of one number: there the estimate is g.

    Args:
        cosine: c, in (0, 1].
        noise: What r is drawn from.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    cosine: float
    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)
        if not 0 < self.cosine <= 1:
            raise ArgumentError("cosine", "be in (0, 1]", self.cosine)

    def direction(
        self, parameters: Mapping[str, Tensor], truth: Callable[[], Mapping[str, Tensor]], noise: Noise
    ) -> tuple[dict[str, Tensor], float]:
        """The unit vector, and ``1 / c^2``."""
        gradient = truth()
        drawn = {name: noise.draw(parameter.shape, parameter, self.noise) for name, parameter in parameters.items()}
        square = _dot(gradient, gradient, parameters)
        if square == 0:
            return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}, 1.0
        along = _dot(gradient, drawn, parameters) / square
        rest = {name: drawn[name] - along * gradient[name] for name in parameters}
        length = math.sqrt(_dot(rest, rest, parameters))
        rounding = max(torch.finfo(part.dtype).eps for part in drawn.values())
        beside = length > 100 * rounding * math.sqrt(_dot(drawn, drawn, parameters))
        across = math.sqrt(1 - self.cosine**2) / length if beside else 0.0
        inside = self.cosine / math.sqrt(square)
        return {name: inside * gradient[name] + across * rest[name] for name in parameters}, self.cosine**-2


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> float:
    return sum(float((wide(a[name]) * wide(b[name])).sum()) for name in names)
