"""What happens to a pre-activation on its way to the next layer: slopes and transposed Jacobians."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from gradmon_integrations.workloads.guessers.replay import random_states, replayed, same_states

_ELEMENTWISE_NAMES = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid softplus hardtanh hardswish hardsigmoid "
    "softsign logsigmoid tanhshrink softshrink hardshrink threshold dropout alpha_dropout exp log log1p expm1 sqrt "
    "rsqrt abs sin cos square neg reciprocal erf clamp atan sinh cosh asinh"
)
_VIEW_NAMES = (
    "reshape view flatten unflatten squeeze unsqueeze permute transpose swapaxes swapdims movedim moveaxis t "
    "contiguous narrow select __getitem__"
)


def _functions(names: str) -> frozenset[Any]:
    """The functions of these names, their methods, and those of both that work in place."""
    found: set[Any] = set()
    for name in names.split():
        for held in (F, torch, torch.Tensor):
            for spelled in (name, f"{name}_"):
                if hasattr(held, spelled):
                    found.add(getattr(held, spelled))
    return frozenset(found)


ELEMENTWISE = _functions(_ELEMENTWISE_NAMES)
"""Functions of one tensor, entry by entry: their Jacobian is diagonal."""
STEPS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_})
"""Those whose slope is 0 or 1."""
VIEWS = _functions(_VIEW_NAMES) | {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
"""Functions that only place the entries otherwise."""
_CUTS = frozenset({torch.detach, torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data.__get__})  # type: ignore[attr-defined]
SUMS = frozenset(
    {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__}
)


@dataclass(frozen=True)
class Entry:
    """One call on the way.

    Attributes:
        inputs: The nodes that it reads.
        outputs: The nodes that it makes.
        pull: From the cotangents of the outputs to those of the inputs, None where one does not depend.
        slope: For a call that works entry by entry, its derivative, of the input's shape.
        value: What it made, where that is kept.
        plain: Whether the one output is the one input plus something else of the same shape.
        function: For a call that works entry by entry, the function.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    pull: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
    slope: Tensor | None = None
    value: Tensor | None = None
    plain: bool = False
    function: Any = None


class Tape:
    """The calls between the layers, noted while a model runs.

    Args:
        values: Whether to keep what functions that work entry by entry make.
    """

    def __init__(self, values: bool = False) -> None:
        self.entries: list[Entry] = []
        self.readers: dict[int, int] = {}
        self._values = values
        self._nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0
        self._wanted: set[int] = set()
        self._unread: dict[int, Tensor] = {}
        self._read: dict[int, Tensor] = {}

    def start(self, tensor: Tensor, wanted: bool = False) -> int:
        """A node of its own for a tensor as it is now, of which the value may be asked for."""
        self._count += 1
        self._nodes[tensor] = self._count
        if wanted and self._values:
            self._wanted.add(self._count)
            self._unread[self._count] = tensor
        return self._count

    def value(self, node: int) -> Tensor | None:
        """The value of a tensor that was wanted; None where all that read it was a function of `ELEMENTWISE`."""
        return self._read.get(node, self._unread.get(node))

    def _reads(self, node: int, tensor: Tensor, whole: bool) -> None:
        """Copy what is wanted only where it is read: mostly it is not z, but what a function makes of it."""
        if node in self._wanted:
            self._unread.pop(node, None)
            if whole and node not in self._read:
                self._read[node] = tensor.detach().clone()

    def read(self, tensor: Tensor) -> int | None:
        """The node of a tensor that somebody reads; None where no layer has part in it."""
        node: int | None = self._nodes.get(tensor)
        if node is not None:
            self._reads(node, tensor, True)
            self.readers[node] = self.readers.get(node, 0) + 1
        return node

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function, and note it if it reads a node."""
        flat, layout = tree_flatten((args, dict(kwargs)))
        places = [at for at, value in enumerate(flat) if isinstance(value, Tensor) and value in self._nodes]
        if not places or function in _CUTS:
            return function(*args, **kwargs)
        read = [flat[at] for at in places]
        if function in ELEMENTWISE and len(read) == 1 and args and read[0] is args[0]:
            return self._elementwise(function, read[0], args, kwargs)
        versions = [tensor._version for tensor in read]
        before = [self._nodes[tensor] for tensor in read]
        for node, tensor in zip(before, read, strict=True):
            self._reads(node, tensor, True)
        kept = self._kept(function, flat, places)
        states = random_states()
        result = function(*args, **kwargs)
        made = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor) and value.is_floating_point()]
        changed = [tensor._version != version for tensor, version in zip(read, versions, strict=True)]
        if not made or (len(made) == 1 and any(made[0] is t and not c for t, c in zip(read, changed, strict=True))):
            return result
        for node in before:
            self.readers[node] = self.readers.get(node, 0) + 1
        nodes = tuple(self.start(tensor) for tensor in made)
        shapes = [tuple(tensor.shape) for tensor in read]
        plain = function in SUMS and "alpha" not in kwargs and len(made) == 1
        if plain and all(shape == tuple(made[0].shape) for shape in shapes):
            pull = _sum_pull(len(read))
        elif function in VIEWS and len(read) == 1 and len(made) == 1:
            plain, pull = False, _view_pull(function, flat, layout, places[0], shapes[0])
        else:
            drawn = None if same_states(states, random_states()) else states
            plain, pull = False, _vjp_pull(function, kept, layout, places, drawn)
        self.entries.append(Entry(tuple(before), nodes, pull, plain=plain))
        return result

    def _kept(self, function: Any, flat: list[Any], places: list[int]) -> list[Any]:
        """The arguments for later; copies of those that a function overwrites."""
        name = getattr(function, "__name__", "")
        inside = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        kept = list(flat)
        if inside:
            for at in places:
                kept[at] = flat[at].detach().clone()
        return kept

    def _elementwise(self, function: Any, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        before = self._nodes[x]
        self._reads(before, x, before in self.readers)
        result, slope = value_and_slope(function, x, args[1:], kwargs)
        self.readers[before] = self.readers.get(before, 0) + 1
        node = self.start(result)
        value = result.detach().clone() if self._values else None
        self.entries.append(Entry((before,), (node,), times(slope), slope, value, function=function))
        return result


def value_and_slope(function: Any, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What a function that works entry by entry makes of x, and its slopes; one call, so that it draws once.

    Args:
        function: One of `ELEMENTWISE`.
        x: What it is called with, without tangents; written to where the function works in place.
        args: What follows x.
        kwargs: The named arguments.

    Returns:
        The value, x itself where the function works in place; the slopes, of x's shape, for `STEPS` bools.
    """
    if function in STEPS:
        result = function(x, *args, **kwargs)
        return result, (result <= 0).logical_not_()
    copied = x.detach().clone()
    with _dual_level():
        dual = forward_ad.make_dual(copied, torch.ones_like(x))
        version = copied._version
        result, slope = forward_ad.unpack_dual(function(dual, *args, **kwargs))
        result = result.detach()
    if result.data_ptr() == copied.data_ptr():  # in place, or as it was
        result = x if copied._version == version else x.copy_(result)
    return result, torch.zeros_like(x) if slope is None else slope


def _dual_level() -> contextlib.AbstractContextManager[object]:
    """One of its own, or the one that is already there: they do not nest."""
    return contextlib.nullcontext() if forward_ad._current_level >= 0 else forward_ad.dual_level()


def times(slope: Tensor) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]:
    """What pulls back by a function that works entry by entry."""
    return lambda made: [None if made[0] is None else made[0] * slope]


def _sum_pull(count: int) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]:
    return lambda made: [made[0]] * count


def _view_pull(function: Any, flat: list[Any], layout: Any, place: int, shape: Sequence[int]) -> Callable[..., Any]:
    rest = [None if at == place else value for at, value in enumerate(flat)]

    def pull(made: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        cotangent = made[0]
        if cotangent is None:
            return [None]
        blank = cotangent.new_zeros(shape)
        args, kwargs = tree_unflatten([blank if at == place else value for at, value in enumerate(rest)], layout)
        view: Tensor = function(*args, **kwargs)
        if view.untyped_storage().data_ptr() != blank.untyped_storage().data_ptr():
            return _vjp_pull(function, [blank if at == place else v for at, v in enumerate(rest)], layout, [place])(
                made
            )
        view.copy_(cotangent)
        return [blank]

    return pull


def _vjp_pull(
    function: Any,
    flat: list[Any],
    layout: Any,
    places: list[int],
    states: Sequence[Tensor] | None = None,
) -> Callable[..., Any]:
    """The transposed Jacobian of this one function at what it was called with.

    Args:
        function: The function.
        flat: Its arguments.
        layout: How they were nested.
        places: Those to differentiate by.
        states: The random states from which it drew; None where it did not.
    """
    # Such as running statistics, which a second call must not move again: torch does not tell by their versions.
    held = [at for at, value in enumerate(flat) if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
    others = [at for at in held if at not in places]

    def again(*read: Tensor) -> tuple[Tensor, ...]:
        inputs = list(flat)
        for at, tensor in zip(places, read, strict=True):
            inputs[at] = tensor.clone()  # functions may work in place
        for at in others:
            inputs[at] = flat[at].clone()
        args, kwargs = tree_unflatten(inputs, layout)
        made = [value for value in tree_flatten(function(*args, **kwargs))[0] if isinstance(value, Tensor)]
        return tuple(value for value in made if value.is_floating_point())

    def pull(made: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        with replayed(states):
            values, transposed, *_ = torch.func.vjp(again, *(flat[at].detach() for at in places))
        filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values, made, strict=True)]
        return [part.detach() for part in transposed(tuple(filled))]

    return pull
