"""The optimizer's step, and the gradient before and after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._errors import Unavailable
from gradmon._evidence import Step, StepPair
from gradmon._objective import Objective
from gradmon._parameters import Weights
from gradmon._tensors import length, wide, working
from gradmon.probes.scene import Scene
from gradmon.probes.watch import Taken

_PLAUSIBLE = 3.0
"""How many times as far as on its own batch a step may move the gradient on the next before that is taken anew."""


def step(scene: Scene) -> Step:
    """The gradient after the step: one forward and backward pass.

    Raises:
        Unavailable: There is no optimizer, or no trial step can be made with it.
    """
    objective, weights = scene.objective, scene.objective.weights
    after = scene.once("after", lambda: _after(scene))
    moved = weights.pick(objective.gradient(after).parts)
    gradient = weights.pick(scene.gradient.parts)
    return step_evidence(weights, objective.base, after, gradient, moved, scene.epsilon)


def step_evidence(
    weights: Weights,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    gradient: Tensor,
    moved: Tensor | None,
    epsilon: float,
) -> Step:
    """The evidence of a step.

    Args:
        weights: The layout of w.
        before: w, one tensor per parameter.
        after: ``w + omega``, one tensor per parameter.
        gradient: ``h(w, chi)``, (k,).
        moved: ``h(w + omega, chi)``, (k,); None where it was not taken.
        epsilon: The relative rounding error of one number.
    """
    start = working(weights.flatten(before))
    omega = working(weights.flatten(after)) - start
    squares, steps = weights.full.squares_by_layer(start), weights.full.squares_by_layer(omega)
    return Step(
        coordinates=weights.coordinates,
        weights=weights.pick_flat(start),
        perturbation=weights.pick_flat(omega),
        gradient=gradient,
        after=moved,
        weight_norm=weights.full.norm(start),
        step_norm=weights.full.norm(omega),
        layer_update_ratios={
            layer: math.sqrt(steps[layer] / square) for layer, square in squares.items() if square > 0
        },
        epsilon=epsilon,
    )


def step_pair(scene: Scene) -> StepPair:
    """The gradient on the next batch before and after the step: two more passes; none without a next batch.

    Raises:
        Unavailable: There is no step to look at.
    """
    taken: Step = scene.get(Step)
    if scene.next_batch is None:
        return StepPair(taken, None, None)
    return across(taken, scene.objective, scene.once("after", lambda: _after(scene)), scene.next_batch)


def across(
    taken: Step,
    objective: Objective,
    after: Sequence[Tensor],
    next_batch: object,
    known: Sequence[Tensor] | None = None,
) -> StepPair:
    """A step together with the gradients on the next batch: two passes, or one.

    Args:
        taken: The step.
        objective: The objective at the weights before it, inside its sandbox.
        after: The weights after it.
        next_batch: The next batch.
        known: The gradient on it after the step, if the training itself has taken it; one tensor per parameter.
    """
    weights = objective.weights
    other = weights.pick(objective.gradient(batch=next_batch).parts)
    found = None if known is None else weights.pick(known)
    if found is None or not _plausible(taken, other, found):
        found = weights.pick(objective.gradient(after, batch=next_batch).parts)
    return StepPair(taken, other, found)


def _plausible(taken: Step, other: Tensor, known: Tensor) -> bool:
    """Whether the step has moved the gradient on the next batch by no more than can be expected from the first one."""
    norm = taken.coordinates.norm
    size = norm(wide(other))
    if taken.after is None or not math.isfinite(size):
        return False
    moved = norm(wide(taken.after) - wide(taken.gradient))
    return norm(wide(known) - wide(other)) <= _PLAUSIBLE * moved + 32 * taken.epsilon * size


def _after(scene: Scene) -> Sequence[Tensor]:
    if scene.after is not None:
        return scene.after
    if scene.optimizer is None or not scene.trial:
        raise Unavailable("no optimizer step was taken")
    gradient, weights = scene.gradient, scene.objective.weights
    taken = [None if place in gradient.unused else part for place, part in enumerate(gradient.parts)]
    return trial_step(scene.optimizer, weights.parameters, scene.objective.base, taken)


def trial_step(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    values: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> list[Tensor]:
    """Where a step of the optimizer would lead, taken on copies, with a copy of its state.

    Args:
        optimizer: The optimizer; it and its parameters stay as they are.
        parameters: The trainable parameters.
        values: Their values.
        gradients: Their gradients; None where the loss does not depend on a parameter.

    Returns:
        The values after the step, one tensor per parameter.

    Raises:
        Unavailable: The optimizer cannot be copied, or needs a closure.
    """
    twins = [nn.Parameter(value.detach().clone()) for value in values]
    for twin, parameter, gradient in zip(twins, parameters, gradients, strict=True):
        twin.grad = None if gradient is None else gradient.detach().clone().to(parameter.dtype)
    memo = {id(parameter): twin for parameter, twin in zip(parameters, twins, strict=True)}
    try:
        copy.deepcopy(optimizer, memo).step()
    except Exception as error:
        raise Unavailable(f"no trial step with {type(optimizer).__name__}: {error}") from error
    return [twin.detach() for twin in twins]


def is_plain(taken: Taken, scene: Scene) -> bool:
    """Whether the gradient that the optimizer used is, up to rounding, that of the batch: not clipped, not summed."""
    if not taken.gradients:
        return False
    layout, own = scene.objective.weights, scene.gradient.parts
    pairs = zip(taken.filled(layout), own, strict=True)
    gap = math.sqrt(sum(length(wide(used) - wide(part)) ** 2 for used, part in pairs))
    return gap <= 32 * scene.epsilon * math.sqrt(sum(length(part) ** 2 for part in own))
