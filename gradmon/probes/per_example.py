"""The gradients of single examples."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import InputGradients, PerExampleGradients
from gradmon._tensors import gram, wide
from gradmon.per_example import Pass
from gradmon.probes.scene import Scene


def per_example(scene: Scene) -> PerExampleGradients:
    """The Gram matrix of the examples' gradients, and the mean and variance of each coordinate.

    Raises:
        Unavailable: The examples' gradients cannot be told apart, or are not finite.
    """
    weights = scene.objective.weights
    with scene.shares.run() as taken:
        rows = wide(taken.rows())
        # The same pass has the input gradients, for whoever asks for them later, or hears then why they are missing.
        with contextlib.suppress(Unavailable):
            scene.once("input gradients", lambda: _inputs(scene, taken))
    if not bool(torch.isfinite(rows).all()):
        raise Unavailable("non-finite gradient")
    means = rows.mean(0)
    return PerExampleGradients(
        gram=weights.coordinates.gram(rows),
        means=means,
        variances=(rows - means).square_().sum(0) / (len(rows) - 1),  # 0 / 0 for a batch of one
        seen=rows.any(0),
        total=weights.total,
        micro_batches=scene.micro_batches,
        epsilon=scene.objective.epsilon,
    )


def input_gradients(scene: Scene) -> InputGradients:
    """The Gram matrix of the examples' gradients with respect to their own inputs.

    Raises:
        Unavailable: The inputs cannot be found, or the gradients are not finite.
    """

    def look() -> Tensor:
        with scene.shares.run() as taken:
            return _inputs(scene, taken)

    found = scene.once("input gradients", look)
    if not bool(torch.isfinite(found).all()):
        raise Unavailable("non-finite gradient")
    rows = found.reshape(len(found), -1)
    return InputGradients(gram=gram(rows), total=rows.shape[1])


def _inputs(scene: Scene, taken: Pass) -> Tensor:
    scene.entry  # noqa: B018 - says why where the inputs cannot be found
    return taken.inputs()[1]
