"""Matrix products with a parameter: sums of outer products of what went in and what comes back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Dense, Outer, Shares


def linear(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``linear(input, weight, bias)``, with any number of dimensions before the last."""
    given = part.arguments("input", "weight", "bias")
    x, weight, bias = given["input"], given["weight"], given["bias"]
    flow = part.flow
    if part.is_parameter(x) or weight.ndim != 2 or part.flow_dim == flow.ndim - 2:
        return None
    flow = flow.flatten(1, -2)
    product: Outer | None = None
    if part.is_parameter(weight):
        if part.dim(x) != part.flow_dim:
            return None
        product = Outer(flow, part.rows(x).flatten(1, -2), part.scratch)
    found: list[Shares | Tensor | None] = []
    for source in part.parameters:
        if source is not bias:
            found.append(product)
        elif product is not None and product.light:
            found.append(Dense(flow[:, 0], product.left_products))
        else:
            found.append(flow.sum(1))
    return found


def matmul(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``left @ right``, of which one is a parameter."""
    args = [*part.use.args, *part.use.kwargs.values()]
    return _products(part, args[0], args[1], None)


def addmm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``addmm(input, left, right)`` without factors."""
    given = part.arguments("input", "mat1", "mat2", beta=1, alpha=1)
    if given["beta"] != 1 or given["alpha"] != 1:
        return None
    return _products(part, given["mat1"], given["mat2"], given["input"])


def _products(part: Cut, left: Tensor, right: Tensor, offset: Tensor | None) -> Sequence[Shares | Tensor | None] | None:
    found: list[Shares | Tensor | None] = []
    for source in part.parameters:
        if source is offset:
            shares = part.flow.flatten(1, -2).sum(1) if source.ndim == 1 and part.flow_dim == 0 else None
        elif source is right:
            shares = _right(part, left, right)
        else:
            shares = _left(part, left, right)
        if shares is None:
            return None
        found.append(shares)
    return found


def _right(part: Cut, x: Tensor, weight: Tensor) -> Shares | Tensor | None:
    """``x @ weight``: x (..., i), weight (i, o) or (i,)."""
    if part.is_parameter(x) or x.ndim < 2 or part.dim(x) in (None, x.ndim - 1) or part.dim(x) != part.flow_dim:
        return None
    rows = part.rows(x).flatten(1, -2)
    if weight.ndim == 1:
        return (part.flow.flatten(1)[:, :, None] * rows).sum(1)
    return Outer(rows, part.flow.flatten(1, -2), part.scratch) if weight.ndim == 2 else None


def _left(part: Cut, weight: Tensor, x: Tensor) -> Shares | Tensor | None:
    """``weight @ x``: weight (o, i), x (..., i, t)."""
    if part.is_parameter(x) or weight.ndim != 2 or x.ndim < 2 or part.dim(x) in (None, x.ndim - 2):
        return None
    if part.dim(x) != part.flow_dim:
        return None
    left, right = (values.transpose(-1, -2).flatten(1, -2) for values in (part.flow, part.rows(x)))
    return Outer(left, right, part.scratch)
