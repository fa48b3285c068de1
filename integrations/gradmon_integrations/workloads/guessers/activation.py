"""Activation perturbation: noise at the pre-activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradmon_integrations.workloads.guessers.guesser import Needs
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, check_kind
from gradmon_integrations.workloads.guessers.recording import Site


@dataclass(frozen=True)
class ActivationPerturbation:
    """``y = eps``, or masked ``y = M eps`` (arXiv 2210.03310; arXiv 2312.04709, section 2).

    With ``E[eps eps^T] = I`` the estimate is unbiased. M is the slope of the functions that work entry by entry on z
    before anything else reads it: for ReLU 0 or 1, and since the true gradient is M times something, the masked guess
    is unbiased too and has fewer entries to guess. For other functions M is f', and the mean of the estimate is
    ``M^2 g``.

    Args:
        masked: Whether to multiply by M.
        noise: ``"normal"`` or ``"uniform"``.

    Raises:
        ArgumentError: `noise` is neither.
    """

    overall = False
    reach = "own"

    masked: bool = False
    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)

    @property
    def needs(self) -> Needs:
        """The slopes, for the mask."""
        return "slopes" if self.masked else "nothing"

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """Noise."""
        found = noise.draw(site.shape, site.like, self.noise)
        return found if not self.masked or site.slope is None else found * site.slope
