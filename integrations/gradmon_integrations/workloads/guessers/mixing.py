"""Activation mixing: guesses in the span of the batch's own activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon_integrations.workloads.guessers.guesser import Needs
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, check_kind
from gradmon_integrations.workloads.guessers.recording import Site

_ENTRIES = 2**18
"""So many of alpha's entries are drawn at once."""


@dataclass(frozen=True)
class ActivationMixing:
    """``y_b = M_b sum_j alpha_bj a_j``, scaled to length 1 over all layers (arXiv 2312.04709, section 2).

    a_j is the post-activation of example j at the same layer, and alpha is drawn independently for each example and
    layer. Gradients lie close to the span of the activations. Biased: it sees ``M A^T A M g``. Unscaled it grows
    with the activations and diverges.

    Args:
        normalized: Whether the guess of each example is scaled to length 1 over all layers.
        noise: What alpha is drawn from.

    Raises:
        ArgumentError: `noise` is no kind of noise.
    """

    needs: Needs = field(default="values", init=False, repr=False)
    reach = "own"

    normalized: bool = True
    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)

    @property
    def overall(self) -> bool:
        """Scaled, unless it is told otherwise."""
        return self.normalized

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """A random combination of the batch's post-activations for each example.

        Raises:
            Unavailable: They were not recorded.
        """
        if site.value is None:
            raise Unavailable("no post-activations were recorded")
        examples, values = site.shape[0], site.value.reshape(site.shape[0], -1)
        rows = max(1, _ENTRIES // examples)
        parts = [min(rows, examples - start) for start in range(0, examples, rows)]
        # One part of alpha at a time: of a large batch, all of it would be larger than the activations.
        mixed = torch.cat([noise.draw((part, examples), site.like, self.noise) @ values for part in parts])
        mixed = mixed.reshape(site.shape)
        return mixed if site.slope is None else mixed * site.slope
