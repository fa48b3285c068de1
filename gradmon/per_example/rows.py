"""Which rows of a use's output belong to which example, and what is expected of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon.per_example.capture import Use


class Changed(Unavailable):
    """The rows are not what they were when they were looked at."""


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
            Changed: It has not as many rows for every example.
        """
        if examples == 1:
            return tensor.unsqueeze(0)
        if self.dim == 0 and tensor.ndim and tensor.shape[0] == examples and self.inner == self.outer == 1:
            return tensor.unsqueeze(1)
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
            raise Changed("the rows cannot be divided among the examples as before")
        shape = (*tensor.shape[: self.dim], outer, examples, inner, *tensor.shape[self.dim + 1 :])
        return tensor.view(shape)


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
        choices: In how many calls the batch may have chosen something before; None for any number.
    """

    name: str
    positions: list[tuple[int, ...]]
    outputs: list[Ownership]
    activations: list[Ownership]
    choices: int | None = None

    def fits(self, use: Use) -> bool:
        """Whether a use is the expected one."""
        return (
            self.name == use.name
            and self.positions == use.positions
            and len(self.outputs) == len(use.outputs)
            and len(self.activations) == len(use.activations)
            and (self.choices is None or use.decided.calls <= self.choices)  # one more may choose the rows' order
        )


@dataclass(frozen=True, eq=False)
class Course:
    """What a forward pass does with the parameters, use by use, and whose rows are whose.

    Attributes:
        uses: The uses, in order.
        x: The ownership of the examples' inputs, where they were asked for.
        chosen: The position of the first use whose rows may be in an order that the batch chooses; None for none.
    """

    uses: list[Planned]
    x: Ownership | None = None
    chosen: int | None = None
