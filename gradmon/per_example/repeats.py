"""Several forward passes before one backward pass: whether the examples come in the same order each time."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._tensors import wide
from gradmon.per_example._autograd import version

_COLUMNS = 4096
"""How many numbers of an example are looked at."""


@dataclass(frozen=True)
class _Rows:
    """The rows of a tensor: where in memory each begins, and a number for each that stands for its contents."""

    shape: torch.Size
    memory: tuple[int, int, int]
    prints: Tensor
    floating: bool

    @staticmethod
    def of(tensor: Tensor, dim: int) -> _Rows:
        with torch.no_grad():
            flat = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1)
            flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
            flat = wide(flat[:, :: -(-flat.shape[1] // _COLUMNS)]).contiguous()
            weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            prints = (flat * weights.to(flat.device)).sum(1).cpu()
        memory = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.stride(dim))
        return _Rows(tensor.shape, memory, prints, tensor.is_floating_point())

    def reorders(self, other: _Rows) -> bool:
        """Whether it holds the same rows in another order; a line of integers may by chance."""
        if self.shape != other.shape or torch.equal(self.prints, other.prints):
            return False
        if len(self.shape) == 1 and not self.floating:
            return False
        return torch.equal(self.prints.sort().values, other.prints.sort().values)

    def is_part_of(self, other: _Rows) -> bool:
        """Whether it lies in the memory of the other."""
        return self.memory[0] == other.memory[0]

    def follows(self, other: _Rows) -> bool:
        """Whether each of its rows lies in the memory of the other's row of the same number."""
        start, step = other.memory[1:]
        rows = torch.arange(len(self.prints))
        return step > 0 and torch.equal((rows * self.memory[2] + self.memory[1] - start) // step, rows)


class Repeats:
    """The inputs of the forward passes of one step.

    Args:
        dim: The dimension of tensors that holds the examples, or else the first.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._first: tuple[int, list[tuple[weakref.ref[Tensor], int]]] | None = None
        self._called: dict[int, list[_Rows]] = {}

    def note(self, number: int, inputs: Sequence[Tensor], examples: int) -> None:
        """A forward pass begins; what it was called with is looked at from the second on.

        Args:
            number: Its number.
            inputs: What it was called with.
            examples: The number of its examples.
        """
        if self._first is None:
            self._first = number, [(weakref.ref(tensor), version(tensor)) for tensor in inputs]
            return
        if not self._called:
            held = [(ref(), before) for ref, before in self._first[1]]
            still = [t for t, before in held if t is not None and version(t) == before]
            self._called[self._first[0]] = self._rows(still, examples)
        self._called[number] = self._rows(inputs, examples)

    def _rows(self, given: Iterable[Tensor], examples: int) -> list[_Rows]:
        found: list[_Rows] = []
        for tensor in given:
            dim = self._dim if tensor.ndim > self._dim else 0
            if tensor.ndim and tensor.layout == torch.strided and tensor.shape[dim] == examples and tensor.numel():
                found.append(_Rows.of(tensor, dim))
        return found

    def check(self, batch: Iterable[Tensor], examples: int, numbers: Collection[int]) -> None:
        """Refuse passes on the same examples in another order.

        Args:
            batch: The tensors of the batch.
            examples: The number of its examples.
            numbers: The numbers of the passes of which gradients arrived.

        Raises:
            Unavailable: There are such.
        """
        met = whole = self._rows(batch, examples) if self._called else []
        for number, called in self._called.items():
            seen = [rows for rows in called if number in numbers and len(rows.prints) == examples]
            for rows in seen:
                around = [other for other in whole if rows.is_part_of(other)]
                if around and not any(rows.follows(other) for other in around):
                    raise Unavailable("the model was called on parts of the batch whose rows are not its examples")
                if any(rows.reorders(other) for other in met):
                    raise Unavailable("the model was called on the same examples in different orders")
            met = [*met, *seen]
