"""Directions of the parameters that are guessed directly, in weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from gradmon._tensors import length
from gradmon_integrations.workloads.guessers.guesser import WeightGuesser
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.settings import Settings


class Directions:
    """Draws directions.

    Args:
        passes: Of the model.
        settings: How to estimate.
    """

    def __init__(self, passes: Passes, settings: Settings) -> None:
        self._passes, self._settings = passes, settings
        self._gradient: dict[str, Tensor] | None = None

    def draw(self, names: Sequence[str], seed: int) -> tuple[dict[str, Tensor], float]:
        """A direction of some parameters, and the factor of ``(v . g) v`` in the estimate."""
        if not names:
            return {}, 1.0
        noise = Seeded(seed)
        parameters = {name: self._passes.parameters[name].detach() for name in names}
        if self._settings.active is not None:
            return {name: noise.draw(of.shape, of, "normal") for name, of in parameters.items()}, 1.0
        found, factor = cast("WeightGuesser", self._settings.guesser).direction(parameters, self._truth, noise)
        if self._settings.scaled:
            square = sum(length(part) ** 2 for part in found.values())
            factor = 1 / square if square > 0 else 0.0
        return found, factor

    def _truth(self) -> Mapping[str, Tensor]:
        """The true gradient, by backpropagation."""
        if self._gradient is None:
            parameters = self._passes.parameters
            with torch.enable_grad():
                value = self._passes.run().mean()
                found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            pairs = zip(parameters.items(), found, strict=True)
            self._gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
        return self._gradient
