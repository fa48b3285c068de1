"""The layers' inputs, kept while a pass runs, without copies where nobody writes to them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

from torch import Tensor

FREE = 16 * 2**20
"""So many bytes of guesses and inputs are held without being asked for."""


class Inputs:
    """Tensors by the layers' numbers.

    Args:
        written: Those that are known to be written to later in the pass: they are copied.
        limit: Of their size in bytes together: beyond it, none is kept.
    """

    def __init__(self, written: Container[int] = (), limit: float = math.inf) -> None:
        self._written, self._left = written, limit
        self._held: dict[int, tuple[Tensor, int]] = {}

    def keep(self, number: int, x: Tensor) -> None:
        """Keep an input as it is now."""
        self._left -= x.numel() * x.element_size()
        if self._left < 0:
            self._held.clear()
            return
        x = x.detach().clone() if number in self._written else x.detach()
        self._held[number] = x, x._version

    def whole(self) -> bool:
        """Whether all inputs are there as the layers were called with them."""
        return self._left >= 0 and not self.changed()

    def changed(self) -> set[int]:
        """The numbers of those that were written to since."""
        return {number for number, (x, version) in self._held.items() if x._version != version}

    def pop(self, number: int) -> Tensor | None:
        """One of them, kept no longer; None where it was written to since."""
        x, version = self._held.pop(number)
        return x if x._version == version else None

    def take(self) -> Iterator[tuple[int, Tensor]]:
        """Each number and input, in the order of the calls; what was taken is kept no longer."""
        for number in list(self._held):
            yield number, self._held.pop(number)[0]
