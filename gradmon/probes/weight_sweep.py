"""The gradient at perturbed weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Curvature, ScaledSweep, WeightSweep
from gradmon._tensors import gram, largest_quotient, wide, working
from gradmon.perturbations.weights import Krylov, Perturbations, WeightPoint, WeightSampler
from gradmon.probes.scene import Scene


def weight_sweep(scene: Scene) -> WeightSweep:
    """The gradient along the sampler's perturbations: one forward and backward pass for each."""
    return _sweep(scene, scene.weight_sampler)[0]


def scaled_sweep(scene: Scene) -> ScaledSweep:
    """The same perturbations once more at a tenth of their length."""
    return ScaledSweep(weight_sweep(scene), _sweep(scene, scene.weight_sampler.scaled(0.1))[0])


def curvature(scene: Scene) -> Curvature:
    """The Hessian on the span of the Krylov directions; the sweep's own where that is a Krylov sweep.

    Raises:
        Unavailable: The gradient or the weights are zero.
    """
    sampler = scene.weight_sampler if isinstance(scene.weight_sampler, Krylov) else Krylov()
    sweep, directions, products = _sweep(scene, sampler)
    # All of w is in the two lists, so that the eigenvalues are those of the Hessian and not a mask's estimate.
    count = len(directions)
    both = gram(torch.stack([*directions, *products]))
    first = scene.optimizer.param_groups if scene.optimizer is not None else []
    rates = {float(group["lr"]) for group in first if "lr" in group}
    plain = isinstance(scene.optimizer, torch.optim.SGD) and not any(group["maximize"] for group in first)
    return Curvature(
        projected=(both[:count, count:] + both[:count, count:].T) / 2,
        products=both[:count, :count],
        scale=None if sweep.exact else max(sweep.scales),
        resolution=sweep.epsilon if sweep.exact else sweep.epsilon / min(sweep.scales),
        learning_rate=rates.pop() if plain and len(rates) == 1 else None,
        optimizer=None if scene.optimizer is None else type(scene.optimizer).__name__,
    )


def _sweep(scene: Scene, sampler: WeightSampler) -> tuple[WeightSweep, list[Tensor], list[Tensor]]:
    # The sampler is part of what is kept, so that its identity stays its own.
    return scene.once(("sweep", id(sampler)), lambda: (*_run(scene, sampler), sampler))[:3]


def _run(scene: Scene, sampler: WeightSampler) -> tuple[WeightSweep, list[Tensor], list[Tensor]]:
    objective, weights = scene.objective, scene.objective.weights
    exact = scene.derivative == "exact"
    base = objective.base
    start = working(weights.flatten(scene.gradient.parts))
    point = WeightPoint(
        weights=[part.reshape(-1) for part in base],
        gradient=start,
        example=lambda example: _example(scene, example),
        examples=objective.examples,
        generator=scene.generator(),
    )
    size = weights.full.norm(weights.flatten(base))
    perturbations: list[Tensor] = []
    gradients: list[Tensor] = []
    differences: list[Tensor] = []
    directions: list[Tensor] = []
    products: list[Tensor] = []
    scales: list[float] = []
    lengths: list[float] = []
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
            taken = working(weights.flatten(moved)) - working(weights.flatten(base))
            gradient = working(weights.flatten(objective.gradient(moved).parts))
            change = gradient - start
        if not bool(torch.isfinite(change).all()):
            raise Unavailable("non-finite gradient at perturbed weights")
        length = weights.full.norm(taken)
        if length == 0:
            omega = _next(draws, change)
            continue
        scales.append(length / size if size > 0 else float("inf"))
        perturbations.append(weights.pick_flat(taken))
        gradients.append(weights.pick_flat(gradient))
        differences.append(weights.pick_flat(change))
        if sampler.span:
            lengths.append(length)
            directions.append(wide(taken) / length)
            products.append(wide(change) / length)
        omega = _next(draws, change)
    if not perturbations:
        raise Unavailable("zero perturbation")
    sweep = WeightSweep(
        coordinates=weights.coordinates,
        weights=weights.pick(base),
        gradient=weights.pick_flat(start),
        perturbations=torch.stack(perturbations),
        gradients=torch.stack(gradients),
        differences=torch.stack(differences),
        scales=tuple(scales),
        epsilon=weights.epsilon,
        exact=exact,
        combination=None,
    )
    if sampler.span:
        # On all of w: among a mask's few coordinates the largest quotient would be one of chance.
        count, all_of_w = len(directions), gram(torch.stack([*directions, *products]))
        best = largest_quotient(all_of_w[count:, count:], all_of_w[:count, :count])[1]
        sweep = dataclasses.replace(sweep, combination=best / torch.tensor(lengths, dtype=best.dtype).to(best.device))
    return sweep, directions, products


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
    if abs(there - back) > 10 * weights.epsilon**0.5 * size:
        raise Unavailable("no exact product: the second derivative of some function of the model is wrong")


def _next(draws: Perturbations, change: Tensor) -> Tensor | None:
    try:
        return draws.send(change)
    except StopIteration:
        return None


def _example(scene: Scene, example: int) -> Tensor:
    with scene.shares.run() as taken:
        return working(scene.objective.weights.flatten(taken.share(example)))
