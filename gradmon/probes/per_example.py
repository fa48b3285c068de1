"""The gradients of single examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import GradientMoments, InputGradients, PerExampleGradients
from gradmon._parameters import Weights
from gradmon._tensors import gram
from gradmon.per_example import PerExampleResult, Wanted
from gradmon.probes.pooling import ENDLESS_INPUTS, pooled_inputs
from gradmon.probes.scene import Scene


def per_example(scene: Scene) -> PerExampleGradients:
    """The Gram matrix of the examples' gradients.

    Raises:
        Unavailable: The examples' gradients cannot be told apart, or are not finite.
    """
    return gram_evidence(_gathered(scene, PerExampleGradients), scene.objective.weights, scene.micro_batches)


def gradient_moments(scene: Scene) -> GradientMoments:
    """Mean and variance of each looked-at coordinate over the examples.

    Raises:
        Unavailable: The examples' gradients cannot be told apart, or are not finite.
    """
    return moments_evidence(_gathered(scene, GradientMoments))


def _gathered(scene: Scene, kind: type) -> PerExampleResult:
    found = scene.examples(kind)
    # The same pass has the input gradients, for whoever asks for them later, or hears then why they are missing.
    if scene.objective.team is None or InputGradients in scene.needed:
        with contextlib.suppress(Unavailable):
            scene.once("input gradients", lambda: _inputs(scene, found.inputs))
    return found.result


def gram_evidence(found: PerExampleResult, weights: Weights, micro_batches: int) -> PerExampleGradients:
    """What the metrics over inner products need.

    Raises:
        Unavailable: They were not gathered.
    """
    if found.gram is None:
        raise Unavailable("the examples' gradients were not looked at")
    return PerExampleGradients(found.gram, weights.total, micro_batches, found.epsilon, found.resolution)


def moments_evidence(found: PerExampleResult) -> GradientMoments:
    """What the metrics over coordinates need.

    Raises:
        Unavailable: They were not gathered.
    """
    if found.means is None or found.variances is None or found.seen is None:
        raise Unavailable(found.missing or "the examples' gradients were not looked at")
    return GradientMoments(found.means, found.variances, found.seen, found.examples)


def input_gradients(scene: Scene) -> InputGradients:
    """The Gram matrix of the examples' gradients with respect to their own inputs.

    Raises:
        Unavailable: The inputs cannot be found, or the gradients are not finite.
    """

    def look() -> Tensor | InputGradients:
        engine = scene.shares
        return _inputs(scene, lambda: engine.run(Wanted(gram=False)).inputs())

    found = scene.once("input gradients", look)
    return found if isinstance(found, InputGradients) else input_evidence(found)


def input_evidence(gradients: Tensor) -> InputGradients:
    """The Gram matrix of input gradients, (B, ...).

    Raises:
        Unavailable: They are not finite.
    """
    if not bool(torch.isfinite(gradients).all()):
        raise Unavailable(ENDLESS_INPUTS)
    rows = gradients.reshape(len(gradients), -1)
    return InputGradients(gram=gram(rows), total=rows.shape[1])


def _inputs(scene: Scene, found: Callable[[], tuple[Tensor, Tensor]]) -> Tensor | InputGradients:
    scene.entry  # noqa: B018 - says why where the inputs cannot be found
    return found()[1] if scene.objective.team is None else pooled_inputs(scene.objective.team, found)
