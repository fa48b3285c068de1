"""Tangents that do not matter, to see by them how a model works."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmon_integrations.workloads.guessers.guesser import Needs
from gradmon_integrations.workloads.guessers.noise import Noise, Seeded
from gradmon_integrations.workloads.guessers.recording import Site


class Probe:
    """Noise at the pre-activations of some of the examples; it can be used as a guesser.

    Args:
        examples: B.

    Attributes:
        chosen: Which examples, (B,): about half of them, and one if there is but one.
    """

    needs: Needs = "slopes"
    overall = False

    def __init__(self, examples: int) -> None:
        chosen = torch.rand(examples, generator=torch.Generator().manual_seed(0)) < 0.5
        chosen[-1], chosen[0] = False, True
        self.chosen, self.reach = chosen, "own"

    def at(self, site: Site) -> Tensor:
        """The tangent at a layer, of z's shape: the same however often it is asked for, and in whatever order."""
        drawn = Seeded(site.number).draw(site.shape, site.like, "normal")
        return drawn * self.chosen.reshape(-1, *[1] * (drawn.ndim - 1)).to(drawn)

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """The tangent."""
        return self.at(site)
