"""Keeps what one estimate found for the next, and chooses how to make it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmon_integrations.workloads.guessers.inputs import FREE, Inputs
from gradmon_integrations.workloads.guessers.kept import ChangedError, Kept
from gradmon_integrations.workloads.guessers.once import carries, once
from gradmon_integrations.workloads.guessers.passes import SEEDS, Passes
from gradmon_integrations.workloads.guessers.settings import Settings
from gradmon_integrations.workloads.guessers.several import Several


class Keeper:
    """Makes estimates of one model's gradients, one after the other.

    Args:
        settings: How to estimate.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._kept: Kept | None = None

    def __reduce__(self) -> tuple[type[Keeper], tuple[Settings]]:
        # What is kept belongs to these parameters, and is found again for others.
        return Keeper, (self.settings,)

    def estimate(self, passes: Passes, generator: torch.Generator | None) -> tuple[dict[str, Tensor], Tensor]:
        """An estimate, and what the loss returned.

        Args:
            passes: Of the model, in which nothing has run yet.
            generator: Where the seed comes from.

        Raises:
            ArgumentError: See `estimate_gradient`.
        """
        # One draw, whatever the guesser, keeps the course of the caller's generator the same for all of them.
        seed = passes.seed(generator)
        kept, settings = self._kept, self.settings
        if kept is not None and not kept.fits(passes):
            kept = self._kept = None
        passes.draws, passes.expected = False, None
        if kept is not None:
            passes.draws, passes.expected = bool(kept.layouts), kept.examples
        if kept is not None or settings.active is None:
            found = self._once(passes, kept, seed)
            if found is not None:
                return found
        return self._anew(passes, kept, seed)

    def _once(self, passes: Passes, kept: Kept | None, seed: int) -> tuple[dict[str, Tensor], Tensor] | None:
        """The estimate by one pass; None where one is not enough."""
        if not (self.settings.single if kept is None else kept.serves(self.settings)):
            return None
        seeds = torch.Generator().manual_seed(seed)
        # The first is that of parameters that no function is seen to read: there are none here.
        _, *pair = (int(torch.randint(SEEDS, (), generator=seeds)) for _ in range(3))
        try:
            found = once(passes, self.settings, kept, (pair[0], pair[1]))
        except ChangedError:
            return None
        if kept is not None:
            kept.uses += 1
        return found

    def _anew(self, passes: Passes, old: Kept | None, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        settings = self.settings
        follow, values = settings.needs != "nothing", settings.needs == "values"
        inputs = None if settings.single else Inputs(limit=math.inf if settings.hold else FREE)
        structure = passes.record(follow, values and not settings.single, inputs)
        kept = Kept.of(passes, structure)
        known = old is not None and old.like(kept)
        if known and old is not None:
            kept.uses, kept.written, kept.single = old.uses + 1, old.written, old.single
        self._kept = None
        seen = True
        if not known:
            checked = Several(passes, settings, structure, seed).check()
            seen = checked is None or not bool(checked[1].isnan().any())
            if checked is not None and settings.needs != "nothing" and kept.serves(settings):
                # Once more if only that some inputs are written to had to be learned.
                kept.single = any(carries(passes, settings, kept, *checked) for _ in range(2))
        # Only now: what is refused once is to be refused again.
        self._kept = kept if seen else None
        if kept.serves(settings):
            # Slopes are as large as a pass, and it makes its own.
            structure = None
            while True:
                written = set(kept.written)
                found = self._once(passes, kept, seed)
                if found is not None:
                    return found
                if written == kept.written:
                    break
            kept.single = False
        if structure is None or (values and settings.single):
            structure = passes.record(follow, values)
        return Several(passes, settings, structure, seed, inputs).run()
