"""Data-dependent orthogonal initialisation: every layer passes on what it gets at its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError, told
from gradmon._objective import Objective
from gradmon._parameters import Weights, layer_of
from gradmon._tensors import ran_out
from gradmon._types import Batch, Loss
from gradmon.preflight.calls import ADDMM, Call, Calls
from gradmon.preflight.chance import find_chance
from gradmon.preflight.passes import Passes

_HEAD = 0.5
"""The deviation of the last layer's outputs, in units of `Chance.scale`: its first guesses are only guesses."""
_PASSES = 40
"""More than are ever taken."""


@dataclass(frozen=True)
class Reinitialization:
    """What was initialised anew, and what was left alone.

    Attributes:
        changed: For each parameter that was set as a weight, in the order of the forward pass: the standard deviation
            of what its layer made, of what it got when its turn came, before and after.
        head: The weight of the last layer, whose outputs are half as large; None where it was not found.
        kept: For each trainable weight of two or more dimensions that was left alone, why.
    """

    changed: dict[str, tuple[float, float]]
    head: str | None
    kept: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        lines = [f"Initialised anew: {len(self.changed)} layers; left alone: {len(self.kept)} weights."]
        lines += [
            f"  {name}: standard deviation {before:.3g} -> {after:.3g}"
            for name, (before, after) in self.changed.items()
        ]
        lines += [f"  {name}: left alone, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def reinitialize(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    keep: Sequence[str | nn.Module | nn.Parameter] = (),
    generator: torch.Generator | int = 0,
) -> Reinitialization:
    """Initialise a model anew, in place, by one forward pass of a batch.

    Each linear map and convolution, in the order in which the pass comes to it, gets orthogonal weights (one block for
    each group of a convolution), a bias that makes the mean of each of its units zero, and is divided by the standard
    deviation of what it makes; the outputs of the last layer get half of that, or half of the targets' deviation.
    Parameters stay the same objects, so that optimizers hold on to them; what an optimizer remembers is not touched, so
    make a new one, or do this before its first step.

    Left alone are frozen parameters, those in `keep`, weights that are shared with something else than a linear map or
    a convolution (such as an embedding), weights that are made anew in every pass (parametrizations), and everything
    that is no linear map or convolution. Buffers, modes, gradients and global random states stay as they are.

    Args:
        model: The model, in the mode in which it trains.
        loss: ``loss(model, batch)``.
        batch: The batch that the layers are adapted to; some dozens of examples.
        keep: What to leave alone: modules or parameters, or their names.
        generator: Where the weights are drawn from: a generator, or the seed of one.

    Returns:
        What was done.

    Raises:
        ArgumentError: An argument is not what it must be, or the loss fails.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> list(reinitialize(model, loss, (torch.randn(32, 4), torch.randint(3, (32,)))).changed)
        ['0.weight', '2.weight']
    """
    weights = Weights(model)
    kept = _kept(model, keep)
    source = _source(generator)
    passes = Passes(_PASSES)
    with Objective(model, passes.counted(loss), batch, weights) as objective:
        plain = _forward(objective, passes, Calls())
        head, size = _head(objective, passes, plain)
        work = _Work(weights, kept, _shared(model), source, head, size)
        _forward(objective, passes, Calls(change=work.change), work.collect)
    with torch.no_grad():
        for place, value in work.values.items():
            weights.parameters[place].copy_(value)
    return Reinitialization(work.changed, work.head_name, work.left())


def _source(generator: torch.Generator | int) -> torch.Generator:
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, bool) or not isinstance(generator, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("generator", "be a torch.Generator or an integer", type(generator).__name__)
    return torch.Generator().manual_seed(generator % 2**32)


def _kept(model: nn.Module, keep: Sequence[str | nn.Module | nn.Parameter]) -> frozenset[int]:
    """The identities of the parameters that `keep` names."""
    given: Any = keep
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ArgumentError("keep", "be a sequence of modules, parameters or their names", repr(given))
    modules: dict[str, nn.Module] = dict(cast(Any, model.named_modules()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: set[int] = set()
    for what in keep:
        found: object = what if not isinstance(what, str) else modules.get(what, parameters.get(what))
        if isinstance(found, nn.Module):
            held.update(id(parameter) for parameter in found.parameters())
        elif isinstance(found, nn.Parameter):
            held.add(id(found))
        else:
            raise ArgumentError("keep", "name modules or parameters of `model`", repr(what))
    return frozenset(held)


def _shared(model: nn.Module) -> frozenset[int]:
    """The identities of the parameters that embeddings look up, or recurrent layers use."""
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)
    owners = [module for module in model.modules() if isinstance(module, kinds)]
    return frozenset(id(parameter) for module in owners for parameter in module.parameters(recurse=False))


def _head(objective: Objective, passes: Passes, plain: Calls) -> tuple[Tensor | None, float]:
    """The weight of the last layer, where it makes all that the loss depends on, and the unit of its outputs."""
    if plain.last is None:
        return None, 1.0
    try:
        chance = find_chance(objective, passes, plain, objective.examples)
    except Exception as error:  # a model may refuse an output of zeros
        if ran_out(error):
            raise
        return None, 1.0
    return plain.last.weight if chance.head else None, chance.scale or 1.0


def _forward(objective: Objective, passes: Passes, calls: Calls, then: object = None) -> Calls:
    """A forward pass; what is to be done with the weights that it leaves is done before they are put back.

    Raises:
        ArgumentError: The loss fails.
    """
    with objective.at(), passes.heard(calls):
        try:
            objective.evaluate()
        except ArgumentError:
            raise
        except Exception as error:
            raise ArgumentError("loss", "run on `model` and `batch`", told(error)) from error
        if callable(then):
            then()
    return calls


class _Work:
    """Sets each layer when the forward pass comes to it."""

    def __init__(
        self,
        weights: Weights,
        kept: frozenset[int],
        shared: frozenset[int],
        source: torch.Generator,
        head: Tensor | None,
        unit: float,
    ) -> None:
        self._weights, self._kept, self._shared, self._source = weights, kept, shared, source
        self._head, self._unit = head, unit
        self._places = {id(parameter): place for place, parameter in enumerate(weights.parameters)}
        self._set: set[int] = set()
        self._odd: dict[int, str] = {}
        self.changed: dict[str, tuple[float, float]] = {}
        self.values: dict[int, Tensor] = {}
        self.head_name: str | None = None

    def change(self, call: Call) -> Tensor:
        """Set the layer of a call, unless it is to be left alone, and make the call."""
        weight, bias = call.weight, call.bias
        place = self._places.get(id(weight))
        known = place is not None and not {id(weight)} & (self._kept | self._shared)
        if place is None or not known or id(weight) in self._set or weight.ndim < 2:
            return call.again()
        free = bias if bias is not None and self._free(bias) else None
        before = float(call.output.std(unbiased=False))
        old, old_bias = weight.data, None if free is None else free.data
        with torch.no_grad():
            weight.data = _orthogonal(call, self._source).to(weight.device, weight.dtype)
            if free is not None:
                free.data = torch.zeros_like(free.data)
            made = call.again()
            over = [dim for dim in range(made.ndim) if dim != call.channels % made.ndim]
            mean = made.double().mean(over) if over else made.double()
            centred = made.double() - (
                mean.reshape(_along(made, call.channels)) if free is not None else made.double().mean()
            )
            size = float(centred.square().mean().sqrt())
            if not (math.isfinite(size) and size > 0):
                weight.data = old
                if free is not None and old_bias is not None:
                    free.data = old_bias
                self._odd[place] = "what it makes of the batch is constant or not finite"
                return call.again()
            factor = (_HEAD * self._unit if weight is self._head else 1.0) / size
            weight.data = weight.data * factor
            if free is not None:
                free.data = (-mean * factor).to(free.dtype)
        self._set.add(id(weight))
        result = call.again()
        name = self._weights.names[place]
        if weight is self._head:
            self.head_name = name
        self.changed[name] = (before, float(result.detach().std(unbiased=False)))
        if free is not None:
            self._set.add(id(free))
        return result

    def _free(self, bias: Tensor) -> bool:
        return id(bias) in self._places and id(bias) not in self._kept and id(bias) not in self._set

    def collect(self) -> None:
        """Keep what was set, before it is put back."""
        for identity in self._set:
            place = self._places[identity]
            self.values[place] = self._weights.parameters[place].data.clone()

    def left(self) -> dict[str, str]:
        """Why each weight of two or more dimensions that was not set was left alone."""
        found: dict[str, str] = {}
        for place, (name, parameter) in enumerate(zip(self._weights.names, self._weights.parameters, strict=True)):
            if parameter.ndim < 2 or id(parameter) in self._set:
                continue
            if id(parameter) in self._kept:
                why = "as asked"
            elif id(parameter) in self._shared:
                why = "embeddings and recurrent layers are not set"
            else:
                why = self._odd.get(place, f"no linear map or convolution in `{layer_of(name)}` was called with it")
            found[name] = why
        return found


def _along(made: Tensor, channels: int) -> list[int]:
    shape = [1] * made.ndim
    shape[channels] = -1
    return shape


def _orthogonal(call: Call, source: torch.Generator) -> Tensor:
    """Orthogonal weights of a call's shape, float32, where they are drawn; one block for each group."""
    shape, groups = call.weight.shape, call.groups
    if call.function is ADDMM:
        return _block(shape[1], shape[0], source).T
    rows = shape[0] // groups
    if call.transposed:  # its weight is (in, out / groups, ...): units lie along the second dimension
        blocks = [_block(shape[1], rows * shape[2:].numel(), source) for _ in range(groups)]
        return torch.cat([block.reshape(shape[1], rows, *shape[2:]).transpose(0, 1) for block in blocks])
    blocks = [_block(rows, shape[1:].numel(), source) for _ in range(groups)]
    return torch.cat([block.reshape(rows, *shape[1:]) for block in blocks])


def _block(rows: int, columns: int, source: torch.Generator) -> Tensor:
    block = torch.empty(rows, columns, device=source.device)
    nn.init.orthogonal_(block, generator=source)
    return block
