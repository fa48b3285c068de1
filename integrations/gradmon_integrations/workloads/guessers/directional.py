"""Directional descent: a random direction of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, check_kind


@dataclass(frozen=True)
class DirectionalDescent:
    """``g^ = (v . g) v`` with independent entries of v (arXiv 2312.04709, section 2; arXiv 2202.08587).

    With entries of variance 1, ``E[v v^T] = I`` and the estimate is unbiased. The paper draws them with the standard
    deviation ``1 / sqrt(N)`` over N weights, so that v has about length 1: then ``E[g^] = g / N``. With one guess, the
    mean of its absolute cosine to the gradient is ``sqrt(2 / (pi N))``.

    Args:
        std: ``"unbiased"`` for 1, ``"paper"`` for ``1 / sqrt(N)``.
        noise: ``"normal"`` or ``"uniform"``.

    Raises:
        ArgumentError: An argument is neither.
    """

    std: Literal["unbiased", "paper"] = "unbiased"
    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)
        if self.std not in ("unbiased", "paper"):
            raise ArgumentError("std", 'be "unbiased" or "paper"', repr(self.std))

    def direction(
        self, parameters: Mapping[str, Tensor], truth: Callable[[], Mapping[str, Tensor]], noise: Noise
    ) -> tuple[dict[str, Tensor], float]:
        """Independent entries of one variance."""
        total = sum(parameter.numel() for parameter in parameters.values())
        scale = 1.0 if self.std == "unbiased" else 1 / math.sqrt(total)
        return {name: noise.draw(p.shape, p, self.noise) * scale for name, p in parameters.items()}, 1.0
