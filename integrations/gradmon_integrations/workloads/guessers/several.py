"""An estimate by several passes: for any guesser, and any number of guesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon._parameters import layer_of
from gradmon._tensors import working
from gradmon_integrations.workloads.guessers.directions import Directions
from gradmon_integrations.workloads.guessers.followers import Inject
from gradmon_integrations.workloads.guessers.guesser import guessed
from gradmon_integrations.workloads.guessers.inputs import FREE, Inputs
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import SEEDS, Passes
from gradmon_integrations.workloads.guessers.probe import Probe
from gradmon_integrations.workloads.guessers.recording import Site, Structure
from gradmon_integrations.workloads.guessers.settings import Settings

_CHUNK = 8
"""How many guesses share one plain forward pass, at most: with more, what they share is no longer what counts."""


@dataclass(frozen=True)
class _Group:
    """Layers and parameters that share their directional derivatives."""

    sites: list[Site]
    names: list[str]


class Several:
    """One estimate.

    Args:
        passes: Of the model.
        settings: How to estimate.
        structure: What a pass found.
        seed: Of everything that is drawn.
        inputs: Those of the layers, if they were kept.
    """

    def __init__(
        self, passes: Passes, settings: Settings, structure: Structure, seed: int, inputs: Inputs | None = None
    ) -> None:
        self.passes, self.settings, self.structure = passes, settings, structure
        self.active, self.scaled = settings.active, settings.scaled
        self.sums = {name: torch.zeros_like(p.detach()) for name, p in passes.parameters.items()}
        self.apart = structure.loss.ndim == 1 or passes.examples == 1
        # vmap draws masks in another order than a plain pass where a tensor is not contiguous.
        self.vectorised = not structure.random
        self._directions = Directions(passes, settings)
        self._seeds = torch.Generator().manual_seed(seed)
        self._again: dict[int, list[tuple[int, Tensor]]] = {}
        self._held: dict[int, Tensor] = {}
        self._inputs, self._keeping = inputs, None

        sites = [site for site in structure.sites if site.guessed]
        self._last = sites[-1] if settings.exact_last and sites else None
        if self.active is None and self._last is not None:
            self._last = self._alone(self._last)
        if self.active is None:
            sites = [] if self._last is None else [self._last]
        self._sites = sites

    def run(self) -> tuple[dict[str, Tensor], Tensor]:
        """The estimate, and what the loss returned."""
        settings, passes, sites, last = self.settings, self.passes, self._sites, self._last
        covered = {name for site in sites for name in (site.weight, site.bias)} | self._unused()
        direct = [name for name in passes.parameters if name not in covered]
        groups = self._groups([site for site in sites if site is not last], direct)
        self.hold, chunk = self._sizes(sites)
        keep = settings.guesses == 1 and last is None and self.apart and len(groups) == 1
        if keep:
            self._inputs = self._keeping = Inputs(limit=math.inf if settings.hold else FREE)
        for group in groups:
            seeds = [(self._seed(), self._seed()) for _ in range(settings.guesses)]
            for start in range(0, len(seeds), chunk):
                self._differentiate(group, seeds[start : start + chunk])
        errors = None if last is None else self._errors(last)
        return self.sums, self._collect(sites, last, errors)

    def _sizes(self, sites: Sequence[Site]) -> tuple[bool, int]:
        """Whether guesses are held, and how many are made at once."""
        one = sum(site.bytes for site in sites)
        if self.settings.hold or one == 0:
            return self.settings.hold, _CHUNK
        chunk = min(_CHUNK, self.settings.guesses, FREE // one)
        return (True, chunk) if chunk >= min(4, self.settings.guesses) else (False, _CHUNK)

    def _seed(self) -> int:
        return int(torch.randint(SEEDS, (), generator=self._seeds))

    def _alone(self, last: Site) -> Site | None:
        """The last layer with those of its parameters that no other layer uses."""
        elsewhere = {name for site in self.structure.sites if site is not last for name in (site.weight, site.bias)}
        last.weight = None if last.weight in elsewhere else last.weight
        last.bias = None if last.bias in elsewhere else last.bias
        return last if last.guessed else None

    def _unused(self) -> set[str]:
        """Those of the parameters that no function was seen to read on which the loss does not depend."""
        hidden, noise = sorted(self.structure.hidden), Seeded(self._seed())
        if not hidden:
            return set()
        held = {name: self.passes.parameters[name].detach() for name in hidden}
        directions = {name: noise.draw((1, *of.shape), of, "normal") for name, of in held.items()}
        found = self.passes.tangent(self.structure, _nothing, directions, 1, False)
        return set() if bool((found != 0).any()) else set(hidden)

    def check(self) -> tuple[Probe, Tensor] | None:
        """See that no example's loss depends on another's pre-activations.

        Where the loss has no derivative, as after training diverged, that is not to be seen: so have the guesses none.

        Returns:
            The tangents by which that was seen, and their derivatives, (B,), NaN where there are none; None where
            examples share one loss, or no pre-activations are guessed.

        Raises:
            ArgumentError: One does, though the loss is one value per example.
        """
        if not self.apart or not self._sites:
            return None
        probe, wanted = Probe(self.passes.examples), {id(site) for site in self._sites}

        def some(site: Site) -> Tensor | None:
            return probe.at(site)[None] if id(site) in wanted else None

        found = self.passes.tangent(self.structure, some, {}, 1, False)[0]
        others = found.reshape(-1)[~probe.chosen.to(found.device)]
        if bool(((others != 0) & ~others.isnan()).any()):
            raise ArgumentError(
                "model",
                "treat the examples, along the first dimension, apart where `loss` returns one value per example and "
                "pre-activations are guessed; BatchNorm in training mode does not, and wants a scalar loss or eval()",
                "losses that depend on other examples",
            )
        return probe, found

    def _groups(self, sites: list[Site], direct: list[str]) -> list[_Group]:
        if self.settings.per_layer:
            layers: dict[str, list[str]] = {}
            for name in direct:
                layers.setdefault(layer_of(name), []).append(name)
            return [_Group([site], []) for site in sites] + [_Group([], names) for names in layers.values()]
        if not self.scaled or not sites or not direct:
            return [_Group(sites, direct)] if sites or direct else []
        # What is scaled to length 1 is worth nothing with the noise of something that is not.
        return [_Group(sites, []), _Group([], direct)]

    def _tangent(self, make: Callable[[Sequence[int]], Inject], directions: Mapping[str, Tensor], count: int) -> Tensor:
        """The derivatives along some tangents at once; one after the other where a function is not to be vectorised."""
        if count > 1 and self.vectorised:
            try:
                return self.passes.tangent(self.structure, make(range(count)), directions, count, True)
            except RuntimeError:
                self.vectorised = False  # not every function can be; what else is wrong will be so again
        found: list[Tensor] = []
        for place in range(count):
            one = {name: part[place : place + 1] for name, part in directions.items()}
            found.append(self.passes.tangent(self.structure, make([place]), one, 1, False, self._keeping))
        return torch.cat(found)

    def _differentiate(self, group: _Group, seeds: Sequence[tuple[int, int]]) -> None:
        """The derivatives along some guesses, and the estimate of what is guessed directly."""
        count, guesses, examples = len(seeds), self.settings.guesses, self.passes.examples
        drawn = [self._directions.draw(group.names, seed) for _, seed in seeds]
        directions = {name: torch.stack([found[name] for found, _ in drawn]) for name in group.names}
        wanted = {id(site) for site in group.sites}
        made: dict[int, list[Tensor]] = {site.number: [Tensor()] * count for site in group.sites}
        squares = [dict[int, Tensor]() for _ in seeds]

        def injecting(places: Sequence[int], row: int | None = None) -> Inject:
            noises = [Seeded(seeds[place][0]) for place in places]

            def inject(site: Site) -> Tensor | None:
                if id(site) not in wanted:
                    return None
                assert self.active is not None
                found = [guessed(self.active, site, noise) for noise in noises]
                for place, y in zip(places, found, strict=True):
                    if self.scaled:
                        squares[place][site.number] = working(y).reshape(examples, -1).square().sum(-1)
                    if self.hold:
                        made[site.number][place] = y
                stacked = torch.stack(found)
                if row is None:
                    return stacked
                kept = torch.zeros_like(stacked)
                kept[:, row] = stacked[:, row]
                return kept

            return inject

        if self.apart or not group.sites:
            found = self._tangent(injecting, directions, count).reshape(count, -1)
            along = found.mean(1)
            rows = found / examples
        else:
            each = [self._tangent(lambda at, row=row: injecting(at, row), {}, count) for row in range(examples)]
            rows = torch.stack(each, 1)
            along = self._tangent(lambda _: _nothing, directions, count) if group.names else rows[:, 0]
        for name, stacked in directions.items():
            factors = torch.tensor([factor for _, factor in drawn], dtype=along.dtype, device=along.device)
            self.sums[name] += torch.tensordot((along * factors / guesses).to(stacked.dtype), stacked, 1)
        if not group.sites:
            return
        if self.scaled:
            total = torch.stack([torch.stack(list(of.values())).sum(0) for of in squares])
            rows = scaled(rows, total)
        rows = rows / guesses
        for site in group.sites:
            if self.hold:
                held = self._held.setdefault(site.number, torch.zeros_like(made[site.number][0]))
                for y, row in zip(made[site.number], rows, strict=True):
                    held.addcmul_(y, _along(row, y))
            else:
                noises = [(seed, row) for (seed, _), row in zip(seeds, rows, strict=True)]
                self._again.setdefault(site.number, []).extend(noises)

    def _errors(self, last: Site) -> Tensor:
        """The derivative of the batch loss by the last layer's z: one tangent for each output; of z's shape."""
        examples, size = self.passes.examples, last.like.new_empty(last.shape[1:]).numel()
        found = last.like.new_zeros((examples, size))
        for row in [None] if self.apart else range(examples):
            for start in range(0, size, _CHUNK):
                count = min(_CHUNK, size - start)
                basis = last.like.new_zeros((count, examples, size))
                for place in range(count):
                    basis[place, slice(None) if row is None else row, start + place] = 1
                shaped = basis.reshape(count, *last.shape)

                def make(places: Sequence[int], shaped: Tensor = shaped) -> Inject:
                    return lambda site: shaped[list(places)] if site is last else None

                part = self._tangent(make, {}, count).reshape(count, -1)
                if row is None:
                    found[:, start : start + count] = part.T / examples
                else:
                    found[row, start : start + count] = part[:, 0]
        return found.reshape(last.shape)

    def _collect(self, sites: Sequence[Site], last: Site | None, errors: Tensor | None) -> Tensor:
        """Meet the inputs of the layers again, and add up their gradients; what the loss returned."""
        if not sites:
            return self.passes.run() if self.passes.settled(self.structure.random) else self.structure.loss
        by_number, noises = {site.number: site for site in sites}, dict[int, Seeded]()

        def look(site: Site, x: Tensor) -> None:
            if site.number not in by_number:
                return
            if site is last:
                assert errors is not None
                y = errors
            elif site.number in self._held:
                y = self._held.pop(site.number)
            else:
                y = torch.zeros(site.shape, dtype=site.like.dtype, device=site.like.device)
                for seed, row in self._again.get(site.number, []):
                    assert self.active is not None
                    y += guessed(self.active, site, noises.setdefault(seed, Seeded(seed))) * _along(row, y)
            if site.weight is not None:
                self.sums[site.weight] += site.layer.weight_gradient(y, x)
            if site.bias is not None:
                self.sums[site.bias] += site.layer.bias_gradient(y)

        # Where numbers are drawn or buffers move, a plain pass is to be the last.
        if self._inputs is None or not self._inputs.whole() or self.passes.settled(self.structure.random):
            return self.passes.visit(self.structure, look)
        for number, x in self._inputs.take():
            look(self.structure.sites[number], x)
        return self.structure.loss


def scaled(rows: Tensor, total: Tensor) -> Tensor:
    """Derivatives along guesses, over the squared lengths of the guesses: 0 along a guess of length 0."""
    found = rows / total
    return torch.where(total == 0, torch.zeros_like(found), found)


def _nothing(site: Site) -> None:
    """No tangent at any layer."""


def _along(rows: Tensor, like: Tensor) -> Tensor:
    """One number an example, (B,), to be multiplied with something of the shape (B, ...)."""
    return rows.reshape(-1, *[1] * (like.ndim - 1)).to(like)
