"""Whether what was found out about the rows of some examples holds for others, where the batch chooses their order."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmon._batches import select_examples
from gradmon._errors import Unavailable
from gradmon._tensors import wide
from gradmon._types import Batch
from gradmon.per_example.look import Run, Seen, distance, orders
from gradmon.per_example.rows import Changed, Course, Rows
from gradmon.per_example.still import Still


def holds(run: Run, batch: Batch, examples: int, course: Course, dim: int = 0) -> bool:
    """Whether the rows of a batch follow the order of its examples as the course says.

    Two more passes where the batch may choose the order of the rows, as one that is sorted by length does; else none. A
    few examples may be in order by chance.

    Args:
        run: As for `find_course`.
        batch: The batch.
        examples: The number of its examples, B.
        course: The course.
        dim: The dimension of its tensors that holds the examples.
    """
    if course.chosen is None or examples == 1:
        return True
    order = orders(examples)[0]
    usual, other = _Prints(course, examples), _Prints(course, examples)
    try:
        run(batch, usual.take, Still())
        run(select_examples(batch, order, dim), other.take, Still())
    except Unavailable:
        return False
    return usual.followed_by(other, order)


class _Prints:
    """A number for each example and each value of a pass, which stands for the example's rows of the value.

    Args:
        course: What the pass is expected to do.
        examples: The number of its examples.
    """

    def __init__(self, course: Course, examples: int) -> None:
        self._course, self._examples = course, examples
        self._place = 0
        self._found: list[tuple[Tensor, float]] = []

    def take(self, seen: Seen) -> None:
        """The next use, or x.

        Raises:
            Changed: It is another one, or has not as many rows for every example.
        """
        course, place = self._course, self._place
        self._place += 1
        if place < len(course.uses):
            planned = course.uses[place]
            same = (seen.name, seen.positions) == (planned.name, planned.positions)
            owners = [*planned.outputs, *planned.activations]
        else:
            same, owners = seen.name == "x", [course.x]
        if not same or len(seen.values) != len(owners):
            raise Changed("the forward pass takes another course")
        for owner, value in zip(owners, seen.values, strict=True):
            if isinstance(owner, Rows) and course.chosen is not None and place >= course.chosen:
                self._found.append(self._print(owner.split(value, self._examples)))

    def _print(self, rows: Tensor) -> tuple[Tensor, float]:
        flat = wide(torch.view_as_real(rows) if rows.is_complex() else rows).reshape(self._examples, -1)
        weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        known = rows.is_floating_point() or rows.is_complex()
        prints = (flat * weights.to(flat.device)).sum(1)  # a product with a matrix would round each row in another way
        return prints, torch.finfo(rows.dtype).eps ** 0.375 if known else 0.0

    def followed_by(self, other: _Prints, order: Tensor) -> bool:
        """Whether the numbers of another pass are these in the order of its examples."""
        return self._place == other._place and all(
            distance(moved, own.index_select(0, order.to(own.device)), own) <= tolerance
            for (own, tolerance), (moved, _) in zip(self._found, other._found, strict=True)
        )
