"""Samplers: shapes, lengths, signs, counts, seeds, and how close the defaults come to the truth."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import gradmon
from gradmon.perturbations import inputs as input_samplers
from gradmon.perturbations import weights as weight_samplers
from tests import references, zoo

SIZES = (60, 1, 39)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = normal(7, 100, seed=1)
EXAMPLES[2] = 0
HESSIAN = normal(100, 100, seed=2)
HESSIAN = HESSIAN + HESSIAN.T
WEIGHTS = [3 * normal(60, seed=3) + 5, torch.tensor([2.0]).double(), 0.1 * normal(39, seed=4)]
NORM = float(torch.cat(WEIGHTS).norm())


def weight_point(seed: int = 0, **changes):
    point = weight_samplers.WeightPoint(
        weights=WEIGHTS,
        gradient=EXAMPLES.mean(0),
        example=lambda i: EXAMPLES[i],
        examples=7,
        generator=torch.Generator().manual_seed(seed),
    )
    return dataclasses.replace(point, **changes)


def drawn(perturbations, answer=lambda omega: omega) -> Tensor:
    found = []
    omega = next(perturbations, None)
    while omega is not None:
        found.append(omega)
        try:
            omega = perturbations.send(answer(omega))
        except StopIteration:
            omega = None
    return torch.stack(found)


def omegas(sampler, seed: int = 0, **changes) -> Tensor:
    return drawn(sampler.draw(weight_point(seed, **changes)), lambda omega: (HESSIAN @ omega.double()).to(omega))


# --- weights -------------------------------------------------------------------------------------------------------

WEIGHT_SAMPLERS = [
    weight_samplers.Random(5),
    weight_samplers.Targeted(5),
    weight_samplers.Limited(),
    weight_samplers.Krylov(),
    weight_samplers.Fixed(normal(2, 100)),
]


@pytest.mark.parametrize("sampler", WEIGHT_SAMPLERS, ids=lambda s: type(s).__name__)
def test_weight_perturbations_have_the_gradients_shape_and_type(sampler):
    found = omegas(sampler, gradient=EXAMPLES.mean(0).float(), example=lambda i: EXAMPLES[i].float())
    assert found.dtype == torch.float32
    assert found.shape[1:] == (100,)


@pytest.mark.parametrize("sampler", WEIGHT_SAMPLERS, ids=lambda s: type(s).__name__)
def test_weight_perturbations_depend_on_the_seed_only(sampler):
    assert torch.equal(omegas(sampler, 3), omegas(sampler, 3))
    drawn_at_random = isinstance(sampler, weight_samplers.Random | weight_samplers.Targeted)
    assert torch.equal(omegas(sampler, 3), omegas(sampler, 4)) is not drawn_at_random


@pytest.mark.parametrize("sampler", WEIGHT_SAMPLERS, ids=lambda s: type(s).__name__)
def test_scaled_weight_perturbations_are_the_same_but_shorter(sampler):
    torch.testing.assert_close(omegas(sampler.scaled(0.1)), 0.1 * omegas(sampler), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [weight_samplers.Random, weight_samplers.Targeted, weight_samplers.Limited])
def test_scale_is_the_length_relative_to_the_weights(kind):
    found = omegas(kind(2, scale=0.02))
    torch.testing.assert_close(found.norm(dim=1), torch.full((2,), 0.02 * NORM).double())
    plain = omegas(kind(2))
    torch.testing.assert_close(found / found.norm(dim=1)[:, None], plain / plain.norm(dim=1)[:, None])
    torch.testing.assert_close(omegas(kind(2, scale=0.02).scaled(0.5)), found / 2)


def test_random_has_each_tensors_own_mean_and_spread():
    found = omegas(weight_samplers.Random(4000, eta=0.5))
    assert found.shape == (4000, 100)
    for part, values in zip(found.split(SIZES, 1), WEIGHTS, strict=True):
        spread = float(values.std(correction=0))
        assert float(part.mean()) == pytest.approx(0.5 * float(values.mean()), abs=5 * 0.5 * spread / len(part) ** 0.5)
        assert float(part.std()) == pytest.approx(0.5 * spread, rel=0.05)


def test_targeted_is_a_signed_step_along_each_example():
    found = omegas(weight_samplers.Targeted(16, eta=0.25))
    alive = EXAMPLES[[0, 1, 3, 4, 5, 6]]  # the third has no gradient
    assert found.shape == (6, 100)
    torch.testing.assert_close(found.norm(dim=1), torch.full((6,), 0.25).double())
    cosines = (found * alive).sum(1) / found.norm(dim=1) / alive.norm(dim=1)
    torch.testing.assert_close(cosines.abs(), torch.ones(6).double())


def test_targeted_signs_are_fair():
    signs = torch.cat([(omegas(weight_samplers.Targeted(), seed) * EXAMPLES[[0, 1, 3, 4, 5, 6]]).sum(1).sign()
                       for seed in range(100)])  # fmt: skip
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(600)


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (3, 3), (6, 6), (7, 6), (100, 6)])
def test_targeted_has_at_most_one_for_each_example_with_a_gradient(n, expected):
    assert len(omegas(weight_samplers.Targeted(n))) == expected


def test_limited_changes_no_weight_by_more_than_eta():
    found = omegas(weight_samplers.Limited(eta=0.01))
    torch.testing.assert_close(found.abs().amax(1), torch.full((2,), 0.01).double())
    assert torch.equal(found[0], -found[1])
    h = EXAMPLES.mean(0)
    torch.testing.assert_close(found[0], 0.01 * h / h.abs().max())
    assert torch.equal(omegas(weight_samplers.Limited(1, eta=0.01)), found[:1])


def test_krylov_directions_are_orthonormal_and_span_the_krylov_space():
    found = omegas(weight_samplers.Krylov(5, scale=0.02)) / (0.02 * NORM)
    torch.testing.assert_close(found @ found.T, torch.eye(5).double(), rtol=0, atol=1e-12)
    power = EXAMPLES.mean(0) / EXAMPLES.mean(0).norm()
    torch.testing.assert_close(found[0], power)
    for k in range(1, 5):
        power = HESSIAN @ power / (HESSIAN @ power).norm()
        within = found[: k + 1] @ power
        assert float(within.norm()) == pytest.approx(1, rel=1e-9)


def test_krylov_stops_on_an_invariant_span():
    vectors = torch.linalg.qr(normal(100, 3))[0]
    low = vectors @ torch.diag(torch.tensor([1.0, 2.0, -5.0]).double()) @ vectors.T
    start = vectors @ torch.tensor([1.0, 1.0, 1.0]).double()
    found = drawn(weight_samplers.Krylov(10).draw(weight_point(gradient=start)), lambda omega: low @ omega)
    assert len(found) == 3
    none = drawn(weight_samplers.Krylov(10).draw(weight_point()), lambda omega: 0 * omega)
    assert len(none) == 1


@pytest.mark.parametrize("sampler", [weight_samplers.Limited(), weight_samplers.Krylov()])
def test_no_direction_without_a_gradient(sampler):
    with pytest.raises(gradmon.Unavailable, match="zero gradient"):
        omegas(sampler, gradient=torch.zeros(100).double())
    assert not list(weight_samplers.Targeted().draw(weight_point(example=lambda i: 0 * EXAMPLES[i])))


def test_krylov_needs_weights():
    with pytest.raises(gradmon.Unavailable, match="zero weights"):
        omegas(weight_samplers.Krylov(), weights=[torch.zeros(100).double()])


def test_fixed_weight_perturbations_are_as_they_are():
    given = normal(3, 100)
    assert torch.equal(omegas(weight_samplers.Fixed(given)), given)


# --- inputs --------------------------------------------------------------------------------------------------------

X = 2 * normal(6, 4, 25, seed=5) + 7
SLOPES = normal(6, 4, 25, seed=6)
SLOPES[1] = 0
JACOBIAN = normal(30, 100, seed=7)


def deltas(sampler, example: int = 0, seed: int = 0, x: Tensor = X) -> Tensor:
    point = input_samplers.InputPoint(
        x=x,
        gradients=SLOPES.to(x.dtype),
        pull=lambda i, u: (JACOBIAN.T @ u.double()).reshape(4, 25),
        generator=torch.Generator().manual_seed(seed),
    )
    return drawn(sampler.draw(point)(example), lambda delta: JACOBIAN @ delta.double().flatten())


INPUT_SAMPLERS = [
    input_samplers.Random(),
    input_samplers.Targeted(),
    input_samplers.Toward(),
    input_samplers.Ascent(),
    input_samplers.Fixed(normal(2, 4, 25)),
]


@pytest.mark.parametrize("sampler", INPUT_SAMPLERS, ids=lambda s: type(s).__name__)
def test_input_perturbations_have_the_inputs_shape_and_type_and_depend_on_the_seed_only(sampler):
    found = deltas(sampler, x=X.float())
    assert found.dtype == torch.float32
    assert found.shape[1:] == (4, 25)
    assert torch.equal(deltas(sampler, seed=3), deltas(sampler, seed=3))
    same_for_all = not isinstance(sampler, input_samplers.Ascent)
    assert torch.equal(deltas(sampler, 0), deltas(sampler, 5)) is same_for_all
    assert sampler.examples is None
    assert dataclasses.replace(sampler, examples=2).examples == 2


def test_random_inputs_have_the_batchs_own_mean_and_spread():
    found = deltas(input_samplers.Random(2000, eta=0.5))
    assert found.shape == (2000, 4, 25)
    mean, spread = float(X.mean()), float(X.std(correction=0))
    assert float(found.mean()) == pytest.approx(0.5 * mean, abs=0.01 * spread)
    assert float(found.std()) == pytest.approx(0.5 * spread, rel=0.01)
    assert float((found - 0.5 * mean).abs().max()) == pytest.approx(0.5 * spread * math.sqrt(3), rel=1e-3)  # uniform


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (4, 4), (5, 5), (100, 5)])
def test_targeted_inputs_are_signed_steps_along_the_examples_gradients(n, expected):
    found = deltas(input_samplers.Targeted(n, eta=0.25)).flatten(1)
    assert len(found) == expected
    alive = SLOPES[[0, 2, 3, 4, 5]][:expected].flatten(1)  # the second has no gradient
    torch.testing.assert_close(found.norm(dim=1), torch.full((expected,), 0.25).double())
    cosines = (found * alive).sum(1) / found.norm(dim=1) / alive.norm(dim=1)
    torch.testing.assert_close(cosines.abs(), torch.ones(expected).double())


def test_toward_goes_from_one_example_towards_another():
    found = deltas(input_samplers.Toward(300, eta=0.1))
    ways = (0.1 * (X[:, None] - X[None])).flatten(2)
    gaps = (ways[None] - found.flatten(1)[:, None, None]).norm(dim=-1)
    assert float(gaps.flatten(1).amin(1).max()) < 1e-12
    pairs = gaps.flatten(1).argmin(1)
    assert not bool((pairs // 6 == pairs % 6).any())
    counts = torch.bincount(pairs, minlength=36)[[i for i in range(36) if i // 6 != i % 6]]
    assert int(counts.min()) > 0
    assert float(((counts - 10) ** 2 / 10).sum()) < 29 + 5 * math.sqrt(58)  # chi squared, 29 degrees of freedom
    with pytest.raises(gradmon.Unavailable, match="batch of one"):
        deltas(input_samplers.Toward(), x=X[:1])


@pytest.mark.parametrize("k", [1, 3])
def test_ascent_is_the_gradient_then_power_steps(k):
    found = deltas(input_samplers.Ascent(k, scale=0.01), example=2).flatten(1)
    assert len(found) == k + 1
    torch.testing.assert_close(found.norm(dim=1), torch.full((k + 1,), 0.01).double() * X[2].norm())
    direction = SLOPES[2].flatten()
    for delta in found:
        torch.testing.assert_close(delta / delta.norm(), direction / direction.norm())
        direction = JACOBIAN.T @ (JACOBIAN @ delta)


def test_fixed_inputs_are_as_they_are():
    shared, own = normal(3, 4, 25), normal(3, 6, 4, 25)
    assert torch.equal(deltas(input_samplers.Fixed(shared), 4), shared)
    assert torch.equal(deltas(input_samplers.Fixed(own), 4), own[:, 4])
    with pytest.raises(gradmon.ArgumentError, match=r"`perturbations` must be \(n, \*\(4, 25\)\) or"):
        deltas(input_samplers.Fixed(normal(3, 25)))


# --- how close the defaults come to the truth ----------------------------------------------------------------------

SMOOTH = [c for c in zoo.CASES if not (c.kinked or c.interacting or c.once_differentiable or c.integer)]
SMOOTH = [c for c in SMOOTH if c.name not in ("lstm_bidirectional", "zero_initialised_head")]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_krylov_never_exceeds_the_true_norm_of_the_hessian(case):
    problem = case.make()
    arguments = (problem.model, problem.loss, problem.batch)
    H = references.hessian(*arguments, problem.reduction)
    w, h = references.flat_weights(problem.model), references.batch_gradient(*arguments, problem.reduction)
    true = np.linalg.norm(H, 2) * np.linalg.norm(w) / np.linalg.norm(h)
    options = {"metrics": ["weight_condition", "sharpness"], "reduction": problem.reduction}
    values = []
    for k in (1, 3, 6):
        sampler = weight_samplers.Krylov(k, scale=1e-4)
        found = gradmon.measure(*arguments, weights=sampler, **options)
        values.append(found["weight_condition"].value)
        assert found["sharpness"].value <= np.linalg.eigvalsh(H)[-1] * 1.01
    assert values[0] <= values[1] * 1.001 <= values[2] * 1.002
    assert 0.8 * true < values[2] <= true * 1.01


@pytest.fixture(scope="module")
def tightness():
    """For every smooth case: Ascent and Random, over the largest singular value of the Jacobians."""
    found = {}
    for case in SMOOTH:
        problem = case.make()
        H, x = references.shares(problem), references.inputs(problem)
        tops = [np.linalg.norm(references.input_jacobian(problem, i), 2) for i in range(2)]
        true = np.mean([t * np.linalg.norm(x[i]) / np.linalg.norm(H[i]) for i, t in enumerate(tops)])
        values = []
        for sampler in (input_samplers.Ascent(examples=2), input_samplers.Random(n=2, examples=2)):
            options = {"metrics": "input_condition", "inputs": sampler, "reduction": problem.reduction}
            (reading,) = gradmon.measure(problem.model, problem.loss, problem.batch, **options).values()
            values.append(reading.value / true)
        found[case.name] = values
    return found


def test_ascent_never_exceeds_the_truth_and_comes_close(tightness):
    ascents = {name: ascent for name, (ascent, _) in tightness.items()}
    assert {name: value for name, value in ascents.items() if value > 1.01} == {}
    assert {name: value for name, value in ascents.items() if value < 0.4} == {}
    assert np.median(list(ascents.values())) > 0.9


def test_ascent_beats_random(tightness):
    wins = [ascent > chance for ascent, chance in tightness.values()]
    assert np.mean(wins) > 0.75
