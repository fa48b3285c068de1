"""Whose the rows of a use's values are: not assumed but found out, from some forward passes.

One on a few examples, one with an example more (the dimension that grows holds the examples), and two with the examples
in other orders (the rows must follow). So a time-first layout is told from a batch-first one, whatever the sizes, a
flattened one in either order, and a model that reorders its examples is found out: only the identity commutes with both
orders. What is drawn at random is held still meanwhile; if it may be an order, two more passes with another one
tell whether an example's rows are still its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradmon._batches import select_examples
from gradmon._errors import GradmonError, Unavailable
from gradmon._tensors import length, wide
from gradmon._types import Batch
from gradmon.per_example.capture import Use
from gradmon.per_example.deciding import NOTHING, Decided
from gradmon.per_example.rows import Course, Ownership, Planned, Rows, Spread, Unknown
from gradmon.per_example.still import Still


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
        ragged: Whether the number of its rows may depend on the contents of the batch.
        decided: What the batch has chosen before.
    """

    name: str
    positions: list[tuple[int, ...]]
    outputs: int
    values: list[Tensor]
    made: list[Tensor]
    additive: bool = False
    ragged: bool = False
    decided: Decided = NOTHING

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same when the pass is repeated on as many examples."""
        return (self.name, self.positions, [value.shape for value in self.values])

    def without_values(self) -> Seen:
        """The same without the contents of its values."""
        return replace(self, values=[value.to("meta") for value in self.values])

    @staticmethod
    def of(use: Use) -> Seen:
        """A use as it is now."""
        values = [tensor.detach().clone() for tensor in (*use.outputs, *use.activations)]
        made = [tensor.detach().clone() for tensor in use.made]
        return Seen(use.name, use.positions, len(use.outputs), values, made, use.additive, use.ragged, use.decided)


_FEW = 3
"""How many examples tell the dimension and the order of the rows; a batch of two is not enough."""

Run = Callable[[Batch, Callable[["Seen"], None], Still], None]
"""A forward pass on a batch, with randomness held still, that tells of every use as it is made."""


def find_course(run: Run, batch: Batch, examples: int, dim: int = 0, *, few: bool = True) -> Course:
    """The course of a forward pass.

    Args:
        run: A forward pass on a batch, at weights among which no zero hides what depends on what; x, where it was
            asked for, comes last and is called ``"x"``.
        batch: The batch.
        examples: The number of its examples, B.
        dim: The dimension of its tensors that holds the examples.
        few: Whether to look at a few examples first, which takes less memory.

    Returns:
        The uses with the ownership of their values.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """
    if examples == 1:
        uses = _shapes(run, batch)
        return _course(uses, [[Rows(0, 1, 1)] * len(use.values) for use in uses])
    if few and examples > _FEW:
        try:
            course = _looked_at(run, batch, torch.arange(_FEW), dim, few=True)
        except GradmonError:  # the whole batch is going to say it again, of itself
            course = None
        if course is not None and not any(isinstance(o, Unknown) for use in course.uses for o in use.outputs):
            return course
    # All orders of two examples commute, so that a third, the first once more, has to help.
    return _looked_at(run, batch, torch.tensor([0, 1, 0]) if examples == 2 else torch.arange(examples), dim)


def _looked_at(run: Run, batch: Batch, index: Tensor, dim: int, *, few: bool = False) -> Course:
    """The course on some examples.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """

    def select(order: Tensor) -> Batch:
        try:
            return select_examples(batch, order, dim)
        except Exception as error:
            raise Unavailable(f"the examples cannot be put in another order: {error}") from error

    other: list[Seen] | None
    try:
        other = _shapes(run, select(torch.cat([index, index[:1]])))
    except Exception:  # a model may be built for one batch size
        other = None
    looked: list[Seen] = []
    run(select(index), looked.append, still := Still())
    if few and still.foreign:
        raise Unavailable("an order that numpy or Python draws of a few examples may be the usual one by chance")
    if other is not None and not _alike(looked, other):
        other = None
    values = [
        [
            _Value(
                name=use.name,
                output=place < use.outputs,
                additive=use.additive,
                ragged=use.ragged,
                value=value,
                other=None if other is None else other[position].values[place].shape,
                examples=len(index),
            )
            for place, value in enumerate(use.values)
        ]
        for position, use in enumerate(looked)
    ]
    replaced = torch.cat([index[1:2], index[1:]])
    for order in orders(len(index)):
        _compare(run, select(index[order]), looked, lambda p, v, moved, o=order: values[p][v].compare(o, moved))
    if any(use.made for use in looked):
        others: list[Seen] = []
        run(select(replaced), lambda seen: others.append(seen.without_values()), Still())
        _check_made(looked, others)
    owners = [[value.owner() for value in use] for use in values]
    if still.orders:
        _check_turned(run, select(index), select(replaced), looked, owners)
    return _course(looked, owners, _chosen(looked, other))


def _chosen(looked: list[Seen], other: list[Seen] | None) -> list[bool]:
    """At which uses the order of the rows may depend on what the batch holds."""
    if other is None:
        return [use.decided.among > 0 for use in looked]
    return [use.decided.among != more.decided.among for use, more in zip(looked, other, strict=True)]


def _check_turned(run: Run, batch: Batch, replaced: Batch, looked: list[Seen], owners: list[list[Ownership]]) -> None:
    """Find values whose rows are in an order that is drawn: where it is turned round, they are another example's.

    Args:
        run: A forward pass.
        batch: Some examples.
        replaced: The same, but for the first.
        looked: The uses.
        owners: Whose their values are; unknown instead where another example's rows change with the first one.

    Raises:
        Unavailable: The pass takes another course.
    """
    before: list[list[Tensor]] = [[] for _ in looked]
    _compare(run, batch, looked, lambda p, v, value: before[p].append(value), turned=True)

    def compare(p: int, v: int, after: Tensor) -> None:
        owner = owners[p][v]
        if not isinstance(owner, Rows) or after.shape != before[p][v].shape:
            return
        examples = after.shape[owner.dim] // (owner.inner * owner.outer)
        moved = owner.split(after != before[p][v], examples).reshape(examples, -1).any(1)
        if moved[1:].any() and not moved[0]:
            owners[p][v] = Unknown(
                f"the rows of the output of `{looked[p].name}` are in an order that is drawn at random"
            )

    _compare(run, replaced, looked, compare, turned=True)


def _shapes(run: Run, batch: Batch) -> list[Seen]:
    """The uses of a pass without the contents of their values."""
    found: list[Seen] = []
    run(batch, lambda seen: found.append(seen.without_values()), Still())
    return found


def _compare(
    run: Run, batch: Batch, looked: list[Seen], tell: Callable[[int, int, Tensor], None], *, turned: bool = False
) -> None:
    """Tell of each value of another pass, one after the other, so that never all of them are held.

    Raises:
        Unavailable: The pass takes another course.
    """
    count = 0

    def note(seen: Seen) -> None:
        nonlocal count
        if count >= len(looked) or seen.signature != looked[count].signature:
            raise Unavailable("the forward pass takes another course when the examples come in another order")
        for place, value in enumerate(seen.values):
            tell(count, place, value)
        count += 1

    run(batch, note, Still(turned=turned))
    if count != len(looked):
        raise Unavailable("the forward pass takes another course when the examples come in another order")


def _course(uses: list[Seen], owners: list[list[Ownership]], chosen: Sequence[bool] = ()) -> Course:
    first = next((place for place, moves in enumerate(chosen) if moves), None)
    sure = len(chosen) if first is None else first
    planned = [
        Planned(
            name=use.name,
            positions=use.positions,
            outputs=own[: use.outputs],
            activations=own[use.outputs :],
            choices=use.decided.calls if place < sure else None,
        )
        for place, (use, own) in enumerate(zip(uses, owners, strict=True))
    ]
    entered = bool(uses) and uses[-1].name == "x" and not uses[-1].positions
    return Course(planned[:-1], owners[-1][0], first) if entered else Course(planned, chosen=first)


def _alike(uses: list[Seen], others: list[Seen]) -> bool:
    """Whether two passes on different numbers of examples make the same calls."""
    return len(uses) == len(others) and all(
        (use.name, use.positions) == (other.name, other.positions)
        and [v.ndim for v in use.values] == [v.ndim for v in other.values]
        for use, other in zip(uses, others, strict=True)
    )


def _check_made(uses: list[Seen], others: list[Seen]) -> None:
    """What is made of parameters alone must not change with the examples.

    Raises:
        Unavailable: It does: the batch came in by a way that was not seen.
    """
    if [use.signature for use in uses] != [use.signature for use in others]:
        raise Unavailable("the forward pass takes another course on other examples")
    for use, other in zip(uses, others, strict=True):
        for before, after in zip(use.made, other.made, strict=True):
            if before.shape != after.shape or not torch.equal(before, after):
                raise Unavailable(f"what `{use.name}` is given depends on the batch in a way that is not seen")


def orders(n: int) -> list[Tensor]:
    """A cycle through all examples, and the first two exchanged: together they generate every order."""
    course = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    cycle = torch.empty(n, dtype=torch.int64)
    cycle[course] = course.roll(1)
    return [cycle, torch.tensor([1, 0, *range(2, n)])]


@dataclass
class _Value:
    """One output or activation of a use in all passes.

    Attributes:
        name: The called function.
        output: Whether it is an output.
        additive: Whether the call only adds.
        ragged: Whether the number of its rows may depend on the contents of the batch.
        value: As it was.
        other: Its shape with another number of examples; None where the model refuses that.
        examples: The number of examples.
    """

    name: str
    output: bool
    additive: bool
    ragged: bool
    value: Tensor
    other: torch.Size | None
    examples: int
    _gaps: dict[tuple[tuple[int, ...], int], float] = field(default_factory=dict[Any, float])
    _moved: list[float] = field(default_factory=list[float])

    def compare(self, order: Tensor, moved: Tensor) -> None:
        """Take in the value as it is with the examples in another order."""
        candidates = self._candidates()
        for dims, inner in [] if isinstance(candidates, Unknown) else candidates:
            expected = self.value
            for dim in dims:
                expected = expected.index_select(dim, _source(self.value.shape[dim], inner, order, self.value))
            gap = distance(moved, expected, self.value)
            self._gaps[dims, inner] = max(self._gaps.get((dims, inner), 0.0), gap)
        self._moved.append(distance(moved, self.value, self.value))

    def _candidates(self) -> list[tuple[tuple[int, ...], int]] | Unknown:
        """The dimensions that may hold the examples, and how many neighbouring rows may belong to one."""
        dims = self._dims()
        if isinstance(dims, Unknown):
            return dims
        if self.other is not None and len(dims) > 1:
            if any(self.value.shape[dim] != self.examples for dim in dims):
                return Unknown(f"the output of `{self.name}` has the examples along several dimensions")
            return [(tuple(dims), 1)]
        return [((dim,), inner) for dim in dims for inner in _divisors(self.value.shape[dim] // self.examples)]

    def owner(self) -> Ownership:
        """The ownership of the value."""
        candidates = self._candidates()
        if self.output and self.ragged and (isinstance(candidates, Unknown) or not candidates):
            return Unknown(f"the number of rows of `{self.name}` depends on what the batch holds")
        if isinstance(candidates, Unknown):
            return candidates
        if not candidates:
            return self._apart()
        ranked = sorted((self._gaps[key], key) for key in candidates)
        best, (dims, inner) = ranked[0]
        if not best <= self._epsilon**0.375:
            return Unknown(f"the rows of the output of `{self.name}` do not follow the order of the examples")
        if len(ranked) > 1 and ranked[1][0] <= 4 * (best + self._epsilon):
            return Unknown(f"the rows of the output of `{self.name}` look alike, so that their examples cannot be told")
        return Rows(dims[0], inner, self.value.shape[dims[0]] // (self.examples * inner))

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
        still = all(gap <= self._epsilon**0.375 for gap in self._moved)
        if self.additive and self.value.numel() == 1 and still:
            return Spread()
        return Unknown(f"`{self.name}` uses a parameter where the examples are no longer apart")


def _divisors(n: int) -> Sequence[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _source(size: int, inner: int, order: Tensor, like: Tensor) -> Tensor:
    """Where each row comes from when the examples, each ``inner`` rows at a time, are put in another order."""
    index = torch.arange(size)
    block = inner * len(order)
    return (index // block * block + order[index // inner % len(order)] * inner + index % inner).to(like.device)


def distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The relative distance of two tensors; 0 where all is zero."""
    a, b, scale = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b, scale))
    size, gap = length(scale), length(wide(a) - wide(b))
    return gap if size == 0 else gap / size
