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
        run: A forward pass on a batch, under a `Capture` that keeps its values, at weights among which no zero hides
            what depends on what.
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
    # All orders of two examples commute, so that a third, the first once more, has to help.
    index = torch.tensor([0, 1, 0]) if examples == 2 else torch.arange(examples)
    looked = _looked(run, batch, index) if examples == 2 else uses
    other = uses if examples == 2 else _looked(run, batch, torch.cat([index, index[:1]]))
    if looked is None or not _alike(looked, uses):
        raise Unavailable("the forward pass takes another course on three examples than on two")
    moves: list[tuple[Tensor, list[Use]]] = []
    for order in _orders(len(index)):
        moved = _looked(run, batch, index[order])
        if moved is None or [use.signature for use in looked] != [use.signature for use in moved]:
            raise Unavailable("the forward pass takes another course when the examples come in another order")
        moves.append((order, moved))
    if any(use.made for use in looked):
        _check_made(looked, _looked(run, batch, torch.cat([index[1:2], index[1:]])))
    shapes = other if other is not None and _alike(looked, other) else None
    found: list[list[Ownership]] = []
    for position, use in enumerate(looked):
        owners: list[Ownership] = []
        for place, value in enumerate(use.values):
            seen = _Seen(
                name=use.name,
                output=place < len(use.outputs),
                additive=use.additive,
                value=value,
                moves=[(order, moved[position].values[place]) for order, moved in moves],
                other=None if shapes is None else shapes[position].values[place].shape,
                examples=len(index),
            )
            owners.append(seen.owner(uses[position].values[place], examples))
        found.append(owners)
    return uses, found


def _uses(capture: Capture) -> list[Use]:
    return capture.uses if capture.x is None else [*capture.uses, capture.x]


def _looked(run: Callable[[Batch], Capture], batch: Batch, index: Tensor) -> list[Use] | None:
    """The uses on other examples; None where the model refuses them."""
    try:
        return _uses(run(select_examples(batch, index)))
    except Exception:  # a model may be built for one batch size, a batch may hold what cannot be selected from
        return None


def _alike(uses: list[Use], others: list[Use]) -> bool:
    """Whether two passes on different numbers of examples make the same calls."""
    return len(uses) == len(others) and all(
        use.name == other.name and [v.ndim for v in use.values] == [v.ndim for v in other.values]
        for use, other in zip(uses, others, strict=True)
    )


def _check_made(uses: list[Use], others: list[Use] | None) -> None:
    """What is made of parameters alone must not change with the examples.

    Raises:
        Unavailable: It does: the batch came in by a way that was not seen.
    """
    if others is None or [use.signature for use in uses] != [use.signature for use in others]:
        raise Unavailable("the forward pass takes another course on other examples")
    for use, other in zip(uses, others, strict=True):
        for before, after in zip(use.made, other.made, strict=True):
            if before.shape != after.shape or not torch.equal(before, after):
                raise Unavailable(f"what `{use.name}` is given depends on the batch in a way that is not seen")


def _orders(n: int) -> list[Tensor]:
    """A cycle through all examples, and the first two exchanged: together they generate every order."""
    course = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    cycle = torch.empty(n, dtype=torch.int64)
    cycle[course] = course.roll(1)
    return [cycle, torch.tensor([1, 0, *range(2, n)])]


@dataclass(frozen=True)
class _Seen:
    """One output or activation of a use in all passes.

    Attributes:
        name: The called function.
        output: Whether it is an output.
        additive: Whether the call only adds.
        value: As it was.
        moves: As it was with the examples in other orders, with these orders.
        other: Its shape with another number of examples; None where the model refuses that.
        examples: The number of examples.
    """

    name: str
    output: bool
    additive: bool
    value: Tensor
    moves: list[tuple[Tensor, Tensor]]
    other: torch.Size | None
    examples: int

    def owner(self, own: Tensor, count: int) -> Ownership:
        """The ownership of the value in the batch's own pass, with its own number of examples."""
        dims = self._dims()
        if isinstance(dims, Unknown):
            return dims
        if not dims:
            return self._apart()
        several = self.other is not None and len(dims) > 1
        if several and any(self.value.shape[dim] != self.examples for dim in dims):
            return Unknown(f"the output of `{self.name}` has the examples along several dimensions")
        if several:
            candidates = [(self._worst(dims, 1), dims[0], 1)]
        else:
            candidates = [
                (self._worst([dim], inner), dim, inner)
                for dim in dims
                for inner in _divisors(self.value.shape[dim] // self.examples)
            ]
        candidates.sort()
        best, dim, inner = candidates[0]
        if not best <= self._epsilon**0.375:
            return Unknown(f"the rows of the output of `{self.name}` do not follow the order of the examples")
        if len(candidates) > 1 and candidates[1][0] <= 4 * (best + self._epsilon):
            return Unknown(f"the rows of the output of `{self.name}` look alike, so that their examples cannot be told")
        index = torch.arange(own.shape[dim], device=own.device)
        return Rows(dim, index // inner % count)

    @property
    def _epsilon(self) -> float:
        known = self.value.is_floating_point() or self.value.is_complex()
        return torch.finfo(self.value.dtype).eps if known else 0.0

    def _dims(self) -> list[int] | Unknown:
        """The dimensions that may hold the examples."""
        sizes, other, n = self.value.shape, self.other, self.examples
        if other is None:
            return [dim for dim, size in enumerate(sizes) if size and size % n == 0]
        dims = [dim for dim, size in enumerate(sizes) if size != other[dim]]
        # Either pass may be the one with an example more.
        for dim in dims:
            rows = abs(other[dim] - sizes[dim])
            if sizes[dim] != rows * n:
                return Unknown(f"the output of `{self.name}` has no fixed number of rows per example")
        return dims

    def _apart(self) -> Ownership:
        """The ownership of what has no rows: an activation is shared by all, an output only if it is a sum over all."""
        if not self.output:
            return Spread()
        still = all(_distance(moved, self.value, self.value) <= self._epsilon**0.375 for _, moved in self.moves)
        if self.additive and self.value.numel() == 1 and still:
            return Spread()
        return Unknown(f"`{self.name}` uses a parameter where the examples are no longer apart")

    def _worst(self, dims: list[int], inner: int) -> float:
        """How far the rows are from following the examples, in the worst of the orders."""
        worst = 0.0
        for order, moved in self.moves:
            expected = self.value
            for dim in dims:
                expected = expected.index_select(dim, _source(self.value.shape[dim], inner, order, self.value))
            worst = max(worst, _distance(moved, expected, self.value))
        return worst


def _divisors(n: int) -> Sequence[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


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
