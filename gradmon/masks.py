"""Random masks over the coordinates of the gradient: a fixed few of every tensor, for a whole run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError
from gradmon._parameters import trainable


class Mask:
    """``ceil(fraction * numel)`` coordinates of every trainable tensor, without replacement (Nelson 2022, 1.6).

    Every tensor draws from its own stream, seeded by `seed` and the tensor's name: freezing one layer leaves the
    coordinates of the others as they were.

    Args:
        fraction: The part of each tensor to look at, in (0, 1].
        seed: The seed of the draw.

    Raises:
        ArgumentError: `mask` or `seed` is out of range.

    Example:
        >>> from torch import nn
        >>> Mask(0.1).sample(nn.Linear(30, 10)).shape
        torch.Size([31])
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("mask", "be in (0, 1]", fraction)
        check_seed(seed)
        self.fraction = float(fraction)
        self.seed = seed
        self._picks: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Mask({self.fraction}, seed={self.seed})"

    def count(self, numel: int) -> int:
        """``ceil`` of the exact decimal product: 0.1 of 30 is 3, although ``0.1 * 30 > 3`` in floating point."""
        return math.ceil(Fraction(repr(self.fraction)) * numel)

    def picks(self, model: nn.Module) -> dict[str, Tensor]:
        """The coordinates by tensor, each (k_t,), int64, sorted; drawn on first use and kept from then on.

        Raises:
            ArgumentError: A restored mask does not fit the model.
        """
        chosen: dict[str, Tensor] = {}
        for name, parameter in trainable(model).items():
            numel = parameter.numel()
            if name not in self._picks:
                # A generator on the CPU takes 32 bits, so that seed and name have to be mixed into these.
                digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
                self._picks[name] = torch.randperm(numel, generator=generator)[: self.count(numel)].sort().values
            pick = self._picks[name]
            if pick.numel() != self.count(numel) or (pick.numel() and int(pick[-1]) >= numel):
                raise ArgumentError("mask", f"fit the model's `{name}` of {numel} weights", f"one of {pick.numel()}")
            chosen[name] = pick
        return chosen

    def sample(self, model: nn.Module) -> Tensor:
        """The coordinates into the flat `w`, (k,), int64, sorted."""
        picks, offset, found = self.picks(model), 0, list[Tensor]()
        for name, parameter in trainable(model).items():
            found.append(picks[name] + offset)
            offset += parameter.numel()
        return torch.cat(found)

    def state_dict(self) -> dict[str, Any]:
        """The mask as plain types."""
        picks = {name: [int(place) for place in pick] for name, pick in self._picks.items()}
        return {"fraction": self.fraction, "seed": self.seed, "picks": picks}

    @staticmethod
    def restored(state: Mapping[str, Any] | None, model: nn.Module) -> Mask | None:
        """The mask that was saved, for a model; None where there was none.

        Raises:
            ArgumentError: It does not fit the model.
        """
        if state is None:
            return None
        mask = Mask(state["fraction"], state["seed"])
        mask.load_state_dict(state)
        mask.picks(model)
        return mask

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the mask that was saved."""
        self.fraction, self.seed = float(state["fraction"]), int(state["seed"])
        self._picks = {name: torch.tensor(pick, dtype=torch.int64) for name, pick in state["picks"].items()}


def check_seed(seed: object) -> None:
    """Accept an integer.

    Raises:
        ArgumentError: `seed` is something else.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentError("seed", "be an integer", seed)


def as_mask(mask: Mask | float | None, seed: int) -> Mask | None:
    """A mask from what the public functions accept.

    Raises:
        ArgumentError: `mask` is neither a `Mask`, nor a fraction in (0, 1], nor None.
    """
    return mask if mask is None or isinstance(mask, Mask) else Mask(mask, seed)
