"""The examples of several forward passes, and which of them are the same."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._errors import Unavailable


@dataclass(frozen=True, eq=False)
class Group:
    """The examples of one forward pass.

    Attributes:
        task: The backward pass that it was part of.
        number: The how many-th forward pass it was.
        examples: How many examples.
        source: The tensors that it was called with, and how often each had been overwritten.
    """

    task: int
    number: int
    examples: int
    source: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def same_input(self, other: Group) -> bool:
        """Whether two passes were called with the very same tensors, and so saw the same examples."""
        return (
            bool(self.source)
            and len(self.source) == len(other.source)
            and all(
                ours() is not None and ours() is theirs() and before == now
                for (ours, before), (theirs, now) in zip(self.source, other.source, strict=True)
            )
        )


def owners_of(groups: Sequence[Group], counts: Collection[int], reached: Mapping[int, set[int]]) -> tuple[Tensor, int]:
    """The example of each row of each group, and the number of examples.

    Several forward passes before one backward pass saw the same examples, unless the batch has as many as all of them.
    Different backward passes saw different examples, unless they were called with the very same tensors, or no
    parameter was reached by two of them: then one pass was cut into parts.

    Raises:
        Unavailable: That cannot be: they have different numbers of examples.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    positions = [position for task in tasks for position in reached.get(task, ())]
    cut = len(tasks) > 1 and len(positions) == len(set(positions))
    cut = cut or (len(tasks) > 1 and all(group.same_input(groups[0]) for group in groups))
    together: dict[int, list[Group]] = {}
    for group in groups:
        together.setdefault(tasks[0] if cut else group.task, []).append(group)
    separate = sum(group.examples for group in groups)
    alike = all(group.examples == same[0].examples for same in together.values() for group in same)
    paired = sum(same[0].examples for same in together.values())
    known = {separate, paired, *(group.examples for group in groups)}
    if counts and not known & set(counts):
        seen = " + ".join(str(group.examples) for group in groups)
        raise Unavailable(
            f"the batch has {next(iter(counts))} examples, but the model was called on {seen}: if its inputs hold the "
            "examples along another dimension than the first, say so by example_dim"
        )
    if separate == paired or (separate in counts and not cut):
        return torch.arange(separate), separate
    if not alike:
        raise Unavailable("forward passes on different numbers of examples before one backward pass")
    owners, start = dict[Group, Tensor](), 0
    for same in together.values():
        for group in same:
            owners[group] = torch.arange(start, start + group.examples)
        start += same[0].examples
    return torch.cat([owners[group] for group in groups]), paired
