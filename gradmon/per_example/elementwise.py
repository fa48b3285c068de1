"""Sums and products with a parameter entry by entry, and PReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Shares


def addition(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``input + alpha * other``, in place too."""
    given = part.arguments("input", "other", alpha=1)
    return _summed(part, part.flow, {id(given["input"]): 1.0, id(given["other"]): given["alpha"]})


def subtraction(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``input - alpha * other``, in place too."""
    given = part.arguments("input", "other", alpha=1)
    return _summed(part, part.flow, {id(given["input"]): 1.0, id(given["other"]): -given["alpha"]})


def multiplication(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``input * other`` of a parameter and something else, in place too."""
    given = part.arguments("input", "other")
    left, right = given["input"], given["other"]
    if len(part.parameters) != 1 or not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left is right:
        return None
    x = right if part.is_parameter(left) else left
    arrived = part.arrived[0]
    if arrived is None or x.shape != arrived.shape:
        return None
    return _summed(part, part.flow * part.split(part.whole(x)), {id(part.parameters[0]): 1.0})


def prelu(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``prelu(input, weight)``: one slope, or one for each channel."""
    given = part.arguments("input", "weight")
    x, weight = given["input"], given["weight"]
    flow = part.flow
    if part.is_parameter(x) or part.flow_dim == 1:
        return None
    below = flow * part.split(part.whole(x)).clamp(max=0)
    if weight.numel() == 1:
        return [below.flatten(1).sum(1).reshape(part.examples, *weight.shape)]
    dims = tuple(d for d in range(1, below.ndim) if d != 2)
    return [below.sum(dims) if dims else below]


def _summed(part: Cut, flow: Tensor, factors: dict[int, float]) -> Sequence[Shares | Tensor | None] | None:
    """What flows back, summed over the dimensions along which a parameter was stretched."""
    found: list[Shares | Tensor | None] = []
    for source in part.parameters:
        missing = flow.ndim - 1 - source.ndim
        sizes = (*[1] * missing, *source.shape)
        if part.flow_dim is None or sizes[part.flow_dim] != 1:  # another entry for every example
            return None
        dims = [d + 1 for d, size in enumerate(sizes) if size == 1]
        reduced = flow.sum(dims) if dims else flow
        found.append(reduced.reshape(part.examples, *source.shape) * factors[id(source)])
    return found
