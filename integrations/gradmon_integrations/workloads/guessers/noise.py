"""Noise of mean 0 and variance 1 that can be drawn a second time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from gradmon._errors import ArgumentError

Kind = Literal["normal", "uniform"]
"""Normal, or uniform in ``[-sqrt(3), sqrt(3)]``: both have mean 0 and variance 1."""


class Noise(Protocol):
    """Where guessers draw from."""

    def draw(self, shape: Sequence[int], like: Tensor, kind: Kind) -> Tensor:
        """Independent entries of mean 0 and variance 1, with the type and device of another tensor."""
        ...


class Seeded:
    """Noise from a seed: the same seed draws the same numbers again.

    Args:
        seed: From 0 to 2^32 - 1, which is what torch's generator on the CPU tells apart.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def draw(self, shape: Sequence[int], like: Tensor, kind: Kind) -> Tensor:
        """The next numbers."""
        generator = self._generators.get(like.device)
        if generator is None:
            generator = torch.Generator(like.device).manual_seed(self._seed)
            self._generators[like.device] = generator
        if kind == "normal":
            return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)
        found = torch.rand(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)
        return found.sub_(0.5).mul_(2 * math.sqrt(3))


def check_kind(kind: str) -> None:
    """Accept a kind of noise.

    Raises:
        ArgumentError: It is none.
    """
    if kind not in ("normal", "uniform"):
        raise ArgumentError("noise", 'be "normal" or "uniform"', repr(kind))
