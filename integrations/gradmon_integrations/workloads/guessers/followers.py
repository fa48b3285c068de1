"""Passes that meet the layers again which a first pass found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.inputs import Inputs
from gradmon_integrations.workloads.guessers.layers import Layer, layer_call
from gradmon_integrations.workloads.guessers.recording import Site, Structure

Inject = Callable[[Site], Tensor | None]
"""From a layer to the tangents of its z, (count, *z.shape), or None for none."""


def differs(got: str) -> NoReturn:
    """Refuse a model whose passes differ.

    Raises:
        ArgumentError: Always.
    """
    raise ArgumentError("model", "compute the same in every forward pass over a batch", got)


@contextlib.contextmanager
def swapped(model: nn.Module, duals: Mapping[int, Tensor]) -> Generator[None]:
    """The modules' parameters replaced: for functions of the caller's own, which no mode sees."""
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    if duals:
        for module in model.modules():
            table: dict[str, Any] = module._parameters
            held += [(table, name, p) for name, p in table.items() if p is not None and id(p) in duals]
    try:
        for table, name, parameter in held:
            table[name] = duals[id(parameter)]
        yield
    finally:
        for table, name, parameter in held:
            table[name] = parameter


class Duals:
    """Calls functions with the tangents of some parameters, and without those of constants.

    Args:
        every: The names of the model's parameters by identity.
        duals: The dual numbers that stand for some of them, by the parameters' identity.
        layouts: See `Structure`.
    """

    def __init__(
        self, every: Mapping[int, str], duals: Mapping[int, Tensor], layouts: Mapping[int, list[tuple[int, ...]]]
    ) -> None:
        self.every = {**every, **{id(dual): every[key] for key, dual in duals.items()}} if duals else every
        self._duals, self._layouts, self._calls = duals, layouts, 0

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._duals.get(id(value), value)
        if type(value) in (tuple, list) and any(isinstance(part, Tensor) for part in value):
            return type(value)(self._replaced(part) for part in value)
        return value

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], replace: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the next function, with tangents, in the order in memory that they had at first."""
        if self._layouts:
            args, kwargs = self._laid_out(args, kwargs)
        self._calls += 1
        if self._duals and replace:
            args = tuple(self._replaced(value) for value in args)
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
        return args, kwargs

    def _laid_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        strides = self._layouts.get(self._calls)
        found = iter(strides or ())

        def place(tensor: Tensor) -> Tensor:
            wanted = next(found, tensor.stride())
            if wanted == tensor.stride() or len(wanted) != tensor.ndim:
                return tensor
            laid = torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device)
            return laid.copy_(tensor)

        return (args, kwargs) if strides is None else tree_map_only(Tensor, place, (args, kwargs))

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Without tangents; what is written to in place, and returned, keeps its own."""
        originals: dict[int, Tensor] = {}

        def plain(tensor: Tensor) -> Tensor:
            found = forward_ad.unpack_dual(tensor)
            if found.tangent is None:
                return tensor
            originals[id(found.primal)] = tensor
            return found.primal

        args, kwargs = tree_map_only(Tensor, plain, self.arguments(args, kwargs, False))
        result = function(*args, **kwargs)
        return originals.get(id(result), result)

    def layer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, layer: Layer
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's x and z without their tangents, and the tangent of z."""
        kept = forward_ad.unpack_dual(x)
        # A weight that is no parameter may have been worked out of what has a tangent.
        if any(held is not None and self._moves(held) for held in (layer.weight, layer.bias)):
            z, tangent = forward_ad.unpack_dual(function(*args, **kwargs))
            return kept.primal, z, tangent
        if kept.tangent is None:
            return kept.primal, function(*args, **kwargs), None
        # One product instead of the two that autograd makes of a tangent that it does not know to be zero.
        replaced = [kept.primal if value is x else value for value in args]
        named = {name: kept.primal if value is x else value for name, value in kwargs.items()}
        return kept.primal, function(*replaced, **named), layer.push(kept.tangent)

    def _moves(self, held: Tensor) -> bool:
        return (bool(self._duals) or id(held) not in self.every) and forward_ad.unpack_dual(held).tangent is not None

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no layer."""
        return _STAND_INS.get(function, function)(*args, **kwargs)


class _Follower:
    """Meets the layers again, in the order in which they were recorded."""

    def __init__(self, sites: list[Site], examples: int) -> None:
        self._sites, self._examples, self._met = sites, examples, 0

    def next(self, layer: Layer, x: Tensor, z: Tensor) -> Site | None:
        """The layer that is met; None for one whose rows are no examples.

        Raises:
            ArgumentError: The model called other layers this time.
        """
        if not (layer.batched and z.ndim >= 2 and z.shape[0] == self._examples == x.shape[0]):
            return None
        site = self._sites[self._met] if self._met < len(self._sites) else None
        if site is None or site.shape != tuple(z.shape):
            differs(f"output of shape {tuple(z.shape)}" if site is None else f"{tuple(z.shape)} after {site.shape}")
        self._met += 1
        return site

    def finish(self) -> None:
        """The pass is over.

        Raises:
            ArgumentError: It called fewer layers.
        """
        if self._met != len(self._sites):
            differs(f"{self._met} layers after {len(self._sites)}")


class Visitor:
    """Looks at the layers, without tangents.

    Args:
        every: The names of the parameters by identity.
        sites: The layers.
        examples: B.
        look: Is given each layer, its x and its z.
    """

    def __init__(
        self,
        every: Mapping[int, str],
        sites: list[Site],
        examples: int,
        look: Callable[[Site, Tensor, Tensor], None],
    ) -> None:
        self._every, self._follower, self._look = every, _Follower(sites, examples), look
        self.finish = self._follower.finish

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that no gradient goes through."""
        return function(*args, **kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function."""
        call = layer_call(function, args, kwargs, self._every)
        z = function(*args, **kwargs)
        site = None if call is None else self._follower.next(call[1], call[0], z)
        if call is not None and site is not None:
            self._look(site, call[0], z)
        return z


class Injector:
    """Adds tangents to the layers' pre-activations.

    Args:
        every: The names of the parameters by identity.
        structure: The layers.
        examples: B.
        inject: The tangents.
        duals: The dual numbers that stand for some of the parameters, by the parameters' identity.
        place: Which of the tangents.
        inputs: Where the layers' inputs are kept; None to leave them.
    """

    def __init__(
        self,
        every: Mapping[int, str],
        structure: Structure,
        examples: int,
        inject: Inject,
        duals: Mapping[int, Tensor],
        place: Tensor | int,
        inputs: Inputs | None = None,
    ) -> None:
        self._duals, self._follower = Duals(every, duals, structure.layouts), _Follower(structure.sites, examples)
        self._inject, self._place, self._inputs = inject, place, inputs
        self.constant, self.finish = self._duals.constant, self._follower.finish

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, with tangents."""
        args, kwargs = self._duals.arguments(args, kwargs, True)
        call = layer_call(function, args, kwargs, self._duals.every)
        if call is None:
            return self._duals.other(function, args, kwargs)
        x, z, tangent = self._duals.layer(function, args, kwargs, *call)
        site = self._follower.next(call[1], x, z)
        if site is not None:
            if self._inputs is not None and site.guessed:
                self._inputs.keep(site.number, x)
            y = self._inject(site)
            if y is not None:
                y = y[self._place]
                tangent = y if tangent is None else tangent + y
        return z if tangent is None else forward_ad.make_dual(z, tangent)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ||v||``, the norm over all dimensions but one."""
    rest = [at for at in range(v.ndim) if at != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=rest, keepdim=True))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Rows of a table; no gradient reaches that of padding, and so no tangent leaves it."""
    found = F.embedding(input, weight, padding_idx, *args, **kwargs)
    rows, tangent = forward_ad.unpack_dual(found)
    if padding_idx is None or tangent is None:
        return found
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return forward_ad.make_dual(rows, tangent.masked_fill(padding, 0))


_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    F.embedding: _embedding,
}
"""For functions of torch whose forward-mode derivative is missing, or not what backpropagation takes."""
