"""The learning rates of an optimizer: those of its groups, the one it would have by default, and copies with others."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError

_SGD, _ADAM, _RMSPROP = 0.1, 1e-3, 1e-3
_ADAMS = frozenset({"Adam", "AdamW", "NAdam", "SparseAdam"})
_UNLIKE = frozenset({"Adadelta", "RAdam", "Rprop"})
"""Their steps find their length by themselves, or are first of another kind: one says nothing about those to come."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of an optimizer.

    Attributes:
        groups: That of each group: the peak of its schedule where one is known, else the one it has; positive or 0.
        main: The group with the most weights.
        default: What the main group's would be by default.
        gain: How many times as long a step becomes when many of them point the same way, as with momentum.
        reason: Why nothing can be said about them; None where something can.
    """

    groups: tuple[float, ...]
    main: int
    default: float
    gain: float
    reason: str | None = None

    @property
    def rate(self) -> float:
        """That of the main group."""
        return self.groups[self.main]

    def at(self, rate: float) -> tuple[float, ...]:
        """Those of all groups, in the same proportions, where the main group has this one."""
        if self.rate == 0:
            return tuple(rate for _ in self.groups)
        return tuple(group * (rate / self.rate) for group in self.groups)


def rates_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Rates:
    """The learning rates of an optimizer that trains some parameters.

    By default SGD has 0.1 (times ``1 - momentum``), Adam and its kin 1e-3, RMSprop 1e-3, and any other optimizer what
    its constructor takes where it is told nothing.

    Args:
        optimizer: The optimizer.
        parameters: The trainable parameters.

    Raises:
        ArgumentError: It is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("optimizer", "be a torch.optim.Optimizer", type(optimizer).__name__)
    trained = {id(parameter) for parameter in parameters}
    found = [_peak(group) for group in optimizer.param_groups]
    groups = tuple(0.0 if rate is None else rate for rate in found)
    sizes = [sum(p.numel() for p in group["params"] if id(p) in trained) for group in optimizer.param_groups]
    moving = [size if rate > 0 else 0 for size, rate in zip(sizes, groups, strict=True)]
    main = max(range(len(sizes)), key=lambda place: (moving[place], sizes[place]))
    group, kind = optimizer.param_groups[main], [cls.__name__ for cls in type(optimizer).__mro__]
    default, reason, gain = _default(optimizer), None, 1.0
    if "SGD" in kind:
        momentum = float(group.get("momentum", 0))
        dampening = float(group.get("dampening", 0)) if momentum else 0.0  # of which nothing is made without momentum
        gain = _over(1 - dampening, 1 - momentum)
        default = _SGD / gain
    elif _ADAMS.intersection(kind):
        default = _ADAM
    elif "RMSprop" in kind:
        # Its first steps are longer: the mean of squares starts at 0, and is not corrected for that.
        rest = max(1 - float(group.get("alpha", 0.99)), 0.0)
        gain = _over(math.sqrt(rest), 1 - float(group.get("momentum", 0)))
        default = _RMSPROP
    elif _UNLIKE.intersection(kind):
        reason = f"the first step of {type(optimizer).__name__} says nothing about those to come"
    if math.isnan(gain):
        gain, reason = 1.0, f"with such a momentum or decay the steps of {type(optimizer).__name__} have no last length"
    if any(rate is None for rate in found):
        told = all("lr" in group for group in optimizer.param_groups)
        reason = "a learning rate is not finite" if told else f"{type(optimizer).__name__} has no learning rate"
    elif default is None and groups[main] > 0:
        default = groups[main]
    elif default is None:
        reason = f"the default learning rate of {type(optimizer).__name__} is not known"
    return Rates(groups, main, math.nan if default is None else default, gain, reason)


def _over(one: float, other: float) -> float:
    """A quotient of positive numbers; NaN of others."""
    return one / other if one > 0 and other > 0 else math.nan


def _peak(group: dict[str, Any]) -> float | None:
    """The largest learning rate that a group's schedule is known to reach, as schedulers note it in the group."""
    found = [float(group[name]) for name in ("lr", "initial_lr", "max_lr") if group.get(name) is not None]
    return max(found) if "lr" in group and all(math.isfinite(rate) for rate in found) else None


def _default(optimizer: Optimizer) -> float | None:
    """What the constructor takes for a learning rate that it is not told."""
    held = inspect.signature(type(optimizer)).parameters.get("lr")
    value: object = None if held is None else held.default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        return None
    return float(value)


def with_rates(optimizer: Optimizer, rates: Sequence[float]) -> Optimizer:
    """A copy of an optimizer, for the same parameters, with other learning rates."""
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    twin = copy.deepcopy(optimizer, memo)
    for group, rate in zip(twin.param_groups, rates, strict=True):
        group["lr"] = rate
    return twin
