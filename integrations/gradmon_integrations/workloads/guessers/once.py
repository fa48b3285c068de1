"""An estimate by one guess, as the passes go along, where what was found in an earlier one still holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.directions import Directions
from gradmon_integrations.workloads.guessers.guessing import Guesses
from gradmon_integrations.workloads.guessers.kept import ChangedError, Kept
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.probe import Probe
from gradmon_integrations.workloads.guessers.recording import Site
from gradmon_integrations.workloads.guessers.replay import alike, random_states, same_states
from gradmon_integrations.workloads.guessers.settings import Settings
from gradmon_integrations.workloads.guessers.several import scaled


def once(
    passes: Passes, settings: Settings, kept: Kept | None, seeds: tuple[int, int]
) -> tuple[dict[str, Tensor], Tensor]:
    """The estimate by one guess, from one pass or two.

    The guess at a layer is made when its z is there, or, where it takes the slope or the value of the function that
    follows, when that is called. Guesses and the layers' inputs are held if that takes little memory; otherwise a plain
    pass meets the inputs again, and draws the guesses again.

    Args:
        passes: Of the model.
        settings: How to estimate.
        kept: What an earlier pass found; None for guesses of weights, which need no layers.
        seeds: Of the guesses at layers, and of those of parameters.

    Returns:
        The estimate, and the loss.

    Raises:
        ChangedError: The pass was not like the one that was kept, so that this is no estimate.
        ArgumentError: Some function has no forward-mode derivative, or a guess has the wrong shape.
    """
    names = list(passes.parameters) if kept is None or settings.active is None else kept.undrawn()
    directions, factor = Directions(passes, settings).draw(names, seeds[1])
    handler, value, along = _pass(passes, settings, kept, directions, seeds[0])
    sums = {name: part * (along.mean() * factor).to(part.dtype) for name, part in directions.items()}
    rows = along / passes.examples
    if handler.squares:
        rows = scaled(rows, torch.stack(handler.squares).sum(0))

    def take(site: Site, y: Tensor, x: Tensor) -> None:
        y = y * rows.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        parts: list[tuple[str, Tensor]] = []
        if site.weight is not None:
            parts.append((site.weight, site.layer.weight_gradient(y, x)))
        if site.bias is not None:
            parts.append((site.bias, site.layer.bias_gradient(y)))
        for name, part in parts:
            sums[name] = sums[name] + part if name in sums else part

    if handler.held:
        while handler.made:
            site, y = handler.made.pop(0)
            x = handler.inputs.pop(site.number)
            assert x is not None
            take(site, y, x)
    elif handler.guessed:
        again = Guesses(passes, settings, kept, {}, Seeded(seeds[0]), take)
        met = passes.handled(again, {}).detach()
        again.finish(met)
        if not alike(met, value):
            raise ChangedError
    return {name: sums[name] if name in sums else torch.zeros_like(p) for name, p in passes.parameters.items()}, value


def carries(passes: Passes, settings: Settings, kept: Kept, probe: Probe, wanted: Tensor) -> bool:
    """Whether guesses that wait for the functions behind z have the derivatives that they have at z.

    What no mode sees, as an extension written in C++, may read z as well.

    Args:
        passes: Of the model.
        settings: How to estimate.
        kept: What an earlier pass found.
        probe: Tangents.
        wanted: Their derivatives where they are at z, (B,).
    """
    probe.reach = settings.reach
    try:
        _, _, found = _pass(passes, Settings(probe), kept, {}, 0)
    except ChangedError:
        return False
    return alike(found, wanted)


def _pass(
    passes: Passes, settings: Settings, kept: Kept | None, directions: Mapping[str, Tensor], seed: int
) -> tuple[Guesses, Tensor, Tensor]:
    """One pass with tangents: who made the guesses, the loss, and its derivatives."""
    before = random_states() if kept is None else None
    with forward_ad.dual_level():
        duals = passes.duals(directions)
        handler = Guesses(passes, settings, kept, duals, Seeded(seed))
        try:
            value, tangent = forward_ad.unpack_dual(passes.handled(handler, duals))
        except NotImplementedError as error:
            must = "consist of functions that have a forward-mode derivative"
            raise ArgumentError("model", must, str(error).partition("\n")[0]) from error
        value = value.detach()
        along = torch.zeros_like(value) if tangent is None else tangent.detach()
    # From what it draws another pass is not known to draw the same, before it was watched.
    if before is not None and not same_states(before, random_states()):
        raise ChangedError
    handler.finish(value)
    return handler, value, along
