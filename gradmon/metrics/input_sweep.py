"""How much an example's gradient moves when its input moves."""

from __future__ import annotations

import torch

from gradmon._errors import Unavailable
from gradmon._evidence import InputSweep
from gradmon.metrics._metric import Value
from gradmon.metrics._resolution import resolution, trusted


def input_condition(sweep: InputSweep) -> Value:
    """The condition number of the examples' gradients with respect to their inputs.

    The mean over the examples of ``max_k ||h(w, x_i + delta_k, t_i) - h_i|| ||x_i|| / (||delta_k|| ||h_i||)``.
    Examples without a gradient, and perturbations of length zero, are left out.

    Range: >= 0, low is good. Source: Nelson 2022, Definition 3.4, equation 3.16.

    Raises:
        Unavailable: No example has a gradient, all perturbations are zero, or rounding hides the change.
    """
    alive = sweep.gradient_norms > 0
    if not bool(alive.any()):
        raise Unavailable("zero gradient")
    lengths = sweep.perturbation_norms[alive]
    changes = sweep.difference_norms[alive]
    sizes, inputs = sweep.gradient_norms[alive], sweep.input_norms[alive]
    slopes = torch.where(lengths > 0, changes / lengths, torch.full_like(lengths, float("-inf")))
    steepest, place = slopes.max(1)
    usable = torch.isfinite(steepest)
    if not bool(usable.any()):
        raise Unavailable("zero perturbation")
    values = (steepest * inputs / sizes)[usable]
    chosen = place[usable, None]
    length, change = lengths[usable].gather(1, chosen)[:, 0], changes[usable].gather(1, chosen)[:, 0]
    scales = length / inputs[usable]
    value, scale = float(values.mean()), float(scales.median())
    seen = zip(sizes[usable], change, scales, strict=True)
    errors = [resolution(sweep.epsilon, float(a), float(b), float(c)) for a, b, c in seen]
    # The mean of the relative errors, each weighted by its part of the value.
    weights = values if value > 0 else torch.ones_like(values)
    error = float((torch.tensor(errors, dtype=torch.float64) * weights).sum() / weights.sum())
    return Value(value, scale, trusted(error, scale))
