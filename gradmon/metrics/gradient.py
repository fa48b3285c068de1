"""Health of the run: the numbers everybody plots."""

from __future__ import annotations

from collections.abc import Mapping

from gradmon._evidence import BatchGradient


def loss(seen: BatchGradient) -> float:
    """The loss of the batch at w."""
    return seen.loss


def grad_norm(seen: BatchGradient) -> float:
    """``||h||``, over all of w; never masked. Range: >= 0."""
    return seen.gradient_norm


def param_norm(seen: BatchGradient) -> float:
    """``||w||``, over all of w; never masked. Range: >= 0."""
    return seen.parameter_norm


def grad_norm_layers(seen: BatchGradient) -> Mapping[str, float]:
    """``||h||`` of each layer."""
    return seen.layer_gradient_norms
