"""The forms in which the examples' gradients of one parameter are held, none of them as a matrix of all numbers.

A rule returns one of these (or a plain tensor) for each parameter. Every form can make any part of the (B, numel)
matrix when it is asked for it; some know a shorter way to their Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradmon._tensors import symmetric
from gradmon.per_example.scratch import Scratch, sampled


class Shares(Protocol):
    """The examples' gradients of one tensor.

    Attributes:
        examples: How many examples, n.
        shape: The tensor's shape.
        kept: The tensors that are held, for their sizes.
        sliceable: Whether a part of the leading dimension costs only a part of the whole.
    """

    @property
    def examples(self) -> int:
        """How many examples, n."""
        ...

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        ...

    @property
    def kept(self) -> Sequence[Tensor]:
        """The tensors that are held."""
        ...

    @property
    def sliceable(self) -> bool:
        """Whether a part of the leading dimension costs only a part of the whole."""
        ...

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows of the leading dimension, (n', rows * rest).

        Unordered, the columns may come in another order, the same for all examples: enough for inner products.
        """
        ...

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, by flat sorted index, of all examples, (n, k)."""
        ...

    def gram(self) -> Tensor | None:
        """All inner products, (n, n), if there is a shorter way than by the gradients themselves."""
        ...

    def scaled(self, factor: float) -> Shares:
        """The gradients times a factor."""
        ...


def height(shape: torch.Size) -> int:
    """The length of the leading dimension, 1 where there is none."""
    return shape[0] if shape else 1


def whole(shares: Shares) -> tuple[slice, slice]:
    """All examples and all rows."""
    return slice(0, shares.examples), slice(0, height(shares.shape))


def one(shares: Shares, example: int) -> Tensor:
    """The gradient of one example, of the tensor's shape."""
    return shares.block(slice(example, example + 1), whole(shares)[1]).reshape(shares.shape).clone()


def chunks(shares: Sequence[Shares], budget: int) -> list[tuple[slice, slice]]:
    """Parts of the matrix of at most about `budget` numbers, for forms that are going to be added up.

    Args:
        shares: Forms of as many examples and of the same shape.
        budget: The most numbers to be made at once.

    Returns:
        Examples and rows of each part: ranges of rows of all examples where all forms are sliceable; else ranges of
        examples in full.
    """
    count, shape = shares[0].examples, shares[0].shape
    rows, numel = height(shape), math.prod(shape)
    if all(form.sliceable for form in shares):
        step = max(1, budget // max(1, count * (numel // max(1, rows))))
        return [(slice(0, count), slice(s, min(s + step, rows))) for s in range(0, rows, step)]
    step = max(1, budget // max(1, numel))
    return [(slice(s, min(s + step, count)), slice(0, rows)) for s in range(0, count, step)]


def total(shares: Shares, budget: int) -> Tensor:
    """The sum of all examples' gradients, of the tensor's shape."""
    if isinstance(shares, Outer):
        return (shares.left.flatten(0, 1).T @ shares.right.flatten(0, 1)).reshape(shares.shape)
    found: Tensor | None = None
    for examples, rows in chunks([shares], budget):
        part = shares.block(examples, rows).sum(0)
        if found is None:
            found = part.new_zeros(math.prod(shares.shape))
        width = found.numel() // max(1, height(shares.shape))
        found[rows.start * width : rows.stop * width] += part
    if found is None:
        raise ValueError("a form without rows or examples")
    return found.reshape(shares.shape)


def taken(shares: Shares, index: Tensor, budget: int, places: Tensor | None = None) -> Tensor:
    """Some coordinates of all examples, (n, k), by making the gradients in parts.

    Args:
        shares: The gradients.
        index: The coordinates, flat, sorted.
        budget: The most numbers to be made at once.
        places: Where these lie in unordered blocks; None where blocks have no order of their own.
    """
    width = math.prod(shares.shape) // max(1, height(shares.shape))
    found: Tensor | None = None
    for examples, rows in chunks([shares], budget):
        bounds = torch.tensor([rows.start * width, rows.stop * width], device=index.device)
        first, last = (int(at) for at in torch.searchsorted(index, bounds))
        if first == last:
            continue
        part = shares.block(examples, rows, ordered=places is None)
        if found is None:
            found = part.new_zeros(shares.examples, index.numel())
        looked_at = (index if places is None else places)[first:last] - rows.start * width
        found[examples, first:last] = part.index_select(1, looked_at)
    return torch.zeros(shares.examples, index.numel(), device=index.device) if found is None else found


def sparse(shares: Shares, index: Tensor) -> bool:
    """Whether so few coordinates are wanted that each is cheaper on its own; on a GPU whole products are."""
    return index.device.type == "cpu" and 4 * index.numel() < math.prod(shares.shape)


class Dense:
    """The gradients themselves: of biases, norms and other small parameters.

    Args:
        rows: (n, *shape).
        products: Their inner products, if somebody else makes them too.
    """

    sliceable = True

    def __init__(self, rows: Tensor, products: Callable[[], Tensor] | None = None) -> None:
        self.rows, self._products = rows, products
        self.examples = rows.shape[0]
        self.shape = rows.shape[1:]
        self.kept = [rows]

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * rest)."""
        part = self.rows[examples]
        return (part[:, rows] if self.shape else part).reshape(len(part), -1)

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        return self.rows.reshape(self.examples, -1).index_select(1, index)

    def gram(self) -> Tensor | None:
        """The inner products that somebody else made; else None."""
        return None if self._products is None else self._products()

    def scaled(self, factor: float) -> Dense:
        """The gradients times a factor."""
        return Dense(self.rows * factor)


class Outer:
    """Sums of outer products: ``h_i = sum_t left_it right_it^T``, the gradient of a matrix.

    Args:
        left: (n, T, R).
        right: (n, T, C).
        scratch: Makes room for parts of (n, R, C).
        shape: The parameter's shape, where it is not (R, C) but ends in ones.
    """

    sliceable = True

    def __init__(self, left: Tensor, right: Tensor, scratch: Scratch, shape: torch.Size | None = None) -> None:
        self.left, self.right, self._scratch = left, right, scratch
        self.examples = left.shape[0]
        self.shape = torch.Size((left.shape[2], right.shape[2])) if shape is None else shape
        self.kept = [left, right]
        self._lines: tuple[Tensor, Tensor] | None = None
        self._squared: Tensor | None = None

    def left_products(self) -> Tensor:
        """``left left^T`` over all examples and times, (nT, nT)."""
        if self._squared is None:
            left = self.left.flatten(0, 1)
            self._squared = symmetric(left)
        return self._squared

    def beside(self, others: Sequence[Outer]) -> Outer:
        """The sum with others of as many examples: their times follow one another."""
        left = torch.cat([self.left, *(other.left for other in others)], 1)
        right = torch.cat([self.right, *(other.right for other in others)], 1)
        return Outer(left, right, self._scratch, self.shape)

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * C)."""
        left, right = self.left[examples, :, rows], self.right[examples]
        out = self._scratch.get((left.shape[0], left.shape[2], right.shape[2]), left)
        if left.shape[1] == 1:
            return torch.mul(left.transpose(1, 2), right, out=out).flatten(1)
        return torch.bmm(left.transpose(1, 2), right, out=out).flatten(1)

    @property
    def light(self) -> bool:
        """Whether any few coordinates cost only themselves."""
        return self.left.shape[1] == 1

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        if not self.light and sparse(self, index):
            pattern = self._scratch.pattern(index, self.left.shape[2], self.right.shape[2], self.left.dtype)
            return torch.stack(
                [sampled(pattern, left.T, right) for left, right in zip(self.left, self.right, strict=True)]
            )
        if not self.light:
            return taken(self, index, self._scratch.budget)
        if self._lines is None:  # examples along the memory, so that whole lines are copied
            self._lines = self.left[:, 0].T.contiguous(), self.right[:, 0].T.contiguous()
        columns = self.right.shape[2]
        found = self._lines[0].index_select(0, torch.div(index, columns, rounding_mode="floor"))
        return found.mul_(self._lines[1].index_select(0, index % columns)).T

    def sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the examples of some coordinates and of their squares, (k,) each, without making the former."""
        pattern = self._scratch.pattern(index, len(self.left[0, 0]), self.right.shape[2], self.left.dtype)
        left, right = self.left[:, 0], self.right[:, 0]
        return sampled(pattern, left.T, right), sampled(pattern, left.square().T, right.square())

    def gram(self) -> Tensor | None:
        """``(left left^T) * (right right^T)`` summed over the times, where that is less work."""
        n, times, rows = self.left.shape
        columns = self.right.shape[2]
        if n * n * times * times * (rows + columns) > n * rows * columns * (times + n):
            return None
        right = self.right.reshape(n * times, columns)
        product = symmetric(right).mul_(self.left_products())
        return product if times == 1 else product.reshape(n, times, n, times).sum((1, 3))

    def scaled(self, factor: float) -> Outer:
        """The gradients times a factor."""
        return Outer(self.left * factor, self.right, self._scratch, self.shape)


class Lazy:
    """Gradients that are made anew whenever they are asked for, some examples at a time.

    Args:
        make: From a range of examples to their gradients, (n', numel).
        examples: How many examples, n.
        shape: The tensor's shape.
        scratch: Says how much may be made at once.
        kept: What `make` holds.
    """

    sliceable = False

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        examples: int,
        shape: torch.Size,
        scratch: Scratch,
        kept: Sequence[Tensor] = (),
    ) -> None:
        self._make, self._scratch = make, scratch
        self.examples, self.shape, self.kept = examples, shape, list(kept)

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * rest)."""
        width = math.prod(self.shape) // max(1, height(self.shape))
        return self._make(examples)[:, rows.start * width : rows.stop * width]

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        return taken(self, index, self._scratch.budget)

    def gram(self) -> Tensor | None:
        """None: there is no shorter way."""
        return None

    def scaled(self, factor: float) -> Lazy:
        """The gradients times a factor."""
        return Lazy(lambda examples: self._make(examples) * factor, self.examples, self.shape, self._scratch, self.kept)


class Relocated:
    """The gradients of a parameter of which a use saw some numbers, each once, at other places.

    Args:
        inner: The gradients of what the use saw.
        places: Where each of its numbers lies in the parameter, flat, int64.
        shape: The parameter's shape.
        scratch: Says how much may be made at once.
    """

    sliceable = False

    def __init__(self, inner: Shares, places: Tensor, shape: torch.Size, scratch: Scratch) -> None:
        self.inner, self.places, self._scratch = inner, places, scratch
        self.examples, self.shape, self.kept = inner.examples, shape, [*inner.kept, places]

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * rest)."""
        numel = math.prod(self.shape)
        width = numel // max(1, height(self.shape))
        part = self.inner.block(examples, whole(self.inner)[1])
        found = part.new_zeros(len(part), numel)
        return found.index_copy_(1, self.places, part)[:, rows.start * width : rows.stop * width]

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        back = torch.full((math.prod(self.shape),), -1, dtype=torch.int64, device=index.device)
        back[self.places] = torch.arange(self.places.numel(), device=index.device)
        inside = back[index]
        order = inside[inside >= 0].argsort()
        seen = self.inner.take(inside[inside >= 0][order])
        found = seen.new_zeros(self.examples, index.numel())
        found[:, (inside >= 0).nonzero().reshape(-1)[order]] = seen
        return found

    def gram(self) -> Tensor | None:
        """That of the gradients of what the use saw: no number is seen twice."""
        return self.inner.gram()

    def scaled(self, factor: float) -> Relocated:
        """The gradients times a factor."""
        return Relocated(self.inner.scaled(factor), self.places, self.shape, self._scratch)
