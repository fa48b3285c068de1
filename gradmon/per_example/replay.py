"""All examples' shares of one use at once: the call is made again for each example on its own rows.

The call's activations are cut into the examples' rows, and the vector-Jacobian product with respect to the parameters
is vectorised over the examples. That is right only where the call treats its rows alike, so it is never trusted: what
comes out is compared with the whole batch and with one example done the slow way, and is dropped on a mismatch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradmon._tensors import length, wide
from gradmon.per_example.capture import Call, Use
from gradmon.per_example.rows import Ownership, Rows, Spread

_MOST = 1 << 25
"""The most numbers to hold at once."""


class Shares(NamedTuple):
    """The shares of all examples in one source of a use.

    Attributes:
        rows: Their looked-at coordinates, (B, k).
        total: Their sum.
        one: The whole share of one example.
        length: The norm of all of them together.
    """

    rows: Tensor
    total: Tensor
    one: Tensor
    length: float


@dataclass(frozen=True)
class Cut:
    """A use cut into the examples' rows.

    Attributes:
        call: The call.
        aliases: The parameters, or what is made of them, that it was given.
        activations: Its activations, (B, *rows of one example), or whole where all examples share them.
        shared: Which of them are shared.
        flows: ``B dL/d output``, (B, *rows of one example).
        examples: The number B of examples.
        example: The example whose whole share is wanted, to be compared.
    """

    call: Call
    aliases: list[Tensor]
    activations: list[Tensor]
    shared: list[bool]
    flows: list[Tensor]
    examples: int
    example: int


Picks = Sequence[Tensor | None]
"""For each source of a use the coordinates that are looked at; None for all."""
Rule = Callable[[Cut, Picks], "list[Shares] | None"]


def cut(use: Use, owners: list[Ownership], flows: Sequence[Tensor | None], examples: int, example: int) -> Cut | None:
    """A use cut into rows; None where that cannot be.

    Args:
        use: The use.
        owners: The ownership of its outputs and activations.
        flows: The gradients at its outputs.
        examples: The number B of examples.
        example: The example whose whole share is wanted.
    """
    call = use.call
    if call is None or any(now._version != then for now, then in zip(call.activations, call.versions, strict=True)):
        return None
    aliases = [alias for alias, _ in use.sources if isinstance(alias, Tensor)]
    if len(aliases) != len(use.sources):
        return None
    seeds: list[Tensor] = []
    for flow, owner in zip(flows, owners, strict=False):
        part = _by_example(flow, owner, examples) if flow is not None and isinstance(owner, Rows) else None
        if part is None:
            return None
        seeds.append(part * examples)
    heights = owners[len(use.outputs) :]
    activations: list[Tensor] = []
    for tensor, owner in zip(call.activations, heights, strict=True):
        part = _by_example(tensor.detach(), owner, examples) if isinstance(owner, Rows) else tensor.detach()
        if part is None or not isinstance(owner, (Rows, Spread)):
            return None
        activations.append(part)
    shared = [isinstance(owner, Spread) for owner in heights]
    return Cut(call, aliases, activations, shared, seeds, examples, example)


def replay(part: Cut, picks: Picks) -> list[Shares] | None:
    """The shares of all examples by a vectorised vector-Jacobian product of the call itself."""
    rows: list[list[Tensor]] = [[] for _ in part.aliases]
    totals: list[Tensor | float] = [0.0] * len(rows)
    squares = [0.0] * len(rows)
    ones: list[Tensor | None] = [None] * len(rows)
    start = 0
    for group in _groups(part):
        count = len(group[0])
        for source, (piece, pick) in enumerate(zip(group, picks, strict=True)):
            flat = piece.reshape(count, -1)
            rows[source].append(flat if pick is None else flat[:, pick])
            totals[source] = piece.sum(0) + totals[source]
            squares[source] += length(piece) ** 2
            if start <= part.example < start + count:
                ones[source] = piece[part.example - start].clone()
        start += count
    found = [
        Shares(torch.cat(parts), total, one, math.sqrt(square))
        for parts, total, one, square in zip(rows, totals, ones, squares, strict=True)
        if isinstance(total, Tensor) and one is not None
    ]
    return found if len(found) == len(rows) else None


def linear(part: Cut, picks: Picks) -> list[Shares] | None:
    """The shares in ``linear(x, weight, bias)``: without a time axis outer products, of which only a part is made."""
    x, flow = part.activations[0], part.flows[0]
    if len(part.activations) != 1 or part.shared[0] or x.ndim != 3 or x.shape[1] != 1:
        return replay(part, picks)
    x, flow = x[:, 0], flow[:, 0]
    example = part.example
    found: list[Shares] = []
    for alias, pick in zip(part.aliases, picks, strict=True):
        if alias.ndim == 1:
            found.append(Shares(flow if pick is None else flow[:, pick], flow.sum(0), flow[example], length(flow)))
            continue
        if pick is None:
            rows = (flow[:, :, None] * x[:, None, :]).flatten(1)
        else:
            rows = flow[:, pick // x.shape[1]] * x[:, pick % x.shape[1]]
        size = math.sqrt(float(wide(flow).square().sum(1) @ wide(x).square().sum(1)))
        found.append(Shares(rows, flow.T @ x, torch.outer(flow[example], x[example]), size))
    return found


RULES: dict[Callable[..., Any], Rule] = {functional.linear: linear}
"""How the shares in a function's uses are had faster than by `replay`."""


def _groups(part: Cut) -> Generator[list[Tensor]]:
    """The shares of some examples at a time, for each source (b, *shape)."""

    def one(activations: list[Tensor], flowing: list[Tensor]) -> tuple[Tensor, ...]:
        moved = {id(tensor): piece for tensor, piece in zip(part.call.activations, activations, strict=True)}

        def outputs(*parameters: Tensor) -> tuple[Tensor, ...]:
            return part.call.again({**moved, **{id(a): p for a, p in zip(part.aliases, parameters, strict=True)}})

        pull: Callable[[Any], tuple[Tensor, ...]] = torch.func.vjp(outputs, *(a.detach() for a in part.aliases))[1]
        return pull(tuple(flowing))

    every: Any = torch.func.vmap(one, in_dims=([None if shared else 0 for shared in part.shared], 0))
    step = max(1, _MOST // max(1, sum(alias.numel() for alias in part.aliases)))
    for start in range(0, part.examples, step):
        chosen = slice(start, start + step)
        own = [a if shared else a[chosen] for a, shared in zip(part.activations, part.shared, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that vmap loops over the examples where it knows no better way
            found = list(every(own, [flow[chosen] for flow in part.flows]))
        yield found


def _by_example(tensor: Tensor, owner: Rows, examples: int) -> Tensor | None:
    """The rows of each example, (B, *shape), where all have as many; None where they have not."""
    rows = owner.owner.numel()
    if rows % examples or tensor.shape[owner.dim] != rows:
        return None
    together = tensor.index_select(owner.dim, torch.argsort(owner.owner, stable=True))
    shape = (*together.shape[: owner.dim], examples, rows // examples, *together.shape[owner.dim + 1 :])
    return together.reshape(shape).movedim(owner.dim, 0).contiguous()
