"""Where the variance of the gradient comes from: the optimizer's step, or the next batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Step, StepPair
from gradmon._tensors import wide
from gradmon.metrics._metric import Value
from gradmon.metrics._resolution import resolution, trusted


def step_ratio(step: Step) -> Value:
    """``||h(w + omega, chi) - h(w, chi)|| / ||h(w, chi)||``: how much of the gradient one step destroys.

    Range: >= 0, low is good; above 1 the step is too long. Source: Nelson 2022, objective 2.

    Raises:
        Unavailable: The gradient is zero, or rounding hides the change.
    """
    size = _nonzero(step)
    change = _change(step)
    return _difference(step, change / size, change)


def step_condition(pair: StepPair) -> Value:
    """`weight_condition` for the step that the optimizer took, from two consecutive batches.

    ``||h(w + omega, chi') - h(w, chi)|| ||w|| / (||omega|| ||h(w, chi)||)``; at chi where there is no next batch. The
    change of the batch is part of it, divided by the length of the step: compare a run with itself, not with one of
    another learning rate.

    Range: >= 0, low is good. Source: Nelson 2022, Definition 2.5 with i != j, page 37.

    Raises:
        Unavailable: The gradient or the step is zero, or rounding hides the change.
    """
    step = pair.step
    size = _nonzero(step)
    norm = step.coordinates.norm
    length = norm(step.perturbation)
    if length == 0:
        raise Unavailable("zero step")
    change = norm(_onto_next(pair))
    return _difference(step, change * norm(step.weights) / (length * size), change)


def step_share(pair: StepPair) -> Value:
    """``||h(w + omega, chi) - h(w, chi)||^2 / S``, S the sum of this and of the next batch's.

    Range: [0, 1]: 1 where only the step moves the gradient, 0 where only the batch does. Source: Nelson 2022,
    objective 2.

    Raises:
        Unavailable: There is no next batch, or nothing moves the gradient.
    """
    by_step, by_batch = _two_sources(pair)
    return _difference(pair.step, by_step / (by_step + by_batch), math.sqrt(by_step))


def batch_share(pair: StepPair) -> Value:
    """``||h(w, chi') - h(w, chi)||^2 / S``: one minus `step_share`.

    Range: [0, 1]. Source: Nelson 2022, objective 2.

    Raises:
        Unavailable: There is no next batch, or nothing moves the gradient.
    """
    by_step, by_batch = _two_sources(pair)
    size, scale = pair.step.coordinates.norm(pair.step.gradient), _scale(pair.step)
    # An absolute error: a batch that changes nothing beside a step that does has a share of 0.
    error = resolution(pair.step.epsilon, size, math.sqrt(by_step + by_batch), 1.0)
    return Value(by_batch / (by_step + by_batch), scale, trusted(error, scale))


def update_ratio(step: Step) -> float:
    """``||omega|| / ||w||``, over all of w.

    Range: >= 0; 1e-3 is usual.

    Raises:
        Unavailable: The weights are zero.
    """
    if step.weight_norm == 0:
        raise Unavailable("zero weights")
    return step.step_norm / step.weight_norm


def step_layers(step: Step) -> Mapping[str, float]:
    """Each layer's part of ``||h(w + omega, chi) - h(w, chi)||^2``."""
    return step.coordinates.shares_by_layer(_moved(step))


def pair_step_layers(pair: StepPair) -> Mapping[str, float]:
    """Each layer's part of ``||h(w + omega, chi) - h(w, chi)||^2``."""
    return step_layers(pair.step)


def condition_layers(pair: StepPair) -> Mapping[str, float]:
    """Each layer's part of ``||h(w + omega, chi') - h(w, chi)||^2``."""
    return pair.step.coordinates.shares_by_layer(_onto_next(pair))


def batch_layers(pair: StepPair) -> Mapping[str, float]:
    """Each layer's part of ``||h(w, chi') - h(w, chi)||^2``; empty without a next batch."""
    if pair.other is None:
        return {}
    return pair.step.coordinates.shares_by_layer(wide(pair.other) - wide(pair.step.gradient))


def _nonzero(step: Step) -> float:
    size = step.coordinates.norm(step.gradient)
    if size == 0:
        raise Unavailable("zero gradient")
    return size


def _change(step: Step) -> float:
    return step.coordinates.norm(_moved(step))


def _moved(step: Step) -> Tensor:
    """``h(w + omega, chi) - h(w, chi)``."""
    if step.after is None:
        raise Unavailable("the gradient after the step was not taken")
    return wide(step.after) - wide(step.gradient)


def _onto_next(pair: StepPair) -> Tensor:
    """``h(w + omega, chi') - h(w, chi)``, at chi where there is no next batch."""
    return _moved(pair.step) if pair.other_after is None else wide(pair.other_after) - wide(pair.step.gradient)


def _scale(step: Step) -> float:
    return step.step_norm / step.weight_norm if step.weight_norm > 0 else math.inf


def _two_sources(pair: StepPair) -> tuple[float, float]:
    if pair.other is None:
        raise Unavailable("no next batch")
    by_step = _change(pair.step) ** 2
    by_batch = pair.step.coordinates.norm(wide(pair.other) - wide(pair.step.gradient)) ** 2
    if by_step + by_batch == 0:
        raise Unavailable("neither the step nor the batch moves the gradient")
    if not math.isfinite(by_step + by_batch):
        raise Unavailable("non-finite gradient after the step or on the next batch")
    return by_step, by_batch


def _difference(step: Step, value: float, change: float) -> Value:
    """A value that is proportional to a change of the gradient, with its scale and resolution."""
    if not math.isfinite(value):
        raise Unavailable("non-finite gradient after the step")
    scale = _scale(step)
    if scale == 0:  # the step did not move the weights: nothing is a difference
        return Value(value, scale, step.epsilon)
    size = step.coordinates.norm(step.gradient)
    return Value(value, scale, trusted(resolution(step.epsilon, size, change, scale), scale))
