"""The gradient at perturbed weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Curvature, ScaledSweep, WeightSweep
from gradmon._tensors import gram, largest_quotient, length, wide, working
from gradmon.per_example import Wanted
from gradmon.perturbations.weights import Krylov, WeightPoint, WeightSampler
from gradmon.probes.pooling import pooled_share
from gradmon.probes.scene import Scene
from gradmon.probes.watch import learning_rates

_SETTLED = 0.7
"""The least cosine between a tracked direction v and H v at which v . H v is shown as a curvature."""


def weight_sweep(scene: Scene) -> WeightSweep:
    """The gradient along the sampler's perturbations: one forward and backward pass for each."""
    return _sweep(scene, scene.weight_sampler).evidence


def scaled_sweep(scene: Scene) -> ScaledSweep:
    """The same perturbations once more at a tenth of their length."""
    return ScaledSweep(weight_sweep(scene), _sweep(scene, scene.weight_sampler.scaled(0.1)).evidence)


def curvature(scene: Scene) -> Curvature:
    """The Hessian on the span of the Krylov directions; on the sampler's own where these are taken together.

    Raises:
        Unavailable: The gradient or the weights are zero, or all perturbations are, or one tracked direction tells
            nothing of the curvature.
    """
    sampler = scene.weight_sampler if scene.weight_sampler.span else Krylov()
    sweep, products = _sweep(scene, sampler)[:2]
    count = len(sweep.scales)
    if not any(sweep.scales):
        raise Unavailable("zero perturbation")
    if count == 1 and isinstance(sampler, Krylov) and sampler.start is not None:
        _check_settled(products)
    groups = scene.optimizer.param_groups if scene.optimizer is not None else []
    rates = set(scene.rates or ([] if scene.optimizer is None else learning_rates(scene.optimizer)))
    name = None if scene.optimizer is None else type(scene.optimizer).__name__
    plain = isinstance(scene.optimizer, torch.optim.SGD)
    if plain and any(group["maximize"] for group in groups):
        plain, name = False, f"{name} that maximizes"
    elif plain and len(rates) > 1:
        plain, name = False, f"{name} with several"
    return Curvature(
        projected=(products[:count, count:] + products[count:, :count]) / 2,
        products=products[:count, :count],
        scale=None if sweep.exact else max(sweep.scales),
        resolution=sweep.epsilon if sweep.exact else 2 * sweep.epsilon / max(sweep.scales),
        learning_rate=rates.pop() if plain and rates else None,
        optimizer=name,
    )


def _check_settled(products: Tensor) -> None:
    """Refuse the curvature along a tracked direction v that is far from an eigenvector: ``v . H v`` is of no use there.

    Raises:
        Unavailable: It is, or the curvature along it is negative.
    """
    along, size, moved = (float(products[i, j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    if along <= 0:
        # One product follows what is largest in size; three from the gradient see both ends of the spectrum.
        raise Unavailable("the curvature that is largest in size is negative: weights=Krylov() sees the largest too")
    if along < _SETTLED * math.sqrt(size * moved):
        raise Unavailable("the tracked direction is far from an eigenvector: weights=Krylov() takes more products")


class _Sweep(NamedTuple):
    """A sweep, and for perturbations taken together their inner products over all of w.

    Attributes:
        evidence: What the metrics see.
        products: Of ``omega_1..omega_n, H omega_1..H omega_n``, (2n, 2n), float64; empty for others.
        sampler: The sampler, kept so that its identity stays its own.
    """

    evidence: WeightSweep
    products: Tensor
    sampler: WeightSampler


def _sweep(scene: Scene, sampler: WeightSampler) -> _Sweep:
    return scene.once(("sweep", id(sampler)), lambda: _run(scene, sampler))


def _run(scene: Scene, sampler: WeightSampler) -> _Sweep:
    objective, weights = scene.objective, scene.objective.weights
    exact = scene.derivative == "exact"
    base = objective.base
    start = working(weights.flatten(scene.gradient.parts))
    origin = working(weights.flatten(base))
    point = WeightPoint(
        weights=[part.reshape(-1) for part in base],
        gradient=start,
        example=lambda example: _example(scene, example),
        examples=objective.total,
        generator=scene.generator(),
        product=(lambda v: working(weights.flatten(objective.product(weights.unflatten(v))))) if exact else None,
    )
    size = weights.full.norm(origin)
    perturbations: list[Tensor] = []
    gradients: list[Tensor] = []
    differences: list[Tensor] = []
    scales: list[float] = []
    whole: tuple[list[Tensor], list[Tensor]] = ([], [])
    draws = sampler.draw(point)
    omega = next(draws, None)
    while omega is not None:
        parts = weights.unflatten(omega)
        if exact:
            taken = working(weights.flatten(parts))
            change = working(weights.flatten(objective.product(parts)))
            _check_symmetry(scene, taken, change)
            gradient = start + change
        else:
            moved = [value + part for value, part in zip(base, parts, strict=True)]
            taken = working(weights.flatten(moved)) - origin
            gradient = working(weights.flatten(objective.gradient(moved).parts))
            change = gradient - start
        if not bool(torch.isfinite(change).all()):
            raise Unavailable("non-finite gradient at perturbed weights")
        radius = weights.full.norm(taken)
        scales.append(radius / size if size > 0 else float("inf") if radius > 0 else 0.0)
        perturbations.append(weights.pick_flat(taken))
        gradients.append(weights.pick_flat(gradient))
        differences.append(weights.pick_flat(change))
        if sampler.span:
            whole[0].append(taken)
            whole[1].append(change)
        try:
            omega = draws.send(change)
        except StopIteration:
            omega = None
    if not perturbations:
        raise Unavailable("zero perturbation")
    # On all of w: among a mask's few coordinates the largest quotient would be one of chance.
    count, products, best = len(perturbations), start.new_empty(0), None
    if sampler.span and any(scales):
        products = gram([*whole[0], *whole[1]])
        best = largest_quotient(products[count:, count:], products[:count, :count])[1]
        scene.memory.direction = _along(whole[1], best, start)
    evidence = WeightSweep(
        coordinates=weights.coordinates,
        weights=weights.pick_flat(origin),
        gradient=weights.pick_flat(start),
        perturbations=torch.stack(perturbations),
        gradients=torch.stack(gradients),
        differences=torch.stack(differences),
        scales=tuple(scales),
        epsilon=scene.epsilon,
        exact=exact,
        combination=best,
    )
    return _Sweep(evidence, products, sampler)


def _along(changes: list[Tensor], combination: Tensor, gradient: Tensor) -> Tensor | None:
    """The direction of a combination of changes of the gradient, (P,); None where there is none.

    An eigenvector has no sign of its own: of the two, the one that points with the gradient is taken, so that runs that
    differ only by rounding look the same way.
    """
    direction = sum(float(c) * wide(change) for c, change in zip(combination, changes, strict=True))
    assert isinstance(direction, Tensor)
    size = length(direction)
    if not 0 < size < math.inf:
        return None
    sign = -1.0 if float(torch.dot(direction, wide(gradient))) < 0 else 1.0
    return (sign * direction / size).to(changes[0])


def _check_symmetry(scene: Scene, omega: Tensor, product: Tensor) -> None:
    """Compare ``v . H omega`` with ``omega . H v``: a function with a wrong second derivative gives itself away."""
    weights = scene.objective.weights

    def make() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(weights.total, generator=generator, dtype=torch.float64).to(omega)
        return probe, working(weights.flatten(scene.objective.product(weights.unflatten(probe))))

    probe, reflected = scene.once("symmetry", make)
    there, back = weights.full.dot(probe, product), weights.full.dot(omega, reflected)
    size = weights.full.norm(omega) * weights.full.norm(reflected) + weights.full.norm(probe) * weights.full.norm(
        product
    )
    if abs(there - back) > 10 * scene.epsilon**0.5 * size:
        raise Unavailable("no exact product: the second derivative of some function of the model is wrong")


def _example(scene: Scene, example: int) -> Tensor:
    if scene.objective.team is not None:
        return pooled_share(scene.objective.team, scene.objective, scene.shares, example)
    taken = scene.shares.run(Wanted(gram=False, example=example))
    return working(scene.objective.weights.flatten(taken.share))
