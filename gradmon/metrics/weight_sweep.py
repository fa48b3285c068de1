"""Step-consistency: how much the gradient moves when the weights move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Curvature, ScaledSweep, WeightSweep
from gradmon._tensors import largest_quotient, wide
from gradmon.metrics._metric import Value
from gradmon.metrics._resolution import resolution, trusted


def weight_condition(sweep: WeightSweep) -> Value:
    """The condition number of the gradient with respect to the weights.

    ``max_k ||h_k - h_0|| ||w|| / (||omega_k|| ||h_0||)``, all four norms on the same coordinates; for perturbations
    that are taken together, the largest over their span.

    Range: >= 0, low is good. It is a number at the scale s of the perturbations: where the gradient there has nothing
    in common with h_0 any more, it is about 2/s, however much worse things are. Source: Nelson 2022, Definition 2.5
    with i = j.

    Raises:
        Unavailable: The gradient or all perturbations are zero, or rounding hides the change.
    """
    base = _nonzero(sweep)
    omega, change, scale = _steepest(sweep)
    norm = sweep.coordinates.norm
    step, moved = norm(omega), norm(change)
    if step == 0:
        raise Unavailable("zero perturbation")
    error = sweep.epsilon if sweep.exact else resolution(sweep.epsilon, base, moved, scale)
    return Value(moved * norm(sweep.weights) / (step * base), scale, trusted(error, scale))


def weight_cosine(sweep: WeightSweep) -> Value:
    """``min_k cos(h_k, h_0)``: the worst turn of the gradient.

    Range: [-1, 1], high is good. Source: Nelson 2022, Definition 4.1.

    Raises:
        Unavailable: A gradient is zero.
    """
    base = _nonzero(sweep)
    dot, norm = sweep.coordinates.dot, sweep.coordinates.norm
    lengths = [norm(h) for h in sweep.gradients]
    if not all(lengths):
        raise Unavailable("zero gradient at perturbed weights")
    turns = [dot(h, sweep.gradient) / (length * base) for h, length in zip(sweep.gradients, lengths, strict=True)]
    worst = min(range(len(turns)), key=turns.__getitem__)
    return Value(min(1.0, max(-1.0, turns[worst])), sweep.scales[worst], sweep.epsilon)


def weight_diversity(sweep: WeightSweep) -> Value:
    """``sum_k ||h_k||^2 / ||sum_k h_k||^2``, k = 1..n.

    Range: >= 1/n, which is also its value where the gradient does not move; low is good. Source: Nelson 2022,
    Definition 4.2.

    Raises:
        Unavailable: The sum of the gradients is zero.
    """
    _nonzero(sweep)
    together = wide(sweep.gradients).sum(0)
    norm = sweep.coordinates.norm
    squares = sum(norm(h) ** 2 for h in sweep.gradients)
    total = norm(together) ** 2
    if total <= squares * (4 * sweep.epsilon) ** 2:
        raise Unavailable("zero gradient")
    return Value(squares / total, _middle(sweep.scales), sweep.epsilon)


def weight_coherence(sweep: WeightSweep) -> Value:
    """``sum_k <h_0, h_k> / sum_k ||h_k||^2``.

    Range: about 1 where the gradient does not move; high is good. Source: Nelson 2022, Definition 4.3.

    Raises:
        Unavailable: The gradient is zero.
    """
    _nonzero(sweep)
    dot, norm = sweep.coordinates.dot, sweep.coordinates.norm
    squares = sum(norm(h) ** 2 for h in sweep.gradients)
    if squares == 0:
        raise Unavailable("zero gradient at perturbed weights")
    agreed = sum(dot(h, sweep.gradient) for h in sweep.gradients)
    return Value(agreed / squares, _middle(sweep.scales), sweep.epsilon)


def scale_ratio(pair: ScaledSweep) -> Value:
    """`weight_condition` at a tenth of the radius over its value at the radius.

    About 1 where the gradient is smooth, about 3 (the square root of 10) where it jumps at kinks.

    Range: >= 0. Source: gradmon.

    Raises:
        Unavailable: One of the two values is not available, or the one at the full radius is zero.
    """
    whole, tenth = weight_condition(pair.whole), weight_condition(pair.tenth)
    if whole.value == 0:
        raise Unavailable("the gradient does not move")
    return Value(tenth.value / whole.value, whole.scale, max(whole.resolution or 0.0, tenth.resolution or 0.0))


def sharpness(seen: Curvature) -> Value:
    """The largest algebraic eigenvalue of the Hessian, by Rayleigh-Ritz on the Krylov span; over all of w.

    Unit: loss per squared unit of weight. Range: real; a lower bound of the true one.

    Raises:
        Unavailable: Rounding hides the change of the gradient.
    """
    error = trusted(seen.resolution, seen.scale or 0.0)
    return Value(largest_quotient(seen.projected, seen.products)[0], seen.scale, error)


def stability(seen: Curvature) -> Value:
    """``learning rate * sharpness / 2`` for SGD: above 1 the step is past the edge of stability.

    Momentum is not counted: with momentum m the edge lies at ``1 + m``.

    Range: real, below 1 is good. Source: gradient descent on a quadratic.

    Raises:
        Unavailable: The optimizer is not SGD with one learning rate, or `sharpness` is not available.
    """
    if seen.learning_rate is None:
        raise Unavailable(f"defined for SGD with one learning rate, not for {seen.optimizer or 'no optimizer'}")
    found = sharpness(seen)
    return found._replace(value=seen.learning_rate * found.value / 2)


def condition_layers(sweep: WeightSweep) -> Mapping[str, float]:
    """Each layer's part of ``||h_k - h_0||^2`` for the perturbation with the largest ratio."""
    return sweep.coordinates.shares_by_layer(_steepest(sweep)[1])


def _steepest(sweep: WeightSweep) -> tuple[Tensor, Tensor, float]:
    """The perturbation along which the gradient moves most for its length, that move, and the relative radius."""
    if sweep.combination is not None:
        coefficients = sweep.combination.to(sweep.perturbations.device)
        omega, change = coefficients @ wide(sweep.perturbations), coefficients @ wide(sweep.differences)
        return omega, change, max(sweep.scales)
    norm = sweep.coordinates.norm
    steps = [norm(omega) for omega in sweep.perturbations]
    ratios = [norm(d) / s if s > 0 else -1.0 for d, s in zip(sweep.differences, steps, strict=True)]
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return sweep.perturbations[best], sweep.differences[best], sweep.scales[best]


def _nonzero(sweep: WeightSweep) -> float:
    largest = max(sweep.scales)
    if largest == 0:
        raise Unavailable("zero perturbation")
    if not sweep.exact:
        trusted(resolution(sweep.epsilon, 0.0, 0.0, largest), largest)
    size = sweep.coordinates.norm(sweep.gradient)
    if size == 0:
        raise Unavailable("zero gradient")
    return size


def _middle(values: tuple[float, ...]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
