"""Every metric, on every model of the zoo, against the slow definitions."""

import math

import numpy as np
import pytest
import torch

import gradmon
from gradmon._batches import map_tensors
from gradmon.perturbations import inputs as input_samplers
from gradmon.perturbations import weights as weight_samplers
from tests import references, zoo
from tests.zoo.problem import get_input

TIGHT = 1e-9
NAMES = [case.name for case in zoo.CASES]


@pytest.fixture(params=zoo.CASES, ids=NAMES)
def case(request):
    return request.param


@pytest.fixture
def problem(case):
    return case.make(0, torch.float64)


def measured(problem, **options):
    return gradmon.measure(
        problem.model,
        problem.loss,
        problem.batch,
        reduction=problem.reduction,
        input_module=None if problem.input_path is not None else problem.input_module,
        **options,
    )


def close(reading, expected, rtol=TIGHT, atol=1e-12):
    assert reading.reason is None or math.isinf(reading.value), f"{reading.name}: {reading.reason}"
    np.testing.assert_allclose(reading.value, expected, rtol=rtol, atol=atol, err_msg=reading.name)


def test_batch_gradient_and_shares(problem):
    common = {"reduction": problem.reduction}
    h = gradmon.batch_gradient(problem.model, problem.loss, problem.batch, **common).numpy()
    H = gradmon.per_example_gradients(problem.model, problem.loss, problem.batch, **common).numpy()
    G = gradmon.per_example_gram(problem.model, problem.loss, problem.batch, **common).numpy()
    expected = references.shares(problem)
    size = np.abs(expected).max()
    np.testing.assert_allclose(
        h, references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction), atol=1e-12 * size
    )
    np.testing.assert_allclose(H, expected, rtol=TIGHT, atol=1e-12 * size)
    np.testing.assert_allclose(H.mean(0), h, rtol=TIGHT, atol=1e-12 * size)
    np.testing.assert_allclose(G, references.gram(expected), rtol=TIGHT, atol=1e-12 * size**2)


@pytest.mark.parametrize("fraction", [None, 0.2])
def test_batch_dissonance(problem, fraction):
    H = references.shares(problem)
    total = H.shape[1]
    factors = None
    if fraction is not None:
        coordinates = gradmon.Mask(fraction, 3).sample(problem.model).numpy()
        factors = references.coordinate_weights(problem.model, coordinates)
        H = H[:, coordinates]
    n = 3
    names = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence"]
    names += ["noise_scale", "noise_ratio", "gradient_snr"]
    found = measured(problem, metrics=names, mask=fraction, micro_batches=n, seed=3)
    close(found["gradient_rank"], references.gradient_rank(H, total, factors))
    close(found["gradient_confusion"], references.gradient_confusion(H, n, factors))
    close(found["gradient_diversity"], references.gradient_diversity(H, n, factors))
    close(found["gradient_coherence"], references.gradient_coherence(H, factors))
    close(found["noise_scale"], references.noise_scale(H, factors), rtol=1e-7)
    close(found["noise_ratio"], references.noise_ratio(H, factors), rtol=1e-7)
    lowest, highest = references.gradient_snr_range(H, 1e-7)
    assert lowest <= found["gradient_snr"].value <= highest


def test_input_gradient_rank(problem):
    G = references.input_gradients(problem)
    found = measured(problem, metrics=["input_gradient_rank"])["input_gradient_rank"]
    if not np.any(G):
        assert found.reason == "zero gradient"
    else:
        close(found, references.input_gradient_rank(G))


@pytest.mark.parametrize("fraction", [None, 0.2])
def test_weight_sweep(problem, fraction):
    rng = np.random.default_rng(5)
    w = references.flat_weights(problem.model)
    omegas = rng.normal(size=(3, len(w))) * 1e-2
    arguments = (problem.model, problem.loss, problem.batch)
    h_0 = references.batch_gradient(*arguments, problem.reduction)
    hs = [references.gradient_at(*arguments, w + omega, problem.reduction) for omega in omegas]
    sampler = weight_samplers.Fixed(torch.tensor(omegas))
    names = ["weight_condition", "weight_cosine", "weight_diversity", "weight_coherence"]
    found = measured(problem, metrics=names, weights=sampler, mask=fraction, seed=3)
    picked, factors = slice(None), None
    if fraction is not None:
        picked = gradmon.Mask(fraction, 3).sample(problem.model).numpy()
        factors = references.coordinate_weights(problem.model, picked)
    h_0, hs, kept = h_0[picked], [h[picked] for h in hs], [omega[picked] for omega in omegas]
    close(found["weight_condition"], references.weight_condition(w[picked], h_0, hs, kept, factors), rtol=1e-7)
    close(found["weight_cosine"], references.weight_cosine(h_0, hs, factors))
    close(found["weight_diversity"], references.weight_diversity(hs, factors))
    close(found["weight_coherence"], references.weight_coherence(h_0, hs, factors))
    lengths = np.linalg.norm(omegas, axis=1) / np.linalg.norm(w)
    assert any(math.isclose(found["weight_condition"].scale, s, rel_tol=1e-9) for s in lengths)


def test_krylov(problem):
    w = references.flat_weights(problem.model)
    arguments = (problem.model, problem.loss, problem.batch)
    radius = 1e-3 * np.linalg.norm(w)
    seen = references.krylov_directions(
        lambda flat: references.gradient_at(*arguments, flat, problem.reduction), w, 3, radius
    )
    h_0 = references.batch_gradient(*arguments, problem.reduction)
    found = measured(problem, metrics=["weight_condition", "weight_cosine"])
    # Every direction is a difference of gradients, so that rounding grows from one to the next.
    close(found["weight_condition"], references.span_condition(seen.directions, seen.products, w, h_0), rtol=1e-5)
    close(found["weight_cosine"], references.weight_cosine(h_0, seen.gradients), rtol=1e-6)


SMOOTH = [case for case in zoo.CASES if not case.kinked and not case.once_differentiable]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_exact_products(case):
    problem = case.make(0, torch.float64)
    H = references.hessian(problem.model, problem.loss, problem.batch, problem.reduction)
    w = references.flat_weights(problem.model)
    h_0 = references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction)
    omegas = np.random.default_rng(6).normal(size=(2, len(w)))
    hs = [h_0 + H @ omega for omega in omegas]
    sampler = weight_samplers.Fixed(torch.tensor(omegas))
    names = ["weight_condition", "weight_cosine", "weight_diversity", "weight_coherence"]
    found = measured(problem, metrics=names, weights=sampler, derivative="exact")
    close(found["weight_condition"], references.weight_condition(w, h_0, hs, omegas))
    close(found["weight_cosine"], references.weight_cosine(h_0, hs))
    close(found["weight_diversity"], references.weight_diversity(hs))
    close(found["weight_coherence"], references.weight_coherence(h_0, hs))
    sharp = measured(problem, metrics=["sharpness"], derivative="exact")["sharpness"]
    seen = references.krylov_directions(lambda flat: h_0 + H @ (flat - w), w, 3, 1e-3 * np.linalg.norm(w))
    close(sharp, references.sharpness(H, seen.directions), rtol=1e-5, atol=1e-9 * np.abs(H).max())


@pytest.mark.parametrize("case", [case for case in zoo.CASES if case.once_differentiable], ids=lambda case: case.name)
def test_exact_products_of_a_function_without_a_second_derivative(case):
    problem = case.make(0, torch.float64)
    found = measured(problem, metrics=["weight_condition", "grad_norm"], derivative="exact")
    assert math.isnan(found["weight_condition"].value)
    assert found["weight_condition"].reason.startswith("no exact product")
    assert math.isfinite(found["grad_norm"].value)


def test_input_condition(case, problem):
    X = references.inputs(problem)
    deltas = np.random.default_rng(7).normal(size=(2, *X.shape)) * 1e-3
    H = references.shares(problem)
    shifted = []
    for delta in deltas:
        rows = []
        for i in range(problem.size):
            alone = np.zeros_like(delta)
            alone[i] = delta[i]
            rows.append(references.shifted_shares(problem, alone)[i])
        shifted.append(np.array(rows))
    shape = _input_shape(problem)
    sampler = input_samplers.Fixed(torch.tensor(deltas).reshape(2, *shape))
    found = measured(problem, metrics=["input_condition"], inputs=sampler)["input_condition"]
    close(found, references.input_condition(H, shifted, X, list(deltas)), rtol=1e-6)
    few = measured(problem, metrics=["input_condition"], inputs=input_samplers.Fixed(sampler.perturbations, examples=1))
    expected = references.input_condition(H[:1], [rows[:1] for rows in shifted], X[:1], [d[:1] for d in deltas])
    close(few["input_condition"], expected, rtol=1e-6)


def _input_shape(problem):
    if problem.input_path is not None:
        return tuple(get_input(problem.batch, problem.input_path).shape)
    seen = []
    module = problem.model.get_submodule(problem.input_module)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    problem.loss(problem.model, problem.batch)
    handle.remove()
    shape = seen[0]
    return shape if shape[0] == problem.size else (shape[1], shape[0], *shape[2:])


def test_step_and_sources(problem):
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01)
    arguments = (problem.model, problem.loss)
    other = map_tensors(problem.batch, lambda t: t.flip(0) if t.is_floating_point() else t)
    w = references.flat_weights(problem.model)
    h = references.batch_gradient(*arguments, problem.batch, problem.reduction)
    omega = (w - 0.01 * h) - w
    h_step = references.gradient_at(*arguments, problem.batch, w + omega, problem.reduction)
    h_next = references.batch_gradient(*arguments, other, problem.reduction)
    h_both = references.gradient_at(*arguments, other, w + omega, problem.reduction)
    names = ["step_ratio", "step_share", "batch_share", "step_condition", "update_ratio", "grad_norm", "param_norm"]
    found = measured(problem, metrics=names, optimizer=optimizer, next_batch=other)
    close(found["update_ratio"], references.update_ratio(omega, w))
    close(found["grad_norm"], np.linalg.norm(h))
    close(found["param_norm"], np.linalg.norm(w))
    close(found["step_ratio"], references.step_ratio(h, h_step), rtol=1e-6)
    close(found["step_condition"], references.step_condition(h, h_both, w, omega), rtol=1e-6)
    close(found["step_share"], references.step_share(h, h_step, h_next), rtol=1e-6)
    close(found["batch_share"], references.batch_share(h, h_step, h_next), rtol=1e-6)
