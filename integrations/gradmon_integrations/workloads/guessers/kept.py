"""What is kept of a pass, so that the next estimate need not find it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradmon_integrations.workloads.guessers.layers import Layer
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Site, Structure
from gradmon_integrations.workloads.guessers.settings import Settings

USES = 100
"""After so many estimates everything is found anew, and seen to once more."""


class ChangedError(Exception):
    """A pass is not like the one that was kept."""


@dataclass(frozen=True)
class Call:
    """A layer as it was called: what must be the same the next time.

    Attributes:
        site: What was found there, without tensors of the batch; None for a layer whose rows are no examples.
        kind: The type of the layer, and its settings.
        names: Those of its weight and its bias among all parameters; None where they are none.
    """

    site: Site | None
    kind: tuple[Any, ...]
    names: tuple[str | None, str | None]


def kind_of(layer: Layer) -> tuple[Any, ...]:
    """The type of a layer, its settings, and the shape of a weight that need not be a parameter."""
    return type(layer), layer.bias is None, layer.weight.shape, *layer.settings


def names_of(layer: Layer, every: Mapping[int, str]) -> tuple[str | None, str | None]:
    """The names of a layer's weight and bias; None where they are no parameters."""
    return every.get(id(layer.weight)), None if layer.bias is None else every.get(id(layer.bias))


@dataclass
class Kept:
    """The layers and parameters of a model, as one pass found them.

    Attributes:
        parameters: The model's parameters; that they are held here keeps their identities from being given anew.
        names: The names of the trainable ones by identity.
        every: Those of all.
        modes: Of the modules, whether each is in training mode.
        examples: B.
        apart: Whether the loss is one value per example.
        calls: The functions that were called.
        layers: The layers among them.
        direct: The parameters that are guessed directly.
        hidden: Those that no function was seen to read.
        layouts: See `Structure`.
        reach: How far a guesser may look for one pass to be enough; see `Settings.reach`.
        written: The layers whose inputs are written to later in a pass.
        single: Whether one pass may be enough.
        uses: How many estimates it has served.
    """

    parameters: list[nn.Parameter]
    names: dict[int, str]
    every: dict[int, str]
    modes: list[bool]
    examples: int
    apart: bool
    calls: list[tuple[Any, ...]]
    layers: list[Call]
    direct: set[str]
    hidden: set[str]
    layouts: dict[int, list[tuple[int, ...]]]
    reach: set[str]
    written: set[int] = field(default_factory=set)
    single: bool = True
    uses: int = 0

    @staticmethod
    def of(passes: Passes, structure: Structure) -> Kept:
        """What is to be kept of a pass."""
        sites = _bare(structure.sites)
        layers = [
            Call(None if site is None else sites[site.number], kind_of(layer), names_of(layer, passes.every))
            for site, layer in structure.layers
        ]
        guessed = [site for site in sites if site.guessed]
        reach = {"own"} if all(site.own for site in guessed) else set[str]()
        if all(site.adjacent and _predictable(site, layers, len(sites)) for site in guessed):
            reach.add("next")
        return Kept(
            list(passes.model.parameters()),
            passes.names,
            passes.every,
            modes_of(passes.model),
            passes.examples,
            structure.loss.ndim == 1,
            structure.calls,
            layers,
            structure.direct,
            structure.hidden,
            structure.layouts,
            reach,
        )

    def fits(self, passes: Passes) -> bool:
        """Whether the model still consists of the same parameters, trains the same ones, and is in the same modes."""
        return (
            self.names == passes.names
            and self.every == passes.every
            and self.modes == modes_of(passes.model)
            and self.uses < USES
        )

    def like(self, other: Kept) -> bool:
        """Whether two passes found the same."""
        return (
            self.calls == other.calls
            and self.direct == other.direct
            and self.hidden == other.hidden
            and self.apart == other.apart
            and [(call.kind, call.names) for call in self.layers] == [(call.kind, call.names) for call in other.layers]
            # That examples do not interact, one example does not tell.
            and (self.examples > 1 or other.examples == 1)
        )

    def serves(self, settings: Settings) -> bool:
        """Whether one pass may be enough for an estimate."""
        if not self.single or self.hidden or not settings.single:
            return False
        if settings.active is None:
            return True
        sites = any(call.site is not None and call.site.guessed for call in self.layers)
        # What is scaled to length 1 has no part in a pass with something that is not.
        alone = not (settings.scaled and sites and self.undrawn())
        looks = settings.needs == "nothing" or settings.reach in self.reach
        return looks and alone and (self.apart or self.examples == 1 or not sites)

    def undrawn(self) -> list[str]:
        """The names of the parameters that no layer's guess covers."""
        sites = [call.site for call in self.layers if call.site is not None]
        covered = {name for site in sites for name in (site.weight, site.bias)}
        return [name for name in self.names.values() if name not in covered]

    def sites(self, examples: int) -> list[Site]:
        """The layers to come, for some number of examples."""
        found = _bare([call.site for call in self.layers if call.site is not None])
        for site in found:
            site.shape = (examples, *site.shape[1:])
            site.input_shape = (examples, *site.input_shape[1:])
        return found


def modes_of(model: nn.Module) -> list[bool]:
    """Of each module, whether it is in training mode."""
    return [module.training for module in model.modules()]


def _predictable(site: Site, layers: list[Call], sites: int) -> bool:
    """Whether the weight of the layer that follows is known before it is called, or that there will be none."""
    if site.following is None:
        # What reads nothing of it today, as another head, may do so in the next pass by the same functions.
        return site.number == sites - 1
    return next(call.names[0] for call in layers if call.site is site.following) is not None


def _bare(sites: Sequence[Site]) -> list[Site]:
    """The sites without what belongs to one batch."""
    found: list[Site] = []
    for site in sites:
        twin = object.__new__(Site)  # in every step, and `dataclasses.replace` takes its time
        vars(twin).update(vars(site), slope=None, value=None, _path=[])
        found.append(twin)
    for site in found:
        site.following = None if site.following is None else found[site.following.number]
    return found
