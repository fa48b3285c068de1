"""Which processes of a trainer have a monitor, and what it is told about the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradmon.team import is_replicated, is_sharded

_LOG = logging.getLogger("gradmon")


def for_ranks(options: Mapping[str, Any], model: nn.Module, wrapped: Any, kind: str) -> dict[str, Any] | None:
    """The options of this process's monitor; None where it is not to have one.

    Under DistributedDataParallel and ``fully_shard`` all processes have one, and are measured together. Where the
    trainer distributes the model otherwise, or not at all, only the first has one, for its own batches.

    Args:
        options: Those that were given.
        model: The model.
        wrapped: The model as the trainer calls it, if that is known; else None.
        kind: What the trainer calls its way of distributing the model.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or "group" in options:
        return dict(options)
    if is_replicated(wrapped):
        return {**options, "group": wrapped.process_group}
    if is_sharded(model):
        return dict(options)
    if "deepspeed" in kind.lower() or _is_flat(model) or _is_flat(wrapped):
        _LOG.warning(
            "The gradient is not watched: a model distributed by %s cannot be measured; DistributedDataParallel and "
            "fully_shard (FSDP2) can.",
            kind,
        )
        return None
    return dict(options) if dist.get_rank() == 0 else None


def _is_flat(model: Any) -> bool:
    """Whether parameters are sharded as pieces of flat ones, the older way (FSDP1)."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, nn.Module) and any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
