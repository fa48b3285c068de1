"""The batches that a check looks at, taken without a trace."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradmon._batches import batch_tensors, example_count, map_tensors, select_examples, tensors
from gradmon._errors import ArgumentError
from gradmon._snapshot import RandomState
from gradmon._types import Batch

PROBE = 64
"""How many examples are looked at, where there are as many."""
_BATCHES = 8
"""How many batches are taken at most to get them together."""


@dataclass(frozen=True)
class Taken:
    """What a check looks at.

    Attributes:
        training: The batch that a step is tried on.
        probe: The examples that everything else is measured on.
        apart: Whether these are other batches than the training one.
    """

    training: Batch
    probe: Batch
    apart: bool


def take(batches: Any, device: torch.device) -> Taken:
    """The batches of a check; random states, and those of a loader and its sampler, are afterwards as before.

    A tensor, tuple, mapping, dataclass, or list of tensors is one batch. Any other list, a `DataLoader` or another
    iterable holds batches; the first is the training batch, the next ones are the probe. Only an iterator is moved on.

    Args:
        batches: One batch, or several.
        device: The model's device; a batch without a tensor there is brought to it.

    Raises:
        ArgumentError: There is no batch in it, or no tensor in the batch.
    """
    if _is_batch(batches):
        found = [batches]
    elif isinstance(batches, Iterable):
        found = _first(cast("Iterable[Any]", batches))
    else:
        raise ArgumentError("batches", "be a batch, or an iterable of batches", type(batches).__name__)
    if not found:
        raise ArgumentError("batches", "hold at least one batch", "none")
    for batch in found:
        batch_tensors(batch, "batches")
    found = [_brought(batch, device) for batch in found]
    if len(found) == 1:
        return Taken(found[0], _cut(found[0]), False)
    return Taken(found[0], _cut(_joined(found[1:])), True)


def _brought(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; as it is where some of it is there already, since the rest may be meant to be elsewhere."""
    if any(tensor.device == device for tensor in tensors(batch)):
        return batch
    return map_tensors(batch, lambda tensor: tensor.to(device))


def _is_batch(value: Any) -> bool:
    if isinstance(value, (Tensor, Mapping, tuple)) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return True
    return isinstance(value, list) and any(isinstance(part, Tensor) for part in cast("list[Any]", value))


def _first(batches: Iterable[Any]) -> list[Any]:
    """The first batch, and as many more as make a probe."""
    random_state, undo = RandomState(), _generators(batches)
    try:
        found: list[Any] = []
        probe = 0
        for batch in _here(batches):
            found.append(batch)
            probe += example_count(batch) if len(found) > 1 else 0
            if len(found) > _BATCHES or probe >= PROBE:
                break
        return found
    finally:
        random_state.restore()
        for restore in undo:
            restore()


def _here(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, loaded in this process: workers would outlive the check, or draw their seeds for nothing."""
    loader: Any = batches
    if not isinstance(batches, DataLoader) or loader.num_workers == 0:
        return loader
    twin: Any = copy.copy(loader)
    twin.__dict__.update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    return twin


def _generators(batches: Any) -> list[Callable[[], Any]]:
    """How to put the generators of a loader, its samplers and its dataset back to where they are."""
    held = [value for owner in _owners(batches) for value in (owner, *_attributes(owner).values())]
    return [undo for value in held if (undo := _undo(value)) is not None]


def _undo(value: Any) -> Callable[[], Any] | None:
    """How to put a generator back; None for other values."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    return None


def _owners(batches: Any) -> Iterator[Any]:
    """A loader, and what it takes its examples from, at any depth."""
    waiting, seen = [batches], set[int]()
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        yield owner
        held = _attributes(owner)
        waiting += [held[name] for name in ("sampler", "batch_sampler", "dataset", "loader") if name in held]
        several = [held[name] for name in ("samplers", "datasets", "loaders") if name in held]
        waiting += [part for parts in several if isinstance(parts, (list, tuple)) for part in cast("list[Any]", parts)]


def _attributes(owner: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", getattr(owner, "__dict__", {}))


def _joined(found: list[Batch]) -> Batch:
    """Batches as one, where their tensors fit together; otherwise the largest."""
    parts = [list(tensors(batch)) for batch in found]
    alike = all(len(part) == len(parts[0]) and _rows(batch) for part, batch in zip(parts, found, strict=True))
    same = alike and all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for part in parts for a, b in zip(part, parts[0], strict=True)
    )
    if not same:
        return max(found, key=example_count)
    columns = iter([torch.cat(column) for column in zip(*parts, strict=True)])
    return map_tensors(found[0], lambda _: next(columns))


def _cut(batch: Batch) -> Batch:
    """The first examples of a batch, where it can be cut."""
    if example_count(batch) <= PROBE or not _rows(batch):
        return batch
    return select_examples(batch, torch.arange(PROBE))


def _rows(batch: Batch) -> bool:
    """Whether a batch is tensors with one row for each example, and nothing beside them."""
    count = example_count(batch)
    return _only_tensors(batch) and all(t.ndim > 0 and t.shape[0] == count for t in tensors(batch))


def _only_tensors(batch: Batch) -> bool:
    if isinstance(batch, Tensor) or batch is None:
        return True
    if isinstance(batch, Mapping):
        return all(_only_tensors(value) for value in cast("Mapping[Any, Any]", batch).values())
    if isinstance(batch, (tuple, list)):
        return all(_only_tensors(value) for value in cast("list[Any]", batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return all(_only_tensors(getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return False
