"""What the public functions are asked for: metrics by name, and arguments that are what they must be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError, PluginError
from gradmon._evidence import BatchGradient, InputGradients, Step, StepPair
from gradmon._objective import check_loss
from gradmon._parameters import check_trains, trainable
from gradmon._plugins import entry_points_named, load
from gradmon._types import Loss
from gradmon.masks import Mask, check_seed
from gradmon.metrics import METRICS, Metric
from gradmon.probes import LISTENED
from gradmon.schedules import budget

_PASSIVE: frozenset[type] = frozenset({BatchGradient, Step, StepPair, *LISTENED})
"""The evidence that the training's own passes and steps reveal."""
_NOT_PASSIVE = frozenset({"loss", "step_ratio", "step_share", "batch_share"})
"""Metrics that want more of such evidence than can be had without the loss."""

_ALIKE = ("parameters", "schedule", "seed", "passive", "derivative", "optimizer")
"""What describes a run and must be the same on all its ranks."""


def find_metric(name: str) -> Metric:
    """The built-in metric of a name, or the one that an installed package adds under the entry point `gradmon.metrics`.

    Raises:
        ArgumentError: There is none of that name.
        PluginError: It cannot be imported, or is no metric.
    """
    if name in METRICS:
        return METRICS[name]
    others = entry_points_named("gradmon.metrics")
    if name not in others:
        raise ArgumentError(
            "metrics", f"be Metric objects or among {', '.join(sorted({*METRICS, *others}))}", repr(name)
        )
    found = load("gradmon.metrics", name)
    if not isinstance(found, Metric):
        raise PluginError(f"{others[name].value}, installed in `gradmon.metrics` as {name!r}, must be a Metric.")
    return found


def known_metrics() -> dict[str, Metric]:
    """Every metric there is, by name; those of other packages that cannot be had are left out, and logged."""
    found = dict(METRICS)
    for name in entry_points_named("gradmon.metrics"):
        try:
            found[name] = find_metric(name)
        except PluginError as error:
            logging.getLogger("gradmon").warning("%s", error)
    return found


def choose_metrics(
    metrics: str | Metric | Iterable[str | Metric] | None, optimizer: Optimizer | None, *, costly: bool = True
) -> list[Metric]:
    """The metrics that were asked for; None stands for all that can be had.

    Raises:
        ArgumentError: `metrics` names an unknown metric, or one that needs an optimizer where there is none.
    """
    if metrics is None:
        return [
            metric
            for metric in METRICS.values()
            if not metric.on_demand and (costly or not metric.costly) and (optimizer is not None or not _steps(metric))
        ]
    if not isinstance(metrics, (str, Metric, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("metrics", "be names or Metric objects", repr(metrics))
    chosen: list[Metric] = []
    for wanted in [metrics] if isinstance(metrics, (str, Metric)) else metrics:
        metric = find_metric(wanted) if isinstance(wanted, str) else wanted
        if not isinstance(metric, Metric):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("metrics", f"be Metric objects or among {', '.join(sorted(METRICS))}", repr(wanted))
        if optimizer is None and _steps(metric):
            raise ArgumentError("optimizer", f"be given for `{metric.name}`", None)
        chosen.append(metric)
    return chosen


def choose_monitored(
    metrics: str | Metric | Iterable[str | Metric], optimizer: Optimizer | None, loss: Loss | None
) -> list[Metric]:
    """The metrics of a monitor; without a loss, those that the training's own passes reveal.

    Raises:
        ArgumentError: `metrics` names an unknown one, or one that needs a loss or an optimizer where there is none.
    """
    if isinstance(metrics, str) and metrics in ("default", "all"):
        chosen = choose_metrics(None, optimizer, costly=metrics == "all")
        if loss is not None:
            return chosen
        # Gradients by the inputs make the first layer's backward pass dearer.
        return [m for m in chosen if _is_passive(m) and (metrics == "all" or InputGradients not in m.needs)]
    chosen = choose_metrics(metrics, optimizer)
    for metric in chosen:
        if loss is None and not _is_passive(metric):
            raise ArgumentError("loss", f"be given for `{metric.name}`, which takes passes of its own", None)
    return chosen


def _is_passive(metric: Metric) -> bool:
    return _PASSIVE.issuperset(metric.needs) and metric.name not in _NOT_PASSIVE


def _steps(metric: Metric) -> bool:
    return metric.name == "stability" or Step in metric.needs or StepPair in metric.needs


def check_input_module(model: nn.Module, module: object) -> None:
    """Check that the inputs are taken from a module of the model.

    Raises:
        ArgumentError: `input_module` is neither a module of the model, nor the name of one, nor None.
    """
    if isinstance(module, nn.Module):
        if not any(module is held for held in model.modules()):
            raise ArgumentError("input_module", "be a module of the model", type(module).__name__)
    elif isinstance(module, str):
        try:
            model.get_submodule(module)
        except AttributeError:
            raise ArgumentError("input_module", "name a module of the model", repr(module)) from None
    elif module is not None:
        raise ArgumentError("input_module", "be a module of the model", type(module).__name__)


def check_rules(rules: object) -> None:
    """Check rules for the examples' gradients.

    Raises:
        ArgumentError: `rules` does not map functions and module classes to rules.
    """
    if rules is None:
        return
    held: Mapping[Any, Any] = cast(Any, rules) if isinstance(rules, Mapping) else {None: None}
    if not all(callable(key) and callable(rule) for key, rule in held.items()):
        raise ArgumentError("rules", "map functions and module classes to rules", repr(cast(Any, rules)))


def check_options(
    weights: object, inputs: object, derivative: object, micro_batches: object, optimizer: object, layers: object
) -> None:
    """Check the arguments that `measure` and `Monitor` share.

    Raises:
        ArgumentError: One of them is not what it must be.
    """
    for name, sampler, field in (("weights", weights, "span"), ("inputs", inputs, "examples")):
        # A class has what its objects have.
        if sampler is not None and (
            isinstance(sampler, type) or not hasattr(sampler, "draw") or not hasattr(sampler, field)
        ):
            raise ArgumentError(name, f"be a sampler of gradmon.perturbations.{name}", type(sampler).__name__)
    if derivative not in ("finite", "exact"):
        raise ArgumentError("derivative", 'be "finite" or "exact"', repr(derivative))
    if derivative == "finite" and getattr(weights, "exact", False):
        raise ArgumentError("derivative", f'be "exact" for {type(weights).__name__}', '"finite"')
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 2:
        raise ArgumentError("micro_batches", "be an integer of at least 2", micro_batches)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError("optimizer", "be a torch.optim.Optimizer", type(optimizer).__name__)
    if not isinstance(layers, bool):
        raise ArgumentError("layers", "be True or False", layers)


def check_described(seed: object, rules: object, hparams: object) -> None:
    """Check the seed, the rules, and what describes the run.

    Raises:
        ArgumentError: One of them is not what it must be.
    """
    check_seed(seed)
    check_rules(rules)
    check_hparams(hparams)


def check_monitor(
    model: nn.Module,
    optimizer: Optimizer | None,
    loss: object,
    reduction: object,
    schedule: object,
    run: object,
    rank: object,
    max_memory: object,
    example_dim: object,
    group_timeout: object,
) -> None:
    """Check the arguments of `Monitor` alone.

    Raises:
        ArgumentError: One of them is not what it must be.
    """
    if optimizer is not None:
        check_trains(optimizer, trainable(model).values())
    if loss is None and getattr(optimizer, "several_passes", False):
        must = f"be given with {type(optimizer).__name__}, whose steps take several backward passes"
        raise ArgumentError("loss", must, None)
    check_loss(loss, optional=True)
    if reduction not in ("mean", "sum"):
        raise ArgumentError("reduction", 'be "mean" or "sum"', repr(reduction))
    if schedule is not None and not callable(schedule) and not isinstance(schedule, budget):
        raise ArgumentError("schedule", "be a budget, or callable as schedule(step)", repr(schedule))
    if not isinstance(run, str) or not run:
        raise ArgumentError("run", "be a name", repr(run))
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ArgumentError("rank", "be an integer of at least 0", rank)
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1:
        raise ArgumentError("max_memory", "be an integer of at least 1", max_memory)
    if example_dim is not None and (
        isinstance(example_dim, bool) or not isinstance(example_dim, int) or example_dim < 0
    ):
        raise ArgumentError("example_dim", "be an integer of at least 0, or None", example_dim)
    if isinstance(group_timeout, bool) or not isinstance(group_timeout, (int, float)) or not 0 < group_timeout < 1e9:
        raise ArgumentError("group_timeout", "be a positive number of seconds", group_timeout)


def asked_alike(
    info: Mapping[str, Any], metrics: Iterable[Metric], mask: Mask | None, micro_batches: int, max_memory: int
) -> dict[str, Any]:
    """What the monitors of several ranks must have in common, as plain types."""
    same = {name: info[name] for name in info if name in _ALIKE}
    return {
        **same,
        "metrics": ", ".join(metric.name for metric in metrics),
        "mask": repr(mask),
        "micro_batches": micro_batches,
        "max_memory": max_memory,
    }


def _is_plain(value: object) -> bool:
    """Whether it is a string, a boolean, or a number that a sink can write: not an integer beyond all floats."""
    if not isinstance(value, Real):
        return isinstance(value, str)
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_hparams(hparams: object) -> None:
    """Check what describes a run.

    Raises:
        ArgumentError: `hparams` does not map names to numbers, strings or booleans.
    """
    if hparams is None:
        return
    held: Mapping[Any, Any] = cast(Any, hparams) if isinstance(hparams, Mapping) else {None: None}
    if not all(isinstance(name, str) and _is_plain(value) for name, value in held.items()):
        raise ArgumentError("hparams", "map names to numbers, strings or booleans", repr(cast(Any, hparams)))
