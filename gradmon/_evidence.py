"""What a probe saw: typed values from which the metrics are computed, and which know no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradmon._tensors import Coordinates, from_plain, to_plain


@dataclass(frozen=True)
class BatchGradient:
    """The batch and its gradient at w.

    Attributes:
        loss: The batch loss.
        gradient_norm: ``||h||``, over all of w.
        parameter_norm: ``||w||``, over all of w.
        layer_gradient_norms: ``||h||`` of each layer.
        examples: The number B of examples.
    """

    loss: float
    gradient_norm: float
    parameter_norm: float
    layer_gradient_norms: Mapping[str, float]
    examples: int


@dataclass(frozen=True)
class WeightSweep:
    """The gradient at some perturbed weights, on one batch.

    Attributes:
        coordinates: How the vectors below count.
        weights: w, (k,).
        gradient: h_0, (k,).
        perturbations: omega_1..omega_n as they came out in working precision, (n, k).
        gradients: h_1..h_n, (n, k).
        differences: ``h_k - h_0``, (n, k), taken before anything was rounded again; ``H omega_k`` for exact products.
        scales: ``||omega_k|| / ||w||`` over all of w, one per perturbation.
        epsilon: The relative rounding error of one number at the working precision.
        exact: Whether the differences are Hessian products.
        combination: Where the perturbations are to be taken together: the coefficients, (n,), of the combination of
            them along which the gradient, over all of w, changes most for its length; None otherwise.
    """

    coordinates: Coordinates
    weights: Tensor
    gradient: Tensor
    perturbations: Tensor
    gradients: Tensor
    differences: Tensor
    scales: tuple[float, ...]
    epsilon: float
    exact: bool
    combination: Tensor | None


@dataclass(frozen=True)
class ScaledSweep:
    """The same perturbations at their scale and at a tenth of it."""

    whole: WeightSweep
    tenth: WeightSweep


@dataclass(frozen=True)
class Curvature:
    """The Hessian on the span of some directions.

    Attributes:
        projected: ``q_i . H q_j`` over all of w, (n, n), float64.
        products: ``q_i . q_j``, (n, n), float64.
        scale: ``||omega|| / ||w||`` at which the products were taken; None for exact ones.
        resolution: Their estimated relative rounding error.
        learning_rate: The optimizer's, where all its groups share one and it is plain or momentum SGD; else None.
        optimizer: The optimizer's class, and for SGD why it has no such rate; None without one.
    """

    projected: Tensor
    products: Tensor
    scale: float | None
    resolution: float
    learning_rate: float | None
    optimizer: str | None


@dataclass(frozen=True)
class InputSweep:
    """The examples' gradients at some perturbed inputs.

    Attributes:
        input_norms: ``||x_i||``, (m,).
        gradient_norms: ``||h_i||``, (m,).
        perturbation_norms: ``||delta_k||`` as it came out, (m, n); NaN where an example has fewer than n.
        difference_norms: ``||h(w, x_i + delta_k) - h_i||``, (m, n).
        epsilon: The relative rounding error of one number at the working precision.
    """

    input_norms: Tensor
    gradient_norms: Tensor
    perturbation_norms: Tensor
    difference_norms: Tensor
    epsilon: float


@dataclass(frozen=True)
class PerExampleGradients:
    """The inner products of the examples' gradients at w.

    Attributes:
        gram: ``h_i . h_j``, (B, B), float64.
        total: The number P of entries of w.
        micro_batches: Into how many equal parts the metrics over batch means divide the batch.
        epsilon: The relative rounding error of one number at the working precision.
        resolution: The relative rounding error of an inner product of two gradients of norm 1.
    """

    gram: Tensor
    total: int
    micro_batches: int
    epsilon: float
    resolution: float


@dataclass(frozen=True)
class GradientMoments:
    """Mean and variance over the examples of each looked-at coordinate of their gradients.

    Attributes:
        means: (k,), float64.
        variances: Unbiased, (k,), float64; NaN for a batch of one.
        seen: Which coordinates are not zero for all examples, (k,), bool.
        examples: The number B of examples.
    """

    means: Tensor
    variances: Tensor
    seen: Tensor
    examples: int


@dataclass(frozen=True)
class InputGradients:
    """The gradients of the examples with respect to their own inputs.

    Attributes:
        gram: ``g_i . g_j``, (B, B), float64.
        total: The number D of entries of one input.
    """

    gram: Tensor
    total: int


@dataclass(frozen=True)
class Step:
    """The optimizer's step omega, and the gradient before and after it.

    Attributes:
        coordinates: How the vectors below count.
        weights: w before the step, (k,).
        perturbation: omega, (k,).
        gradient: ``h(w, chi)``, (k,).
        after: ``h(w + omega, chi)``, (k,); None where it was not taken.
        weight_norm: ``||w||`` over all of w.
        step_norm: ``||omega||`` over all of w.
        layer_update_ratios: ``||omega|| / ||w||`` of each layer.
        epsilon: The relative rounding error of one number at the working precision.
    """

    coordinates: Coordinates
    weights: Tensor
    perturbation: Tensor
    gradient: Tensor
    after: Tensor | None
    weight_norm: float
    step_norm: float
    layer_update_ratios: Mapping[str, float]
    epsilon: float


@dataclass(frozen=True)
class StepPair:
    """A step, and the gradient on the next batch chi' before and after it.

    Attributes:
        step: The step on the batch chi.
        other: ``h(w, chi')``, (k,); None without a next batch.
        other_after: ``h(w + omega, chi')``, (k,); None without a next batch.
    """

    step: Step
    other: Tensor | None
    other_after: Tensor | None


_KINDS = {
    kind.__name__: kind
    for kind in (
        BatchGradient,
        WeightSweep,
        ScaledSweep,
        Curvature,
        InputSweep,
        PerExampleGradients,
        GradientMoments,
        InputGradients,
        Step,
        StepPair,
    )
}
"""What can be saved, by its name."""


def evidence_to_plain(value: object) -> Any:
    """Evidence, or what it holds, as plain types; how its vectors count is left out, because the mask tells."""
    if isinstance(value, Tensor):
        return {"tensor": to_plain(value), "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Coordinates):
        return {"coordinates": True}
    if is_dataclass(value):
        held = {field.name: evidence_to_plain(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, "fields": held}
    if isinstance(value, tuple):
        return {"tuple": [evidence_to_plain(part) for part in cast("tuple[object, ...]", value)]}
    if isinstance(value, Mapping):
        return {"mapping": {k: evidence_to_plain(v) for k, v in cast("Mapping[str, object]", value).items()}}
    return value


def evidence_from_plain(state: Any, coordinates: Coordinates, device: torch.device) -> Any:
    """What `evidence_to_plain` was given.

    Args:
        state: What it made of it.
        coordinates: How its vectors count.
        device: Where the weights are.
    """

    def restored(inner: Any) -> Any:
        return evidence_from_plain(inner, coordinates, device)

    if not isinstance(state, Mapping):
        return state
    held = cast("Mapping[str, Any]", state)
    if "tensor" in held:
        return from_plain(held["tensor"]).to("cpu" if held["on_cpu"] else device)
    if "coordinates" in held:
        return coordinates
    if "tuple" in held:
        return tuple(restored(part) for part in held["tuple"])
    if "mapping" in held:
        return {name: restored(part) for name, part in held["mapping"].items()}
    return _KINDS[held["kind"]](**{name: restored(part) for name, part in held["fields"].items()})
