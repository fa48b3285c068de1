"""How good an estimate is: its cosine to the true gradient, and what a step along it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmon import Metric
from gradmon._errors import ArgumentError, Unavailable
from gradmon._evidence import Step
from gradmon._parameters import layer_of
from gradmon._tensors import wide
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.passes import Passes

STEPS = tuple(10.0**power for power in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
"""Lengths of a step, relative to the length of the weights."""


class Cosines(NamedTuple):
    """Cosines between an estimate and the true gradient, in [-1, 1]; NaN where one of them is zero or not finite.

    Attributes:
        whole: Over all parameters.
        without_last: Over all but the parameters of the last layer.
        layers: Over the parameters of each module.
    """

    whole: float
    without_last: float
    layers: dict[str, float]


def true_gradient(model: nn.Module, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the batch loss by backpropagation, named as by `estimate_gradient`; the model stays as it was."""
    with Passes(model, loss, batch) as passes, torch.enable_grad():
        value = passes.run().mean()
        found = torch.autograd.grad(value, list(passes.parameters.values()), allow_unused=True)
        pairs = zip(passes.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if part is None else part for (name, p), part in pairs}


def cosines(estimate: Mapping[str, Tensor], truth: Mapping[str, Tensor], last: str | None = None) -> Cosines:
    """The cosines between an estimate and the true gradient, accumulated in float64.

    Args:
        estimate: One tensor per parameter name.
        truth: The same names.
        last: The module that `without_last` leaves out; None for that of the last name.

    Raises:
        ArgumentError: The names differ.
    """
    if set(estimate) != set(truth) or not truth:
        raise ArgumentError("estimate", "have the names of `truth`", sorted(estimate))
    last = layer_of(list(truth)[-1]) if last is None else last
    products: dict[str, list[float]] = {}
    for name, part in truth.items():
        a, b = wide(estimate[name].reshape(-1)), wide(part.reshape(-1))
        sums = products.setdefault(layer_of(name), [0.0, 0.0, 0.0])
        for place, value in enumerate((a @ b, a @ a, b @ b)):
            sums[place] += float(value)

    def over(layers: Sequence[str]) -> float:
        ab, aa, bb = (sum(products[layer][place] for layer in layers) for place in range(3))
        if not (0 < aa < math.inf and 0 < bb < math.inf):
            return math.nan
        return max(-1.0, min(1.0, ab / (math.sqrt(aa) * math.sqrt(bb))))

    names = list(products)
    others = [layer for layer in names if layer != last]
    return Cosines(over(names), over(others), {layer: over([layer]) for layer in names})


def one_step_effectiveness(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    estimate: Mapping[str, Tensor],
    truth: Mapping[str, Tensor] | None = None,
    steps: Sequence[float] = STEPS,
) -> float:
    """The largest decrease of the batch loss by one step against an estimate, over that by one against the gradient.

    Each is the best over the same grid of lengths; a step that does not help counts as none (arXiv 2312.04709, table
    1).

    Args:
        model: The model, left as it was.
        loss: ``loss(model, batch)``.
        batch: The batch.
        estimate: One tensor per parameter name.
        truth: The true gradient; None to find it.
        steps: The lengths ``||omega||``, relative to ``||w||``.

    Returns:
        At least 0, and about 1 for the gradient itself.

    Raises:
        Unavailable: No step against the gradient decreases the loss, or the loss or a direction is not finite.
    """
    truth = true_gradient(model, loss, batch) if truth is None else truth
    with Passes(model, loss, batch) as passes:
        held = {name: parameter.data for name, parameter in passes.parameters.items()}
        size = math.sqrt(sum(float(wide(value).square().sum()) for value in held.values()))
        before = float(passes.run().mean())

        def best(direction: Mapping[str, Tensor]) -> float:
            length = math.sqrt(sum(float(wide(part).square().sum()) for part in direction.values()))
            if not math.isfinite(length):
                raise Unavailable("non-finite gradient or guess")
            if length == 0:
                return 0.0
            found = [0.0]
            for step in steps:
                try:
                    for name, parameter in passes.parameters.items():
                        parameter.data = held[name] - direction[name] * (step * size / length)
                    after = float(passes.run().mean())
                finally:
                    for name, parameter in passes.parameters.items():
                        parameter.data = held[name]
                found.append(before - after if math.isfinite(after) else 0.0)
            return max(found)

        whole = best(truth)
        if not math.isfinite(before) or whole <= 0:
            raise Unavailable("no step against the gradient decreases the loss")
        return best(estimate) / whole


def _step_cosine(step: Step) -> float:
    length = step.coordinates.norm(step.perturbation) * step.coordinates.norm(step.gradient)
    if length == 0:
        raise Unavailable("zero gradient or step")
    return -step.coordinates.dot(step.perturbation, step.gradient) / length


STEP_COSINE = Metric(
    "step_cosine",
    (Step,),
    _step_cosine,
    "high",
    "arXiv 2312.04709, table 1",
    "step-consistency",
    "The cosine between the step that the optimizer takes and the one against the true gradient.",
    "Take more guesses, or ones that know more of the network.",
)
"""For ``Monitor(..., metrics=[STEP_COSINE])``: with plain SGD it is the cosine of the guessed to the true gradient."""
