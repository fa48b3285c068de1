"""How gradients arrive: the hooks that wait for them, and how much of them there is room for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradmon._parameters import Weights
from gradmon._sandbox import packing_hook
from gradmon.per_example.forms import Shares
from gradmon.per_example.recording import Live

TOO_LARGE = (
    "the examples' gradients of a rank take more than max_memory: allow for more, or look at some coordinates (mask)"
)
"""Why there are no inner products of the examples of several ranks."""


class Source(NamedTuple):
    """Where among the outputs of a node of the graph a tensor is, without the node, which would keep itself alive.

    Attributes:
        number: Which output it is, or that it is a view of.
        layout: Size and strides of the output that it is a view of, and its own with its offset therein; None where it
            is the output itself.
    """

    number: int
    layout: tuple[torch.Size, tuple[int, ...], torch.Size, tuple[int, ...], int] | None

    def take(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of the tensor, of those that arrived at the node."""
        gradient = gradients[self.number]
        if gradient is None or self.layout is None:
            return gradient
        sizes, strides, size, stride, offset = self.layout
        if gradient.stride() != strides:
            gradient = gradient.new_empty_strided(sizes, strides).copy_(gradient)
        return gradient.as_strided(size, stride, gradient.storage_offset() + offset)


def source_of(tensor: Tensor) -> tuple[Any, Source]:
    """The node at which the gradient of a tensor, as it is now, arrives, and where: also if it is overwritten later.

    A view that is overwritten gets another node, and the one that it had is never reached. That of the tensor that it
    is a view of is, and is taken where both hold the same numbers.
    """
    base = tensor._base
    if base is None or base.grad_fn is None or base.numel() != tensor.numel() or 0 in tensor.stride():
        return tensor.grad_fn, Source(tensor.output_nr, None)
    offset = int(tensor.storage_offset()) - int(base.storage_offset())
    return base.grad_fn, Source(base.output_nr, (base.size(), base.stride(), tensor.size(), tensor.stride(), offset))


class Arrival(Protocol):
    """A probe at which gradients arrive."""

    def arrive(self, live: Live, places: Sequence[tuple[int, Source]], gradients: Sequence[Tensor | None]) -> None:
        """The gradient at some outputs of a use."""
        ...


def picked(weights: Weights, position: int) -> Tensor | None:
    """The coordinates of one parameter that are looked at; None for all."""
    return None if weights.picks is None else weights.picks[position]


def rows_size(weights: Weights, position: int, forms: Sequence[Sequence[Shares]]) -> int:
    """The bytes of the looked-at coordinates of one parameter's gradients, for the examples of some groups."""
    index = picked(weights, position)
    held = weights.sizes[position] if index is None else index.numel()
    return sum(shares[0].examples for shares in forms) * held * weights.parameters[position].element_size()


def arrival_hook(recorder: Arrival, live: Live, places: list[tuple[int, Source]]) -> Callable[[Any], None]:
    """A hook that tells a probe of the gradient at some outputs of a use."""
    # A graph may outlive its step, and must not keep what was found there.
    held = weakref.ref(recorder)

    def arrived(gradients: Sequence[Tensor | None]) -> None:
        now = held()
        if now is not None:
            now.arrive(live, places, gradients)

    return arrived


def recomputed() -> bool:
    """Whether this is a checkpointed part, which is going to be computed once more in the backward pass."""
    return getattr(packing_hook(), "__module__", "") == "torch.utils.checkpoint"
