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
from gradmon.per_example.capture import Use


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor by example.

    Attributes:
        dim: The dimension that holds the examples.
        inner: How many neighbouring rows belong to one example.
        outer: How often the examples come round.
    """

    dim: int
    inner: int
    outer: int

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """The rows of each example, (B, ...), the dimension `dim` with the rows of one; a view where that can be.

        Raises:
            Unavailable: It has not as many rows for every example.
        """
        if examples == 1:
            return tensor.unsqueeze(0)
        apart = self._apart(tensor, examples).movedim(self.dim + 1, 0)
        return apart.flatten(self.dim + 1, self.dim + 2)

    def alone(self, tensor: Tensor, example: int, examples: int) -> Tensor:
        """The tensor with zeros in the rows of all other examples."""
        if examples == 1:
            return tensor
        kept = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        self._apart(kept, examples).select(self.dim + 1, example).copy_(
            self._apart(tensor, examples).select(self.dim + 1, example)
        )
        return kept

    def _apart(self, tensor: Tensor, examples: int) -> Tensor:
        """The dimension of the rows as (outer, examples, inner); a longer sequence has more rows of the same kind."""
        count, rest = divmod(tensor.shape[self.dim], examples) if tensor.ndim > self.dim else (0, 1)
        inner, outer = self.inner, self.outer
        if outer == 1 and (inner > 1 or count == 1):
            inner = count
        elif inner == 1 and outer > 1:
            outer = count
        if rest or inner * outer != count:
            raise Unavailable("the rows cannot be divided among the examples as before")
        return tensor.unflatten(self.dim, (outer, examples, inner))


@dataclass(frozen=True)
class Spread:
    """A tensor without rows that every example shares alike, such as a penalty added to the loss."""


@dataclass(frozen=True)
class Unknown:
    """A tensor whose rows cannot be told apart, and why."""

    reason: str


Ownership = Rows | Spread | Unknown


@dataclass(frozen=True)
class Planned:
    """A use as it is expected, and whose its rows are.

    Attributes:
        name: The called function.
        positions: For each source the positions of the parameters it is made of.
        outputs: The ownership of each output.
        activations: The ownership of each activation.
    """

    name: str
    positions: list[tuple[int, ...]]
    outputs: list[Ownership]
    activations: list[Ownership]

    def fits(self, use: Use) -> bool:
        """Whether a use is the expected one."""
        return (
            self.name == use.name
            and self.positions == use.positions
            and len(self.outputs) == len(use.outputs)
            and len(self.activations) == len(use.activations)
        )


@dataclass(frozen=True)
class Course:
    """What a forward pass does with the parameters, use by use, and whose rows are whose.

    Attributes:
        uses: The uses, in order.
        x: The ownership of the examples' inputs, where they were asked for.
    """

    uses: list[Planned]
    x: Ownership | None = None


@dataclass(frozen=True)
class Seen:
    """A use in one of the passes from which the course is found; or the inputs x, as one that has no sources.

    Attributes:
        name: The called function.
        positions: For each source the positions of the parameters it is made of.
        outputs: How many of the values are outputs; the others are activations.
        values: Copies of its outputs and activations.
        made: Copies of its sources that are made of parameters by other calls.
        additive: Whether it only adds.
    """

    name: str
    positions: list[tuple[int, ...]]
    outputs: int
    values: list[Tensor]
    made: list[Tensor]
    additive: bool = False

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same when the pass is repeated on as many examples."""
        return (self.name, self.positions, [value.shape for value in self.values])

    @staticmethod
    def of(use: Use) -> Seen:
        """A use as it is now."""
        values = [tensor.detach().clone() for tensor in (*use.outputs, *use.activations)]
        made = [tensor.detach().clone() for tensor in use.made]
        return Seen(use.name, use.positions, len(use.outputs), values, made, use.additive)


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


def find_course(run: Callable[[Batch], list[Seen]], batch: Batch, examples: int, dim: int = 0) -> Course:
    """The course of a forward pass.

    Args:
        run: A forward pass on a batch, at weights among which no zero hides what depends on what; x, where it was
            asked for, comes last and is called ``"x"``.
        batch: The batch.
        examples: The number of its examples, B.
        dim: The dimension of its tensors that holds the examples.

    Returns:
        The uses of the batch's own pass with the ownership of their values.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """
    uses = run(batch)
    if examples == 1:
        return _course(uses, [[Rows(0, 1, 1) if value.ndim else Spread() for value in use.values] for use in uses])
    # All orders of two examples commute, so that a third, the first once more, has to help.
    index = torch.tensor([0, 1, 0]) if examples == 2 else torch.arange(examples)

    def look(order: Tensor) -> list[Seen] | None:
        try:
            return run(select_examples(batch, order, dim))
        except Exception:  # a model may be built for one batch size, a batch may hold what cannot be selected from
            return None

    looked = look(index) if examples == 2 else uses
    other = uses if examples == 2 else look(torch.cat([index, index[:1]]))
    if looked is None or not _alike(looked, uses):
        raise Unavailable("the forward pass takes another course on three examples than on two")
    moves: list[tuple[Tensor, list[Seen]]] = []
    for order in _orders(len(index)):
        moved = look(index[order])
        if moved is None or [use.signature for use in looked] != [use.signature for use in moved]:
            raise Unavailable("the forward pass takes another course when the examples come in another order")
        moves.append((order, moved))
    if any(use.made for use in looked):
        _check_made(looked, look(torch.cat([index[1:2], index[1:]])))
    shapes = other if other is not None and _alike(looked, other) else None
    found: list[list[Ownership]] = []
    for position, use in enumerate(looked):
        owners: list[Ownership] = []
        for place, value in enumerate(use.values):
            seen = _Value(
                name=use.name,
                output=place < use.outputs,
                additive=use.additive,
                value=value,
                moves=[(order, moved[position].values[place]) for order, moved in moves],
                other=None if shapes is None else shapes[position].values[place].shape,
                examples=len(index),
            )
            owners.append(seen.owner())
        found.append(owners)
    return _course(uses, found)


def _course(uses: list[Seen], owners: list[list[Ownership]]) -> Course:
    planned = [
        Planned(use.name, use.positions, own[: use.outputs], own[use.outputs :])
        for use, own in zip(uses, owners, strict=True)
    ]
    entered = bool(uses) and uses[-1].name == "x" and not uses[-1].positions
    return Course(planned[:-1], owners[-1][0]) if entered else Course(planned)


def _alike(uses: list[Seen], others: list[Seen]) -> bool:
    """Whether two passes on different numbers of examples make the same calls."""
    return len(uses) == len(others) and all(
        (use.name, use.positions) == (other.name, other.positions)
        and [v.ndim for v in use.values] == [v.ndim for v in other.values]
        for use, other in zip(uses, others, strict=True)
    )


def _check_made(uses: list[Seen], others: list[Seen] | None) -> None:
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
class _Value:
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

    def owner(self) -> Ownership:
        """The ownership of the value."""
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
        return Rows(dim, inner, self.value.shape[dim] // (self.examples * inner))

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
