"""One-shot measuring: no training loop, and nothing left behind."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._batches import batch_tensors
from gradmon._errors import ArgumentError, PluginError, Unavailable
from gradmon._evidence import Step, StepPair
from gradmon._objective import Objective
from gradmon._parameters import Weights, check_trains
from gradmon._plugins import entry_points_named, load
from gradmon._reading import Reading
from gradmon._types import Batch, Derivative, Loss, Reduction
from gradmon.masks import Mask, as_mask, check_seed
from gradmon.metrics import METRICS, Metric, Value
from gradmon.per_example import RULES, Experience, PerExample, PerExampleResult, Rules, Wanted
from gradmon.perturbations.inputs import Ascent, InputSampler
from gradmon.perturbations.weights import Krylov, WeightSampler
from gradmon.probes import PROBES, Scene


def measure(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    metrics: str | Metric | Sequence[str | Metric] | None = None,
    optimizer: Optimizer | None = None,
    mask: Mask | float | None = None,
    weights: WeightSampler | None = None,
    inputs: InputSampler | None = None,
    derivative: Derivative = "finite",
    micro_batches: int = 8,
    next_batch: Batch | None = None,
    reduction: Reduction = "mean",
    input_module: nn.Module | str | None = None,
    layers: bool = False,
    seed: int = 0,
    rules: Rules | None = None,
) -> dict[str, Reading]:
    """Measure how far the gradient of one batch can be trusted.

    The model, its gradients, buffers, modes and all random states are afterwards exactly as before; so is the
    optimizer, whose step is tried on copies.

    Args:
        model: The model, in the mode in which it trains.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batch: Tensors in any nesting of tuples, lists, mappings and dataclasses, examples along the first dimension;
            the first tensor says how many there are.
        metrics: Names from `gradmon.METRICS`, or `Metric` objects; None for all but those on demand, and without an
            optimizer all but those that look at its step.
        optimizer: The optimizer whose next step is looked at.
        mask: Look at these coordinates of the gradient only: a `Mask`, a fraction in (0, 1], or None for all.
        weights: The sampler of weight perturbations; None for `Krylov()`.
        inputs: The sampler of input perturbations; None for `Ascent()`.
        derivative: ``"finite"`` for differences of gradients, ``"exact"`` for Hessian products.
        micro_batches: n of the metrics over batch means, at least 2.
        next_batch: The batch of the next step, for `step_share`, `batch_share` and `step_condition`.
        reduction: How one value per example becomes the batch loss.
        input_module: The module (or its name) whose output is an example's input x; None for the batch's first
            floating-point tensor that the model consumes, or the embedding that looks up its integers.
        layers: Whether to add readings for each layer, under ``"name/layer"``.
        seed: The seed of the mask and the samplers.
        rules: How the examples' gradients in the uses of a function, or in a module of a class, are had; None for
            `gradmon.per_example.RULES`.

    Returns:
        One reading for each metric, by name; NaN with a reason where a number cannot be trusted.

    Raises:
        ArgumentError: An argument is not what it must be.

    Example:
        >>> import torch, gradmon
        >>> model = torch.nn.Linear(3, 1)
        >>> batch = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> sorted(gradmon.measure(model, loss, batch, metrics=["grad_norm", "noise_scale"]))
        ['grad_norm', 'noise_scale']
    """
    check_options(weights, inputs, derivative, micro_batches, optimizer, layers)
    check_seed(seed)
    check_rules(rules)
    check_input_module(model, input_module)
    if next_batch is not None:
        batch_tensors(next_batch, "next_batch")
    chosen = choose_metrics(metrics, optimizer)
    chosen_mask = as_mask(mask, seed)
    layout = Weights(model, None if chosen_mask is None else chosen_mask.picks(model))
    if optimizer is not None:
        check_trains(optimizer, layout.parameters)
    with Objective(model, loss, batch, layout, reduction) as objective:
        scene = Scene(
            objective,
            PROBES,
            weight_sampler=weights or Krylov(),
            input_sampler=inputs or Ascent(),
            derivative=derivative,
            micro_batches=micro_batches,
            optimizer=optimizer,
            next_batch=next_batch,
            input_module=input_module,
            seed=seed,
            needed=frozenset(kind for metric in chosen for kind in metric.needs),
            experience=Experience(rules=RULES if rules is None else rules),
        )
        found = [reading for metric in chosen for reading in readings_of(metric, scene, layers=layers)]
    return {r.name if r.layer is None else f"{r.name}/{r.layer}": r for r in found}


def readings_of(metric: Metric, scene: Scene, *, layers: bool = False, step: int | None = None) -> list[Reading]:
    """The readings of one metric: its own, and with `layers` one for each layer."""
    try:
        evidence = [scene.get(kind) for kind in metric.needs]
        return readings_from(metric, evidence, layers=layers, step=step)
    except Unavailable as missing:
        return [Reading(metric.name, math.nan, step, reason=missing.reason)]


def readings_from(metric: Metric, evidence: Sequence[Any], *, layers: bool, step: int | None) -> list[Reading]:
    """The readings of one metric from its evidence.

    Raises:
        Unavailable: There is no number.
    """
    found = metric.compute(*evidence)
    value = found if isinstance(found, Value) else Value(float(found))
    if math.isnan(value.value):
        raise Unavailable(value.reason or "not a number")
    readings = [Reading(metric.name, value.value, step, None, value.scale, value.resolution, value.reason)]
    if layers and metric.layers is not None:
        parts = metric.layers(*evidence)
        readings += [Reading(metric.name, part, step, layer, value.scale) for layer, part in parts.items()]
    return readings


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
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 2:
        raise ArgumentError("micro_batches", "be an integer of at least 2", micro_batches)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError("optimizer", "be a torch.optim.Optimizer", type(optimizer).__name__)
    if not isinstance(layers, bool):
        raise ArgumentError("layers", "be True or False", layers)


def _layout(model: nn.Module, mask: Mask | float | None) -> Weights:
    chosen = as_mask(mask, 0)
    return Weights(model, None if chosen is None else chosen.picks(model))


def batch_gradient(
    model: nn.Module, loss: Loss, batch: Batch, *, mask: Mask | float | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """The gradient h of the batch loss with respect to the trainable parameters.

    Args:
        model: The model.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batch: The batch.
        mask: The coordinates to return; None for all.
        reduction: How one value per example becomes the batch loss.

    Returns:
        (P,), in the order of `named_parameters()`, or (k,) under a mask; zeros for parameters the loss does not use.

    Raises:
        ArgumentError: An argument is not what it must be.
    """
    with Objective(model, loss, batch, _layout(model, mask), reduction) as objective:
        return objective.weights.pick(objective.gradient().parts)


def per_example_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    mask: Mask | float | None = None,
    reduction: Reduction = "mean",
    rules: Rules | None = None,
) -> Tensor:
    """The gradients h_i of the examples, as shares of the batch gradient times B: their mean is `batch_gradient`.

    Args:
        model: The model.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batch: The batch.
        mask: The coordinates to return; None for all.
        reduction: How one value per example becomes the batch loss.
        rules: How the examples' gradients in the uses of a function, or in a module of a class, are had; None for
            `gradmon.per_example.RULES`.

    Returns:
        (B, P), or (B, k) under a mask.

    Raises:
        ArgumentError: An argument is not what it must be.
        Unavailable: The examples' gradients cannot be told apart; the reason names the parameter or the call.
    """
    found = _examples(model, loss, batch, _layout(model, mask), reduction, rules, Wanted(gram=False, rows=True))
    assert found.rows is not None
    return found.rows


def per_example_gram(
    model: nn.Module, loss: Loss, batch: Batch, *, reduction: Reduction = "mean", rules: Rules | None = None
) -> Tensor:
    """The inner products of the examples' gradients, without ever holding these as one matrix.

    Args:
        model: The model.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,).
        batch: The batch.
        reduction: How one value per example becomes the batch loss.
        rules: How the examples' gradients in the uses of a function, or in a module of a class, are had; None for
            `gradmon.per_example.RULES`.

    Returns:
        ``G_ij = h_i . h_j``, (B, B), float64.

    Raises:
        ArgumentError: An argument is not what it must be.
        Unavailable: The examples' gradients cannot be told apart; the reason names the parameter or the call.
    """
    found = _examples(model, loss, batch, _layout(model, None), reduction, rules, Wanted(precise=True))
    assert found.gram is not None
    return found.gram


def _examples(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    layout: Weights,
    reduction: Reduction,
    rules: Rules | None,
    wanted: Wanted,
) -> PerExampleResult:
    check_rules(rules)
    with Objective(model, loss, batch, layout, reduction) as objective:
        experience = Experience(rules=RULES if rules is None else rules)
        return PerExample(objective, experience=experience).run(wanted).result
