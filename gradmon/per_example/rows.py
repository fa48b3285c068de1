"""Which rows of a use's output belong to which example.

Not assumed but found out, from some forward passes: one on the batch, one with an example more (the dimension that
grows holds the examples), and two with the examples in other orders (the rows must follow). So a time-first layout is
told from a batch-first one, whatever the sizes, a flattened one in either order, and a model that reorders its examples
is found out: only the identity commutes with both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradmon._batches import select_examples
from gradmon._errors import Unavailable
from gradmon._tensors import length, wide
from gradmon._types import Batch
from gradmon.per_example.capture import Capture, Use


@dataclass(frozen=True)
class Rows:
    """The rows of an output by example.

    Attributes:
        dim: The dimension that holds the examples.
        owner: The example of each index along it, (n,), int64.
    """

    dim: int
    owner: Tensor

    def of(self, example: int) -> Tensor:
        """The indices that belong to an example."""
        return (self.owner == example).nonzero().reshape(-1)


@dataclass(frozen=True)
class Spread:
    """An output without rows that every example shares alike, such as a penalty added to the loss."""


@dataclass(frozen=True)
class Unknown:
    """An output whose rows cannot be told apart, and why."""

    reason: str


Ownership = Rows | Spread | Unknown


class Still(TorchDispatchMode):
    """A context that replaces random tensors by constant ones: examples in another order see the same noise."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:
            position = names.index("dropout_p")
            if position < len(args):
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is torch.ops.aten.randperm.default:
            return torch.arange(args[0], **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() > 1:
            with torch.no_grad():
                result.fill_(result.reshape(-1)[0] if not result.is_floating_point() else result.mean())
        return result


def find_owners(
    run: Callable[[Batch], Capture], batch: Batch, examples: int
) -> tuple[list[Use], list[list[Ownership]]]:
    """The owners of the rows of every use's outputs and activations, with x as a last use where it was asked for.

    Args:
        run: A forward pass on a batch, under a `Capture` that keeps its values.
        batch: The batch.
        examples: The number of its examples, B.

    Returns:
        The uses of the batch's own pass, and for each use the ownership of each of its values.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """
    uses = _uses(run(batch))
    if examples == 1:
        return uses, [[Spread()] * len(use.values) for use in uses]
    moves: list[tuple[Tensor, list[Use]]] = []
    for order in _orders(examples):
        moved = _uses(run(select_examples(batch, order)))
        if [use.signature for use in uses] != [use.signature for use in moved]:
            raise Unavailable("the forward pass takes another course when the examples come in another order")
        moves.append((order, moved))
    wider = _wider(run, batch, examples, uses)
    found: list[list[Ownership]] = []
    for position, use in enumerate(uses):
        shapes = [None] * len(use.values) if wider is None else [value.shape for value in wider[position].values]
        found.append(
            [
                _owner(
                    use.name,
                    place >= len(use.outputs) or (use.additive and value.numel() == 1),
                    value,
                    [(order, moved[position].values[place]) for order, moved in moves],
                    shape,
                )
                for place, (value, shape) in enumerate(zip(use.values, shapes, strict=True))
            ]
        )
    return uses, found


def _uses(capture: Capture) -> list[Use]:
    return capture.uses if capture.x is None else [*capture.uses, capture.x]


def _wider(run: Callable[[Batch], Capture], batch: Batch, examples: int, uses: list[Use]) -> list[Use] | None:
    """The uses on a batch with the first example once more at its end; None where the model refuses that."""
    index = torch.cat([torch.arange(examples), torch.zeros(1, dtype=torch.int64)])
    try:
        wider = _uses(run(select_examples(batch, index)))
    except Exception:  # a model may be built for one batch size: then the order of the rows alone must tell
        return None
    same = len(wider) == len(uses) and all(
        use.name == other.name and [v.ndim for v in use.values] == [v.ndim for v in other.values]
        for use, other in zip(uses, wider, strict=True)
    )
    return wider if same else None


def _orders(n: int) -> list[Tensor]:
    """A cycle through all examples, and the first two exchanged: together they generate every order.

    All orders of two examples commute, so for two the second is the first example twice.
    """
    if n == 2:
        return [torch.tensor([1, 0]), torch.tensor([0, 0])]
    course = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    cycle = torch.empty(n, dtype=torch.int64)
    cycle[course] = course.roll(1)
    return [cycle, torch.tensor([1, 0, *range(2, n)])]


def _owner(
    name: str, may_spread: bool, value: Tensor, moves: list[tuple[Tensor, Tensor]], wider: torch.Size | None
) -> Ownership:
    examples = len(moves[0][0])
    sizes = value.shape
    if wider is None:
        dims = [dim for dim, size in enumerate(sizes) if size and size % examples == 0]
    else:
        dims = [dim for dim, size in enumerate(sizes) if size != wider[dim]]
    if not dims:
        if may_spread:
            return Spread()
        return Unknown(f"`{name}` uses a parameter where the examples are no longer apart")
    if wider is not None and any(sizes[d] % examples or wider[d] * examples != sizes[d] * (examples + 1) for d in dims):
        return Unknown(f"the output of `{name}` has no fixed number of rows per example")
    if wider is not None and len(dims) > 1:
        if any(sizes[dim] != examples for dim in dims):
            return Unknown(f"the output of `{name}` has the examples along several dimensions")
        candidates = [(_worst(value, moves, dims, 1), dims[0], 1)]
    else:
        candidates = [
            (_worst(value, moves, [dim], inner), dim, inner)
            for dim in dims
            for inner in _divisors(sizes[dim] // examples)
        ]
    candidates.sort()
    best, dim, inner = candidates[0]
    epsilon = torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0
    if not best <= epsilon**0.375:
        return Unknown(f"the rows of the output of `{name}` do not follow the order of the examples")
    if len(candidates) > 1 and candidates[1][0] <= 4 * (best + epsilon):
        return Unknown(f"the rows of the output of `{name}` look alike, so that their examples cannot be told")
    index = torch.arange(sizes[dim], device=value.device)
    return Rows(dim, index // inner % examples)


def _divisors(n: int) -> Sequence[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _worst(value: Tensor, moves: list[tuple[Tensor, Tensor]], dims: list[int], inner: int) -> float:
    """How far the rows are from following the examples, in the worst of the orders."""
    worst = 0.0
    for order, moved in moves:
        expected = value
        for dim in dims:
            expected = expected.index_select(dim, _source(value.shape[dim], inner, order, value))
        worst = max(worst, _distance(moved, expected, value))
    return worst


def _source(size: int, inner: int, order: Tensor, like: Tensor) -> Tensor:
    """Where each row comes from when the examples, each ``inner`` rows at a time, are put in another order."""
    index = torch.arange(size)
    block = inner * len(order)
    return (index // block * block + order[index // inner % len(order)] * inner + index % inner).to(like.device)


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The relative distance of two tensors; 0 where all is zero."""
    a, b, scale = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b, scale))
    size, gap = length(scale), length(wide(a) - wide(b))
    return gap if size == 0 else gap / size
