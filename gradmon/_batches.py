"""Batches of any nesting: their tensors, their number of examples, and copies with other tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon._types import Batch

_LEAVES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
"""Types that hold no tensor, told at once: these functions run at every call of a model that is looked into."""


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a nesting with every tensor replaced by ``change(tensor)``, in the order of nesting."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in _LEAVES:
        return tree
    if isinstance(tree, Mapping):
        items = {key: map_tensors(value, change) for key, value in cast("Mapping[Any, Any]", tree).items()}
        if type(cast(object, tree)) is dict or not hasattr(cast(object, tree), "__setitem__"):
            return items
        twin = copy.copy(cast(Any, tree))
        if not isinstance(tree, (dict, UserDict)):  # a copy of it may share what it holds
            try:
                return type(cast(Any, tree))(items)
            except TypeError:
                return items
        for key, value in items.items():
            twin[key] = value
        return twin
    if isinstance(tree, (tuple, list)):
        parts = [map_tensors(part, change) for part in cast("list[Any]", tree)]
        make = getattr(cast(object, tree), "_make", None)
        if make is not None:
            return make(parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        twin = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(twin, field.name, map_tensors(getattr(tree, field.name), change))
        return twin
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nesting, in the order of nesting."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) in _LEAVES:
        return
    elif isinstance(tree, Mapping):
        for value in cast("Mapping[Any, Any]", tree).values():
            yield from tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in cast("list[Any]", tree):
            yield from tensors(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name))


def batch_tensors(batch: Batch, name: str = "batch") -> list[Tensor]:
    """The tensors of a batch.

    Raises:
        ArgumentError: The argument of this name holds no tensor.
    """
    found = list(tensors(batch))
    if not found:
        raise ArgumentError(name, "hold at least one tensor", type(batch).__name__)
    return found


def example_count(batch: Batch, dim: int = 0) -> int:
    """B, the size along `dim`, or the first dimension, of the batch's first tensor that has one.

    Raises:
        ArgumentError: No tensor of `batch` has a first dimension, or it is empty.
    """
    size = next((t.shape[dim if t.ndim > dim else 0] for t in batch_tensors(batch) if t.ndim > 0), None)
    if size is None:
        raise ArgumentError("batch", "hold a tensor whose first dimension counts the examples", "only scalars")
    if size == 0:
        raise ArgumentError("batch", "hold at least one example", "an empty first dimension")
    return size


def select_examples(batch: Batch, index: Tensor, dim: int = 0) -> Batch:
    """The batch with its examples, along `dim` or else the first dimension, taken in the order of `index`.

    Tensors without as many entries along either stay as they are.
    """
    size = example_count(batch, dim)

    def select(tensor: Tensor) -> Tensor:
        along = next((d for d in dict.fromkeys((dim, 0)) if tensor.ndim > d and tensor.shape[d] == size), None)
        return tensor if along is None else tensor.index_select(along, index.to(tensor.device))

    with torch.no_grad():
        return map_tensors(batch, select)


def replace_tensor(batch: Batch, position: int, value: Tensor) -> Batch:
    """The batch with its `position`-th tensor replaced."""
    seen = -1

    def change(tensor: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return value if seen == position else tensor

    return map_tensors(batch, change)


def holds_counts(batch: Batch, examples: int) -> bool:
    """Whether a batch holds a plain integer for each example, such as its length, that may decide on its rows."""
    if isinstance(batch, Tensor) or type(batch) in _LEAVES:
        return False
    if isinstance(batch, Mapping):
        return any(holds_counts(value, examples) for value in cast("Mapping[Any, Any]", batch).values())
    if isinstance(batch, (tuple, list)):
        held = cast("list[Any]", batch)
        counts = len(held) == examples > 1 and all(type(value) is int for value in held)
        return counts or any(holds_counts(value, examples) for value in held)
    return False
