"""The arguments that every callback takes: those of the monitor, but for what the trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import nn

from gradmon import ArgumentError, Metric, budget
from gradmon._types import Derivative, Reduction
from gradmon.alerts import Rule
from gradmon.masks import Mask
from gradmon.per_example import Rules
from gradmon.perturbations.inputs import InputSampler
from gradmon.perturbations.weights import WeightSampler
from gradmon.publishing import OnAlert
from gradmon.schedules import Schedule
from gradmon.sinks import Sink
from gradmon.team import Group

Sinks = Sink | str | Iterable[Sink | str] | None


class Options(TypedDict, total=False):
    """The arguments of `gradmon.Monitor`.

    `sinks` may also be a function of the run's name that makes them: it is called whenever a training begins, so that
    every training has sinks of its own.
    """

    metrics: Literal["default", "all"] | str | Metric | Sequence[str | Metric]
    schedule: Schedule | budget | None
    mask: Mask | float | Literal["default"] | None
    seed: int
    run: str
    rank: int
    sinks: Sinks | Callable[[str], Sinks]
    alerts: Literal["default"] | Iterable[Rule] | None
    on_alert: OnAlert
    hparams: Mapping[str, str | int | float | bool] | None
    weights: WeightSampler | None
    inputs: InputSampler | None
    derivative: Derivative
    micro_batches: int
    reduction: Reduction
    input_module: nn.Module | str | None
    layers: bool
    rules: Rules | None
    max_memory: int
    example_dim: int | None
    group: Group
    group_timeout: float
    preflight: bool


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if they are some.

    Raises:
        ArgumentError: There is none of that name.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise ArgumentError(name, f"be among {', '.join(sorted(Options.__annotations__))}", "another name")
    return dict(options)


def opened(sinks: Sinks | Callable[[str], Sinks], run: str) -> list[Sink | str]:
    """The sinks of a training."""
    made = sinks(run) if callable(sinks) and not isinstance(sinks, Sink) else sinks
    if made is None:
        return []
    return [made] if isinstance(made, (str, Sink)) else list(made)


def check_choice(name: str, value: object) -> None:
    """Check a switch.

    Raises:
        ArgumentError: It is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ArgumentError(name, "be True or False", repr(value))
