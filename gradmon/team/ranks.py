"""Which processes train a model together, and how they find each other."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch.distributed as dist
from torch import nn

from gradmon._errors import ArgumentError
from gradmon._parameters import trainable, wrapper_of
from gradmon.team.sharded import is_sharded

_LOG = logging.getLogger("gradmon")
_MEETINGS: Counter[str] = Counter()
"""How many times this process has met the others of a group, or missed them, by the store's prefix."""

Group: TypeAlias = "dist.ProcessGroup | Literal['auto'] | None"
"""The processes that train a model: as it says itself, those of a group, or this one alone."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train a model on parts of one batch.

    Attributes:
        group: Their process group.
        rank: This process's place among them.
        size: How many they are.
        why_not: Why the model cannot be measured, where its ranks do not hold copies of it; None where they do.
    """

    group: Any
    rank: int
    size: int
    why_not: str | None = None


def running() -> bool:
    """Whether this process is one of several that talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_ranks(model: nn.Module, group: Group) -> Ranks | None:
    """The processes that train a model together; None for this one alone.

    Args:
        model: The model.
        group: Their group; None for this process alone, ``"auto"`` to see it from the model.

    Raises:
        ArgumentError: `group` is no process group of this process.
    """
    if group is None or not running():
        if group is not None and group != "auto":
            _check_group(group)
        return None
    if group != "auto":
        _check_group(group)
        return _ranks(group)
    wrapper = wrapper_of(model)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return _ranks(cast("Any", wrapper).process_group)
    if is_sharded(model):
        return _of_meshes(model)
    _LOG.warning(
        "The numbers are those of this process's own batch, because the model is neither wrapped in "
        "DistributedDataParallel nor sharded by fully_shard, although %d processes run. If they train together, give "
        "the monitor the wrapped model, or group=torch.distributed.group.WORLD; group=None says that they do not.",
        dist.get_world_size(),
    )
    return None


def _check_group(group: object) -> None:
    """Accept a process group of this process.

    Raises:
        ArgumentError: It is something else.
    """
    must = 'be "auto", None, or a torch.distributed.ProcessGroup that holds this process'
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ArgumentError("group", must, repr(group))
    if not dist.is_initialized() or dist.get_rank(group) < 0:
        raise ArgumentError("group", must, "one that does not")


def _ranks(group: Any, why_not: str | None = None) -> Ranks | None:
    size = dist.get_world_size(group)
    return Ranks(group, dist.get_rank(group), size, why_not) if size > 1 else None


def _of_meshes(model: nn.Module) -> Ranks | None:
    """The ranks over which a model's parameters are sharded."""
    from torch.distributed.tensor import DTensor

    held = list(trainable(model).values())
    meshes: list[Any] = list(dict.fromkeys(p.device_mesh for p in held if isinstance(p, DTensor)))
    reason = _no_copies(model, held, meshes)
    if reason is not None:
        return _ranks(dist.group.WORLD, reason)
    mesh = meshes[0]
    if mesh.ndim > 1:
        return _ranks(dist.group.WORLD, None if mesh.size() == dist.get_world_size() else _PART_OF_WORLD)
    return _ranks(mesh.get_group())


_PART_OF_WORLD = "the model is sharded over a mesh of several dimensions that does not hold all processes"


def _no_copies(model: nn.Module, held: list[nn.Parameter], meshes: list[Any]) -> str | None:
    """Why the ranks do not hold the same model, each with examples of its own; None where they do."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    others = "of a model that is cut by tensor or pipeline parallelism only the norms can be measured"
    if len(meshes) > 1 or not all(isinstance(parameter, DTensor) for parameter in held):
        return f"not all parameters are sharded over the same processes: {others}"
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return f"the parameters are distributed, but not by fully_shard: {others}"
    for parameter in held:
        # HSDP replicates along one dimension of the mesh and shards along the other.
        if sum(isinstance(place, Shard) for place in cast(Any, parameter).placements) > 1:
            return f"the parameters are sharded along several dimensions of the mesh: {others}"
    return None


class Place:
    """Where these ranks meet, in the job's store, as many times as they make a monitor together.

    Args:
        ranks: Who they are.
    """

    def __init__(self, ranks: Ranks) -> None:
        members = ",".join(map(str, dist.get_process_group_ranks(ranks.group)))
        self._prefix = f"gradmon/{members}"
        self._store = _own_connection(cast(Any, dist.distributed_c10d)._get_default_store())

    def store(self) -> Any:
        """The store for the next time, of its own."""
        return cast("Any", dist).PrefixStore(f"{self._prefix}/{_MEETINGS[self._prefix]}", self._store)

    def done(self) -> None:
        """This time is over."""
        _MEETINGS[self._prefix] += 1


def _own_connection(store: Any) -> Any:
    """A connection of our own, so that nobody waits for what waits here; the same one where there is no other."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # a kind of store, or a torch, that cannot clone it
        return store
