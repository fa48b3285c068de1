"""What kind of run it is, in names and plain values, for sinks that show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradmon._parameters import trainable
from gradmon.masks import Mask
from gradmon.probes import learning_rates

Plain = str | int | float | bool


def described(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    passive: bool,
    schedule: object,
    mask: Mask | None,
    seed: int,
    derivative: str,
    hparams: Mapping[str, Plain],
) -> dict[str, Plain]:
    """What describes a run; the user's own names win.

    Args:
        model: The model.
        optimizer: The optimizer, of which the first parameter group's settings are told.
        passive: Whether the monitor makes no passes of its own.
        schedule: When it looks.
        mask: The coordinates that it looks at.
        seed: Its seed.
        derivative: ``"finite"`` or ``"exact"``.
        hparams: What the user adds.
    """
    parameters = trainable(model)
    info: dict[str, Plain] = {
        "version": _version(),
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "device": str(next(iter(parameters.values())).device),
        "schedule": schedule_name(schedule),
        "mask": 1.0 if mask is None else mask.fraction,
        "seed": seed,
        "passive": passive,
        "derivative": derivative,
    }
    if optimizer is not None:
        info["optimizer"] = type(optimizer).__name__
        info.update(_settings(optimizer))
    # Those of numpy and torch as Python's own, which every sink can write.
    plain: dict[str, Any] = {name: getattr(value, "item", lambda v=value: v)() for name, value in hparams.items()}
    return {**info, **plain}


def schedule_name(schedule: object) -> str:
    """A schedule as it would be written: ``every(n=50)``."""
    named = type(schedule).__module__.startswith("gradmon.")
    return repr(schedule) if named else str(getattr(schedule, "__name__", type(schedule).__name__))


def _settings(optimizer: Optimizer) -> dict[str, Plain]:
    """The settings of the first parameter group."""
    found: dict[str, Plain] = {}
    if rates := learning_rates(optimizer):
        found["learning_rate"] = max(rates)
    group: dict[str, Any] = optimizer.param_groups[0]
    for name, value in group.items():
        if name in ("params", "lr", "initial_lr") or value is None:
            continue
        if isinstance(value, (bool, str, int)) or (isinstance(value, float) and math.isfinite(value)):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found[name] = str(tuple(value))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return found


def _version() -> str:
    try:
        return version("gradmon")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"
