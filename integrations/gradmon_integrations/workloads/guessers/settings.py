"""How to estimate a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser, Guesser, Needs, Reach

Normalize = Literal["none", "example"]


@dataclass(frozen=True)
class Settings:
    """How to estimate: see `estimate_gradient`.

    Raises:
        ArgumentError: One of them is not what it must be.
    """

    guesser: Guesser
    guesses: int = 1
    per_layer: bool = False
    exact_last: bool = False
    normalize: Normalize = "none"
    hold: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.guesser, type) or not (hasattr(self.guesser, "guess") or hasattr(self.guesser, "direction")):
            raise ArgumentError("guesser", "have `guess` or `direction`, as DirectionalDescent()", repr(self.guesser))
        if isinstance(self.guesses, bool) or not isinstance(self.guesses, int) or self.guesses < 1:
            raise ArgumentError("guesses", "be an integer of at least 1", self.guesses)
        if self.normalize not in ("none", "example"):
            raise ArgumentError("normalize", 'be "none" or "example"', repr(self.normalize))
        for name in ("per_layer", "exact_last", "hold"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, "be True or False", getattr(self, name))

    @property
    def active(self) -> ActivationGuesser | None:
        """The guesser, if it guesses pre-activations."""
        return cast("ActivationGuesser", self.guesser) if hasattr(self.guesser, "guess") else None

    @property
    def single(self) -> bool:
        """Whether there is one guess, for all layers."""
        return self.guesses == 1 and not self.per_layer and not self.exact_last

    @property
    def scaled(self) -> bool:
        """Whether each guess is scaled to length 1."""
        return self.normalize == "example" or (self.active is not None and self.active.overall)

    @property
    def needs(self) -> Needs:
        """What the guesser looks at."""
        return "nothing" if self.active is None else self.active.needs

    @property
    def reach(self) -> Reach:
        """How far it looks; "any" where it does not say."""
        return "own" if self.needs == "nothing" else getattr(self.guesser, "reach", "any")
