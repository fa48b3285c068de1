"""The batch gradient itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gradmon._evidence import BatchGradient
from gradmon._parameters import Weights
from gradmon.probes.scene import Scene


def batch_gradient(scene: Scene) -> BatchGradient:
    """The loss and the norms at w: one forward and backward pass."""
    objective, gradient = scene.objective, scene.gradient
    return gradient_evidence(objective.weights, objective.base, gradient.parts, gradient.loss, objective.total)


def gradient_evidence(
    weights: Weights, values: Sequence[Tensor], gradients: Sequence[Tensor], loss: float, examples: int
) -> BatchGradient:
    """The evidence of a gradient that is there already.

    Args:
        weights: The layout of w.
        values: w, one tensor per parameter.
        gradients: h, one tensor per parameter.
        loss: The batch loss.
        examples: The number B of examples.
    """
    squares = weights.full.squares_by_layer(weights.flatten(gradients))
    return BatchGradient(
        loss=loss,
        gradient_norm=math.sqrt(sum(squares.values())),
        parameter_norm=weights.full.norm(weights.flatten(values)),
        layer_gradient_norms={layer: math.sqrt(square) for layer, square in squares.items()},
        examples=examples,
    )
