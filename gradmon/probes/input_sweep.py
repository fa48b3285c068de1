"""The examples' gradients at perturbed inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import InputSweep
from gradmon._tensors import length, working
from gradmon.per_example import PerExample, Wanted
from gradmon.perturbations.inputs import InputPoint
from gradmon.probes.scene import Scene

_PULL_SCALE = 1e-3
"""The relative radius at which ``J^T u`` is taken; only its direction matters."""


def input_sweep(scene: Scene) -> InputSweep:
    """Each example's gradient along the sampler's perturbations of its own input, the others' inputs unchanged.

    Raises:
        Unavailable: The inputs cannot be found, or a gradient is not finite.
    """
    scene.entry  # noqa: B018 - says why where the inputs cannot be found
    engine, weights = scene.shares, scene.objective.weights
    x, gradients = engine.run(Wanted(gram=False)).inputs()
    point = InputPoint(x, gradients, lambda i, u: _pull(scene, engine, gradients, i, u), scene.generator())
    perturbations = scene.input_sampler.draw(point)
    count = min(len(x), scene.input_sampler.examples or len(x))
    lengths: list[list[float]] = []
    changes: list[list[float]] = []
    sizes: list[float] = []
    for example in range(count):
        start = _share(scene, engine, example, None)
        lengths.append([])
        changes.append([])
        sizes.append(weights.coordinates.norm(weights.pick_flat(start)))
        draws = perturbations(example)
        delta = next(draws, None)
        while delta is not None:
            every = torch.zeros_like(x)
            every[example] = delta
            change = _share(scene, engine, example, every) - start
            if not bool(torch.isfinite(change).all()):
                raise Unavailable("non-finite gradient at perturbed inputs")
            lengths[-1].append(length((x[example] + delta) - x[example]))
            changes[-1].append(weights.coordinates.norm(weights.pick_flat(change)))
            try:
                delta = draws.send(change)
            except StopIteration:
                delta = None
    return InputSweep(
        input_norms=torch.tensor([length(x[example]) for example in range(count)], dtype=torch.float64),
        gradient_norms=torch.tensor(sizes, dtype=torch.float64),
        perturbation_norms=_padded(lengths),
        difference_norms=_padded(changes),
        epsilon=max(scene.epsilon, torch.finfo(x.dtype).eps),
    )


def _share(scene: Scene, engine: PerExample, example: int, delta: Tensor | None) -> Tensor:
    taken = engine.run(Wanted(gram=False, example=example), delta=delta)
    return working(scene.objective.weights.flatten(taken.share))


def _pull(scene: Scene, engine: PerExample, start: Tensor, example: int, u: Tensor) -> Tensor:
    """``J^T u``: the change of an example's input gradient when the weights move along u."""
    weights, base = scene.objective.weights, scene.objective.base
    size = length(u)
    if size == 0:
        return torch.zeros_like(start[example])
    radius = _PULL_SCALE * length(weights.flatten(base)) / size
    moved = [value + part * radius for value, part in zip(base, weights.unflatten(u), strict=True)]
    return engine.run(Wanted(gram=False), values=moved).inputs()[1][example] - start[example]


def _padded(rows: list[list[float]]) -> Tensor:
    """Rows of different lengths as one matrix, filled up with NaN; at least one column."""
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows], dtype=torch.float64)
