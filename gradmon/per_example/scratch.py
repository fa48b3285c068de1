"""Memory and patterns that are used again and again."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def sampled(pattern: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Some entries of ``left @ right``, (k,)."""
    return cast("Any", torch.sparse).sampled_addmm(pattern, left, right, beta=0.0).values()


class Scratch:
    """One piece of memory for all intermediate results, so that none is taken from the system anew.

    What `get` returned is overwritten by the next `get`.

    Args:
        budget: The most numbers that forms should make at once.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._patterns: dict[int, tuple[weakref.ref[Tensor], torch.dtype, Tensor]] = {}
        self._places: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def get(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor with the type and device of another one."""
        count, key = math.prod(shape), (like.dtype, like.device)
        held = self._held.get(key)
        if held is None or held.numel() < count:
            held = self._held[key] = torch.empty(count, dtype=like.dtype, device=like.device)
        return held[:count].view(tuple(shape))

    def pattern(self, index: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A sparse matrix, (rows, columns), with entries at some flat indices, those of a row together."""
        held = self._patterns.get(id(index))
        if held is not None and held[0]() is index and held[1] == dtype:
            return held[2]
        starts = torch.arange(rows + 1, device=index.device) * columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the layout is a beta version
            made: Tensor = cast("Any", torch).sparse_csr_tensor(
                torch.searchsorted(torch.div(index, columns, rounding_mode="floor") * columns, starts),
                index % columns,
                torch.zeros(index.numel(), dtype=dtype, device=index.device),
                size=(rows, columns),
            )
        self._patterns[id(index)] = self._watched(self._patterns, index), dtype, made
        return made

    def _watched(self, table: dict[int, Any], index: Tensor) -> weakref.ref[Tensor]:
        """A reference to an index, with which its entry goes."""
        key = id(index)
        return weakref.ref(index, lambda _: table.pop(key, None))

    def places(self, index: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Where some coordinates lie in another order of the columns, worked out once."""
        held = self._places.get(id(index))
        if held is None or held[0]() is not index:
            held = self._places[id(index)] = self._watched(self._places, index), make()
        return held[1]
