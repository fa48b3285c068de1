"""The examples' gradients at perturbed inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import InputSweep
from gradmon._tensors import length, working
from gradmon.per_example import PerExample, Wanted
from gradmon.perturbations.inputs import InputPoint
from gradmon.probes.pooling import alike_inputs
from gradmon.probes.scene import Scene
from gradmon.team import Team

_PULL_SCALE = 1e-3
"""The relative radius at which ``J^T u`` is taken; only its direction matters."""


def input_sweep(scene: Scene) -> InputSweep:
    """Each example's gradient along the sampler's perturbations of its own input, the others' inputs unchanged.

    Raises:
        Unavailable: The inputs cannot be found, or a gradient is not finite.
    """
    scene.entry  # noqa: B018 - says why where the inputs cannot be found
    engine, team = scene.shares, scene.objective.team
    if team is not None:
        return _pooled(scene, engine, team)
    x, gradients = engine.run(Wanted(gram=False)).inputs()
    point = InputPoint(x, gradients, lambda i, u: _pull(scene, engine, gradients, i, u), scene.generator())
    perturbations = scene.input_sampler.draw(point)
    count = min(len(x), scene.input_sampler.examples or len(x))
    swept = [_swept(scene, engine, x, example, perturbations(example)) for example in range(count)]
    return _evidence(swept, max(scene.epsilon, torch.finfo(x.dtype).eps))


def _pooled(scene: Scene, engine: PerExample, team: Team) -> InputSweep:
    """The same where every rank has some of the examples: the sampler sees all of them, each rank looks at its own.

    Raises:
        Unavailable: The inputs cannot be found, differ in shape, or a gradient is not finite.
        RankError: It failed on some rank.
    """
    own, start = alike_inputs(team, lambda: engine.run(Wanted(gram=False)).inputs())
    epsilon, factor = max(scene.epsilon, torch.finfo(own.dtype).eps), team.factor
    x, gradients = team.rows(own, team.examples), team.rows(start * factor, team.examples)
    first = sum(team.examples[: team.rank])
    count = min(len(x), scene.input_sampler.examples or len(x))

    def pull(example: int, u: Tensor) -> Tensor:
        return _pull(scene, engine, start, example - first, u) * factor

    def sweep() -> list[Swept]:
        perturbations = scene.input_sampler.draw(InputPoint(x, gradients, pull, scene.generator()))
        return [
            _swept(scene, engine, own, example - first, perturbations(example), factor)
            for example in range(first, min(count, first + len(own)))
        ]

    _, heard = team.together("input sweep", sweep, lambda made: {"swept": made})
    return _evidence([Swept(*example) for other in heard for example in other["swept"]], epsilon)


class Swept(NamedTuple):
    """One example along its perturbations.

    Attributes:
        input_norm: ``||x_i||``.
        gradient_norm: ``||h_i||``.
        lengths: ``||delta_k||`` as it came out.
        changes: ``||h(w, x_i + delta_k) - h_i||``.
    """

    input_norm: float
    gradient_norm: float
    lengths: list[float]
    changes: list[float]


def _swept(
    scene: Scene,
    engine: PerExample,
    x: Tensor,
    example: int,
    draws: Generator[Tensor, Tensor, None],
    factor: float = 1.0,
) -> Swept:
    """One example along its perturbations.

    Args:
        scene: The scene.
        engine: The passes.
        x: The inputs, (B, ...).
        example: The example.
        draws: Its perturbations.
        factor: By how much a share of a rank's own loss differs from one of the loss of all.

    Raises:
        Unavailable: A gradient is not finite.
    """
    weights = scene.objective.weights
    start = _share(scene, engine, example, None)
    found = Swept(length(x[example]), factor * weights.coordinates.norm(weights.pick_flat(start)), [], [])
    delta = next(draws, None)
    while delta is not None:
        every = torch.zeros_like(x)
        every[example] = delta
        change = _share(scene, engine, example, every) - start
        if not bool(torch.isfinite(change).all()):
            raise Unavailable("non-finite gradient at perturbed inputs")
        found.lengths.append(length((x[example] + delta) - x[example]))
        found.changes.append(factor * weights.coordinates.norm(weights.pick_flat(change)))
        try:
            delta = draws.send(change * factor if factor != 1.0 else change)
        except StopIteration:
            delta = None
    return found


def _evidence(swept: Sequence[Swept], epsilon: float) -> InputSweep:
    return InputSweep(
        input_norms=torch.tensor([one.input_norm for one in swept], dtype=torch.float64),
        gradient_norms=torch.tensor([one.gradient_norm for one in swept], dtype=torch.float64),
        perturbation_norms=_padded([one.lengths for one in swept]),
        difference_norms=_padded([one.changes for one in swept]),
        epsilon=epsilon,
    )


def _share(scene: Scene, engine: PerExample, example: int, delta: Tensor | None) -> Tensor:
    with _elsewhere("" if delta is None else " at perturbed inputs"):
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
    with _elsewhere(" at perturbed weights"):
        return engine.run(Wanted(gram=False), values=moved).inputs()[1][example] - start[example]


@contextlib.contextmanager
def _elsewhere(where: str) -> Generator[None]:
    """A context that says of a gradient that is not finite where it is not: the batch's own is."""
    try:
        yield
    except Unavailable as missing:
        if missing.reason == "non-finite gradient":
            raise Unavailable(f"{missing.reason}{where}") from missing
        raise


def _padded(rows: list[list[float]]) -> Tensor:
    """Rows of different lengths as one matrix, filled up with NaN; at least one column."""
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows], dtype=torch.float64)
