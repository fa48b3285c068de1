"""What a guesser is: a few lines that make a guess at a layer's pre-activations, or at the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.noise import Noise
from gradmon_integrations.workloads.guessers.recording import Site

Needs = Literal["nothing", "slopes", "values"]
"""What of the functions behind a layer a guesser looks at: nothing, slopes and ways back, or post-activations too."""

Reach = Literal["own", "next", "any"]
"""How far it looks: no further than a layer's own function, than the next layer, or anywhere."""


@runtime_checkable
class ActivationGuesser(Protocol):
    """Guesses ``d loss / d z`` of each example.

    It may say how far it looks by an attribute ``reach``: "own" for the slope and the value that belong to the layer
    itself, "next" for the functions behind the layer and the weight of the next one. Where that is known, one guess
    takes one pass.

    Attributes:
        needs: What it looks at.
        overall: Whether the guess of each example is always scaled to length 1 over all layers.
    """

    @property
    def needs(self) -> Needs:
        """What it looks at."""
        ...

    @property
    def overall(self) -> bool:
        """Whether each example's guess is scaled to length 1."""
        ...

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """A guess y at the pre-activations of a layer, of z's shape, linear in what it draws."""
        ...


@runtime_checkable
class WeightGuesser(Protocol):
    """Guesses the gradient itself, in weight space."""

    def direction(
        self, parameters: Mapping[str, Tensor], truth: Callable[[], Mapping[str, Tensor]], noise: Noise
    ) -> tuple[dict[str, Tensor], float]:
        """A direction v for each parameter, and the factor of ``(v . g) v`` in the estimate."""
        ...


def guessed(guesser: ActivationGuesser, site: Site, noise: Noise) -> Tensor:
    """A guess at a layer.

    Raises:
        ArgumentError: It has not z's shape.
    """
    y = guesser.guess(site, noise)
    if tuple(y.shape) != site.shape:
        raise ArgumentError("guesser", f"return a guess of shape {site.shape}", tuple(y.shape))
    return y


Guesser = ActivationGuesser | WeightGuesser
