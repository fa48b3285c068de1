"""Gradients estimated from directional derivatives along guesses: forward mode alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError
from gradmon._parameters import layer_of
from gradmon._tensors import length
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser, Guesser, WeightGuesser
from gradmon_integrations.workloads.guessers.noise import Noise, Seeded
from gradmon_integrations.workloads.guessers.passes import SEEDS, Inject, Passes
from gradmon_integrations.workloads.guessers.recording import Site

Normalize = Literal["none", "example"]
_CHUNK = 16
"""How many guesses share one plain forward pass, at most."""


def estimate_gradient(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    guesser: Guesser,
    *,
    guesses: int = 1,
    per_layer: bool = False,
    exact_last: bool = False,
    normalize: Normalize = "none",
    generator: torch.Generator | None = None,
    hold: bool = False,
) -> dict[str, Tensor]:
    """Estimate the gradient of the batch loss by forward-mode automatic differentiation.

    A guess y_b at the pre-activations z of all layers gives, by one Jacobian-vector product for each example, its
    directional derivative ``d_b = sum_i dl_b/dz_i . y_ib``, and with the inputs x_i of the layers the estimate
    ``g^_i = 1/B sum_b d_b y_ib x_ib^T`` (arXiv 2312.04709, section 2). Where ``E[y y^T] = I`` its mean is the gradient.
    All examples run in one pass, since they do not interact; a pass of its own makes sure of that. There is no backward
    pass and no autograd graph: a plain pass finds the layers and what lies between them, a pass with tangents gives
    d, and another plain pass draws the same guesses again, so that nothing of the size of a pass is held meanwhile.

    *Layers* are calls of `linear`, of convolutions and of products with a matrix that is a parameter, on tensors whose
    first dimension counts the examples, as modules or functions. Parameters of other kinds (of normalisations,
    embeddings, scales), and those of layers whose rows are not examples, are guessed directly in the same pass, by
    independent normal numbers for the whole batch: without bias, too. A parameter used several times gets the sum of
    its
    uses. Frozen ones are left out; those that the loss does not depend on get zeros.

    The model, its buffers and modes are left as found; without a generator, one number is drawn from torch's global
    one.

    Args:
        model: The model, in the mode in which it is to be measured.
        loss: ``loss(model, batch)``: one value per example, (B,), of which the mean counts, or a scalar. A scalar does
        not
            tell the examples apart, so that guesses at pre-activations then take B passes instead of one.
        batch: The batch.
        guesser: What to guess.
        guesses: How many guesses are averaged.
        per_layer: Whether every layer gets a pass of its own instead of sharing one: as many times the work, and no
            noise from other layers.
        exact_last: Whether the last layer to be called gets its true gradient, by one tangent for each of its
            outputs, and is left out of the guess. The paper takes the error vector of the last layer as known.
        normalize: ``"example"`` scales each example's guess, taken over all layers' pre-activations, to length 1 (and
            a guess of weights as a whole), which makes the estimate a projection of the gradient; ``"none"`` leaves it.
        generator: Where the seeds of the guesses come from; None for torch's global generator, of which one number is
            used before the model draws any of its own.
        hold: Whether to hold the guesses until their derivatives are known, instead of making them a second time:
            faster, with the memory of a backward pass.

    Returns:
        One tensor per trainable parameter, by its name in ``model.named_parameters()``.

    Raises:
        ArgumentError: An argument is not what it must be; or examples interact, as under BatchNorm in training mode,
        and
            the loss is one value per example.
    """
    with Passes(model, loss, batch) as passes:
        settings = Settings(guesser, guesses, per_layer, exact_last, normalize, hold)
        return estimate(passes, settings, generator)[0]


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
    check: bool = True

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


@dataclass(frozen=True)
class _Group:
    """Layers and parameters that share their directional derivatives."""

    sites: list[Site]
    names: list[str]


def estimate(passes: Passes, settings: Settings, generator: torch.Generator | None) -> tuple[dict[str, Tensor], Tensor]:
    """The estimate of `estimate_gradient`, and what the loss returned."""
    return _Estimate(passes, settings, generator).run()


class _Estimate:
    def __init__(self, passes: Passes, settings: Settings, generator: torch.Generator | None) -> None:
        self.passes, self.settings, self.guesser = passes, settings, settings.guesser
        self.sums = {name: torch.zeros_like(p.detach()) for name, p in passes.parameters.items()}
        self.vectorised = True
        # One draw, whatever the guesser, keeps the course of the caller's generator the same for all of them.
        self._seeds = torch.Generator().manual_seed(passes.seed(generator))
        self._gradient: dict[str, Tensor] | None = None
        self._again: dict[int, list[tuple[int, Tensor]]] = {}
        self._held: dict[int, Tensor] = {}

    def run(self) -> tuple[dict[str, Tensor], Tensor]:
        settings, passes = self.settings, self.passes
        active = self.active = cast("ActivationGuesser", self.guesser) if hasattr(self.guesser, "guess") else None
        self.scaled = settings.normalize == "example" or (active is not None and active.overall)
        needs = "nothing" if active is None else active.needs
        self.structure = structure = passes.record(needs != "nothing", needs == "values")
        self.apart = structure.loss.ndim == 1 or passes.examples == 1
        # vmap draws masks in another order than a plain pass where a tensor is not contiguous.
        self.vectorised = not structure.random
        sites = [site for site in structure.sites if site.guessed]
        last = sites[-1] if settings.exact_last and sites else None
        if active is None and last is not None:
            last = self._alone(last)
        if active is None:
            sites = [] if last is None else [last]
        if settings.check and self.apart and passes.examples > 1 and sites:
            self._check_apart(sites)
        covered = {name for site in sites for name in (site.weight, site.bias)} | self._unused()
        direct = [name for name in passes.parameters if name not in covered]
        for group in self._groups([site for site in sites if site is not last], direct):
            seeds = [(self._seed(), self._seed()) for _ in range(settings.guesses)]
            for start in range(0, len(seeds), _CHUNK):
                self._differentiate(group, seeds[start : start + _CHUNK])
        errors = None if last is None else self._errors(last)
        return self.sums, self._collect(sites, last, errors)

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

    def _check_apart(self, sites: Sequence[Site]) -> None:
        """See that no example's loss depends on another's pre-activations.

        Raises:
            ArgumentError: One does.
        """
        noise, wanted = Seeded(0), {id(site) for site in sites}
        chosen = torch.rand(self.passes.examples, generator=torch.Generator().manual_seed(0)) < 0.5
        chosen[0], chosen[-1] = True, False

        def some(site: Site) -> Tensor | None:
            if id(site) not in wanted:
                return None
            rows = _along(chosen.to(site.like.device), site.shape)
            return (noise.draw(site.shape, site.like, "normal") * rows)[None]

        found = self.passes.tangent(self.structure, some, {}, 1, False)[0]
        if bool((found[~chosen.to(found.device)] != 0).any()):
            raise ArgumentError(
                "model",
                "treat the examples, along the first dimension, apart where `loss` returns one value per example and "
                "pre-activations are guessed; BatchNorm in training mode does not, and wants a scalar loss or eval()",
                "losses that depend on other examples",
            )

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

    def _directions(self, names: Sequence[str], seed: int) -> tuple[dict[str, Tensor], float]:
        """A direction of the parameters that are guessed directly, and the factor of its part of the estimate."""
        if not names:
            return {}, 1.0
        noise = Seeded(seed)
        parameters = {name: self.passes.parameters[name].detach() for name in names}
        if self.active is not None:
            return {name: noise.draw(of.shape, of, "normal") for name, of in parameters.items()}, 1.0
        found, factor = cast("WeightGuesser", self.guesser).direction(parameters, self._truth, noise)
        if self.scaled:
            square = sum(length(part) ** 2 for part in found.values())
            factor = 1 / square if square > 0 else 0.0
        return found, factor

    def _truth(self) -> Mapping[str, Tensor]:
        """The true gradient, by backpropagation."""
        if self._gradient is None:
            parameters = self.passes.parameters
            with torch.enable_grad():
                value = self.passes.run().mean()
                found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            pairs = zip(parameters.items(), found, strict=True)
            self._gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
        return self._gradient

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
            found.append(self.passes.tangent(self.structure, make([place]), one, 1, False))
        return torch.cat(found)

    def _differentiate(self, group: _Group, seeds: Sequence[tuple[int, int]]) -> None:
        """The derivatives along some guesses, and the estimate of what is guessed directly."""
        count, guesses, examples = len(seeds), self.settings.guesses, self.passes.examples
        drawn = [self._directions(group.names, seed) for _, seed in seeds]
        directions = {name: torch.stack([found[name] for found, _ in drawn]) for name in group.names}
        wanted = {id(site) for site in group.sites}
        made: dict[int, list[Tensor]] = {site.number: [Tensor()] * count for site in group.sites}
        squares = [dict[int, Tensor]() for _ in seeds]

        def injecting(places: Sequence[int], row: int | None = None) -> Inject:
            noises = [Seeded(seeds[place][0]) for place in places]

            def inject(site: Site) -> Tensor | None:
                if id(site) not in wanted:
                    return None
                found = [self._guess(site, noise) for noise in noises]
                for place, y in zip(places, found, strict=True):
                    if self.scaled:
                        squares[place][site.number] = y.reshape(examples, -1).square().sum(-1)
                    if self.settings.hold:
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
            total = torch.stack([torch.stack(list(of.values())).sum(0) for of in squares]).to(rows.dtype)
            rows = torch.where(total > 0, rows / total, torch.zeros_like(rows))
        rows = rows / guesses
        for site in group.sites:
            if self.settings.hold:
                pairs = zip(made[site.number], rows, strict=True)
                part = torch.stack([y * _along(row.to(y.dtype), site.shape) for y, row in pairs]).sum(0)
                self._held[site.number] = self._held[site.number] + part if site.number in self._held else part
            else:
                noises = [(seed, row) for (seed, _), row in zip(seeds, rows, strict=True)]
                self._again.setdefault(site.number, []).extend(noises)

    def _guess(self, site: Site, noise: Noise) -> Tensor:
        assert self.active is not None
        y = self.active.guess(site, noise)
        if tuple(y.shape) != site.shape:
            raise ArgumentError("guesser", f"return a guess of shape {site.shape}", tuple(y.shape))
        return y

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
            return self.passes.run() if self.passes.settle else self.structure.loss
        guessed = {site.number for site in sites}
        noises: dict[int, Seeded] = {}

        def look(site: Site, x: Tensor) -> None:
            if site.number not in guessed:
                return
            if site is last:
                assert errors is not None
                y = errors
            elif site.number in self._held:
                y = self._held.pop(site.number)
            else:
                y = torch.zeros(site.shape, dtype=site.like.dtype, device=site.like.device)
                for seed, row in self._again.get(site.number, []):
                    noise = noises.setdefault(seed, Seeded(seed))
                    y += self._guess(site, noise) * _along(row.to(y.dtype), site.shape)
            if site.weight is not None:
                self.sums[site.weight] += site.layer.weight_gradient(y, x)
            if site.bias is not None:
                self.sums[site.bias] += site.layer.bias_gradient(y)

        return self.passes.visit(self.structure, look)


def _nothing(site: Site) -> None:
    """No tangent at any layer."""


def _along(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """One number an example, (B,), to be multiplied with something of a shape (B, ...)."""
    return rows.reshape(-1, *[1] * (len(shape) - 1))
