"""How gradients arrive: the hooks that wait for them, and how much of them there is room for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from gradmon._parameters import Weights
from gradmon._sandbox import packing_hook
from gradmon.per_example.forms import Shares
from gradmon.per_example.recording import Live

TOO_LARGE = (
    "the examples' gradients of a rank take more than max_memory: allow for more, or look at some coordinates (mask)"
)
"""Why there are no inner products of the examples of several ranks."""


class Arrival(Protocol):
    """A probe at which gradients arrive."""

    def arrive(self, live: Live, places: Sequence[tuple[int, int]], gradients: Sequence[Tensor | None]) -> None:
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


def arrival_hook(recorder: Arrival, live: Live, places: list[tuple[int, int]]) -> Callable[[Any], None]:
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
