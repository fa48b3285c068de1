"""One-shot measuring: no training loop, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._batches import batch_tensors
from gradmon._errors import Unavailable
from gradmon._objective import Objective
from gradmon._parameters import Weights, check_trains
from gradmon._reading import Reading
from gradmon._types import Batch, Derivative, Loss, Reduction
from gradmon.masks import Mask, as_mask, check_seed
from gradmon.metrics import Metric, Value
from gradmon.options import check_input_module, check_options, check_rules, choose_metrics
from gradmon.per_example import RULES, Experience, PerExample, PerExampleResult, Rules, Wanted
from gradmon.perturbations.inputs import Ascent, InputSampler
from gradmon.perturbations.weights import Krylov, WeightSampler
from gradmon.probes import PROBES, Memory, Scene

_BLAMED = 3
"""How many layers a reading names at most."""


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
    with (
        Objective(model, loss, batch, layout, reduction) as objective,
        Scene(
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
            memory=Memory(Experience(rules=RULES if rules is None else rules)),
        ) as scene,
    ):
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
    parts: Mapping[str, float] = {} if metric.layers is None else metric.layers(*evidence)
    blame = sorted((layer for layer, part in parts.items() if part > 0), key=lambda layer: -parts[layer])[:_BLAMED]
    whole = Reading(metric.name, value.value, step, None, value.scale, value.resolution, value.reason, tuple(blame))
    single = [Reading(metric.name, part, step, layer, value.scale) for layer, part in parts.items()] if layers else []
    return [whole, *single]


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
