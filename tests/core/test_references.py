"""The references are checked against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests import references, zoo
from tests.core.reference_problems import BY_NAME, SEED, relative
from tests.zoo.problem import Problem, averaged_problem, get_input, regress, set_input


def symmetric(rng: np.random.Generator, eigenvalues: list[float]) -> tuple[np.ndarray, np.ndarray]:
    basis, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    return basis @ np.diag(eigenvalues) @ basis.T, basis


# --- a model with closed forms -------------------------------------------------------------------------------------


@pytest.fixture
def least_squares() -> Problem:
    """`l_i = (w x_i - t_i)^2` with one output: h_i = 2 (w x_i - t_i) x_i, H = 2 X^T X / B."""
    generator = torch.Generator().manual_seed(SEED)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    x, y = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 1))
    return averaged_problem(model, regress, (x, y))


def test_model_references_on_least_squares(least_squares: Problem) -> None:
    model, loss, batch = least_squares.model, least_squares.loss, least_squares.batch
    X, t = (part.numpy() for part in batch)
    w = references.flat_weights(model)
    H = np.stack([2 * (X[i] @ w - t[i, 0]) * X[i] for i in range(5)])
    assert relative(references.shares(least_squares), H) < 1e-13
    assert relative(references.hessian(model, loss, batch), 2 * X.T @ X / 5) < 1e-13
    assert relative(references.gradient_at(model, loss, batch, np.zeros(4)), -2 * X.T @ t[:, 0] / 5) < 1e-13
    assert relative(references.inputs(least_squares), X) == 0
    G = np.stack([2 * (X[i] @ w - t[i, 0]) * w for i in range(5)])
    assert relative(references.input_gradients(least_squares), G) < 1e-13
    J = 2 * np.outer(X[2], w) + 2 * (X[2] @ w - t[2, 0]) * np.eye(4)
    assert relative(references.input_jacobian(least_squares, 2), J) < 1e-13
    shifted = np.stack([2 * ((X[i] + 0.5) @ w - t[i, 0]) * (X[i] + 0.5) for i in range(5)])
    assert relative(references.shifted_shares(least_squares, np.full(4, 0.5)), shifted) < 1e-13


def test_input_condition_of_a_small_step_along_the_jacobian_is_its_norm(least_squares: Problem) -> None:
    H, X = references.shares(least_squares), references.inputs(least_squares)
    values, deltas = [], []
    for i in range(5):
        _, stretches, right = np.linalg.svd(references.input_jacobian(least_squares, i))
        values.append(stretches[0] * np.linalg.norm(X[i]) / np.linalg.norm(H[i]))
        deltas.append(1e-6 * right[0])
    steps = np.stack(deltas)
    shifted = references.shifted_shares(least_squares, steps)
    assert references.input_condition(H, [shifted], X, [steps]) == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.parametrize("name", ["embedding_padding", "tied_language_model", "nested_tuple_batch", "dict_batch"])
def test_input_jacobian_is_the_limit_of_shifted_shares(name: str, rng: np.random.Generator) -> None:
    problem = zoo.named(name).make(SEED, torch.float64)
    X, H = references.inputs(problem), references.shares(problem)
    assert relative(references.shifted_shares(problem, np.zeros(X.shape[1])), H) < 1e-14
    delta = 1e-6 * rng.standard_normal(X.shape)
    moved = references.shifted_shares(problem, delta)
    for i in range(problem.size):
        assert relative(moved[i] - H[i], references.input_jacobian(problem, i) @ delta[i]) < 1e-3


@BY_NAME
def test_input_gradients_are_those_of_the_batch_loss(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    G = references.input_gradients(problem)
    X = references.inputs(problem)
    assert G.shape == X.shape
    if case is zoo.plain.zero_initialised_head:
        assert not G.any()
        return
    assert np.linalg.norm(G) > 0
    if problem.input_path is None or case.interacting:
        return
    x = get_input(problem.batch, problem.input_path).clone().requires_grad_()
    value = problem.loss(problem.model, set_input(problem.batch, problem.input_path, x))
    (value.sum() if problem.reduction == "sum" else value.mean()).backward()
    assert relative(G, problem.size * x.grad.numpy().reshape(G.shape)) < 1e-12


@pytest.mark.parametrize("case", zoo.select(kinked=False, once_differentiable=False), ids=lambda case: case.name)
def test_hessian_is_the_slope_of_the_gradient(case: zoo.Case, rng: np.random.Generator) -> None:
    problem = case.make(SEED, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    H = references.hessian(*arguments, problem.reduction)
    w = references.flat_weights(problem.model)
    omega = 1e-5 * rng.standard_normal(len(w))
    above = references.gradient_at(*arguments, w + omega, problem.reduction)
    below = references.gradient_at(*arguments, w - omega, problem.reduction)
    assert relative((above - below) / 2, H @ omega) < 1e-5


def test_hessian_by_differences_is_the_hessian() -> None:
    problem = zoo.losses.pair_of_examples.make(SEED, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    assert relative(references.hessian_by_differences(*arguments), references.hessian(*arguments)) < 1e-7


@pytest.mark.parametrize("case", zoo.select(once_differentiable=True), ids=lambda case: case.name)
def test_missing_and_wrong_double_backwards_are_refused_and_differences_serve_instead(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    with pytest.raises((AssertionError, NotImplementedError), match=r"not symmetric|not implemented"):
        references.hessian(*arguments)
    H = references.hessian_by_differences(*arguments)
    assert relative(H.T, H) < 1e-7


# --- step-consistency ----------------------------------------------------------------------------------------------


def test_weight_metrics_by_hand() -> None:
    h_0, hs = np.array([3.0, 4.0]), [np.array([3.0, 5.0]), np.array([-4.0, 3.0])]
    omegas, w = [np.array([0.0, 0.5]), np.array([10.0, 0.0])], np.array([0.0, 2.0])
    assert references.weight_condition(w, h_0, hs, omegas) == pytest.approx(1 * 2 / (0.5 * 5))
    assert references.weight_cosine(h_0, hs) == pytest.approx(0, abs=1e-15)
    assert references.weight_diversity(hs) == pytest.approx((34 + 25) / (1 + 64))
    assert references.weight_coherence(h_0, hs) == pytest.approx((29 + 0) / (34 + 25))
    assert references.step_condition(h_0, hs[0], w, omegas[0]) == pytest.approx(0.8)


def test_weight_condition_of_a_quadratic_along_an_eigenvector(rng: np.random.Generator) -> None:
    A, basis = symmetric(rng, [-5.0, 1.0, 2.0, 3.0])
    w = rng.standard_normal(4)
    for value, vector in zip([-5.0, 1.0, 2.0, 3.0], basis.T, strict=True):
        omega = 0.1 * vector
        expected = abs(value) * np.linalg.norm(w) / np.linalg.norm(A @ w)
        assert references.weight_condition(w, A @ w, [A @ (w + omega)], [omega]) == pytest.approx(expected)


def test_krylov_directions_of_a_quadratic(rng: np.random.Generator) -> None:
    A, _ = symmetric(rng, [-5.0, 1.0, 2.0, 3.0, 0.5])
    w = rng.standard_normal(5)
    scale = np.linalg.norm(w) / np.linalg.norm(A @ w)
    bounds = []
    for k in range(1, 6):
        found = references.krylov_directions(lambda v: A @ v, w, k, 0.1)
        Q = np.stack(found.directions)
        assert np.allclose(Q @ Q.T, np.eye(k), atol=1e-10)
        assert relative(np.stack(found.products), Q @ A) < 1e-10
        assert [np.linalg.norm(omega) for omega in found.omegas] == pytest.approx([0.1] * k)
        bounds.append(references.span_condition(found.directions, found.products, w, A @ w))
        powers = np.stack([np.linalg.matrix_power(A, j) @ A @ w for j in range(k)])
        assert np.linalg.matrix_rank(np.concatenate([powers, Q]), tol=1e-6) == k
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(5 * scale)
    assert references.sharpness(A, found.directions) == pytest.approx(3)


def test_krylov_directions_stop_in_an_invariant_span() -> None:
    A = np.diag([2.0, 2.0, 3.0])
    found = references.krylov_directions(lambda v: A @ v, np.array([1.0, 1.0, 1.0]), 3, 0.1)
    assert len(found.directions) == 2
    assert references.span_condition(*found[:2], np.ones(3), A @ np.ones(3)) == pytest.approx(3 * 3**0.5 / 17**0.5)


def test_span_condition_bounds_every_direction_of_the_span(rng: np.random.Generator) -> None:
    A, w = rng.standard_normal((6, 6)), rng.standard_normal(6)
    qs = list(np.linalg.qr(rng.standard_normal((6, 3)))[0].T)
    weights = rng.uniform(1, 5, 6)
    for factors in (None, weights):
        bound = references.span_condition(qs, [A @ q for q in qs], w, w, factors)
        ratios = []
        for _ in range(2000):
            omega = rng.standard_normal(3) @ np.stack(qs)
            ratios.append(references.weight_condition(w, w, [w + A @ omega], [omega], factors))
        assert 0.97 * bound < max(ratios) <= bound * (1 + 1e-12)
    plain = np.linalg.svd(A @ np.stack(qs).T, compute_uv=False)[0]
    assert references.span_condition(qs, [A @ q for q in qs], w, w) == pytest.approx(plain)


# --- batch-dissonance ----------------------------------------------------------------------------------------------


def test_batch_metrics_by_hand() -> None:
    H = np.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [2.0, 2.0]])
    assert references.gradient_coherence(H) == pytest.approx((16 + 16) / 4 / (9 + 1 + 2 + 8))
    means = np.array([[1.5, 0.5], [0.5, 1.5]])
    assert np.array_equal(references.batch_means(H, 2), means)
    assert len(references.batch_means(H, 9)) == 4
    assert np.array_equal(references.batch_means(H, 3), H[:3])
    assert references.gradient_confusion(H, 4) == pytest.approx(math.sqrt(0.5))
    assert references.gradient_confusion(H, 2) == 0
    assert references.gradient_diversity(H, 2) == pytest.approx((2.5 + 2.5) / 8)
    variances = [(4 + 1 + 4 + 1) / 3, (1 + 0 + 0 + 1) / 3]
    assert references.noise_scale(H) == pytest.approx(sum(variances) / (2 - sum(variances) / 4))
    assert references.noise_ratio(H) == pytest.approx(1)
    snr = [1 / variances[0], 1 / variances[1]]
    assert references.gradient_snr(H) == pytest.approx(sum(snr) / 2)
    assert references.gradient_snr(np.insert(H, 1, 0.0, axis=1)) == pytest.approx(sum(snr) / 2)
    assert references.gradient_snr(np.insert(H, 1, H[:, 0], axis=1)) == pytest.approx(snr[0])


def test_gradient_coherence_is_the_gram_formula(rng: np.random.Generator) -> None:
    H = rng.standard_normal((5, 7))
    G = references.gram(H)
    assert relative(G, H @ H.T) < 1e-14
    assert references.gradient_coherence(H) == pytest.approx(G.sum() / (5 * np.trace(G)))


def test_noise_scale_without_signal_is_infinite() -> None:
    assert references.noise_scale(np.array([[1.0, 0.0], [-1.0, 0.0]])) == math.inf
    assert references.noise_scale(np.array([[1.0, 0.0], [1.0, 0.0]])) == 0


def test_noise_scale_is_unbiased_in_both_parts(rng: np.random.Generator) -> None:
    signal, noise = np.array([1.0, 2.0, 0.0]), 0.5
    H = signal + noise * rng.standard_normal((3000, 3))
    assert references.noise_scale(H) == pytest.approx(3 * noise**2 / 5, rel=0.1)


def test_stable_rank_of_orthogonal_and_of_equal_columns() -> None:
    assert references.stable_rank(np.eye(9)[:, :4] * 3) == pytest.approx(4)
    assert references.stable_rank(np.ones((9, 4))) == pytest.approx(1)
    expected = references.expected_normal_rank(9, 4)
    assert expected == pytest.approx(36 / 25)
    assert references.gradient_rank(np.ones((4, 9))) == pytest.approx(1 / expected)
    assert references.input_gradient_rank(np.ones((4, 9))) == pytest.approx(1 / expected)
    assert references.gradient_rank(np.ones((4, 9)), 100) == pytest.approx(1 / references.expected_normal_rank(100, 4))


@pytest.mark.parametrize(("P", "B"), [(1000, 8), (500, 64), (100, 100)])
def test_expected_normal_rank_is_that_of_samples(P: int, B: int, rng: np.random.Generator) -> None:
    sampled = np.mean([references.stable_rank(rng.standard_normal((P, B))) for _ in range(10)])
    assert references.expected_normal_rank(P, B) == pytest.approx(sampled, rel=0.06)


# --- masks ---------------------------------------------------------------------------------------------------------


def test_an_integer_weight_is_a_repeated_coordinate(rng: np.random.Generator) -> None:
    weights = np.array([1, 3, 2, 1, 2])
    H, w, omega = rng.standard_normal((4, 5)) + 0.3, rng.standard_normal(5), rng.standard_normal((3, 5))
    hs = list(rng.standard_normal((3, 5)))

    def long(a: np.ndarray) -> np.ndarray:
        return np.repeat(a, weights, axis=-1)

    longs = [long(h) for h in hs]
    pairs = [
        (
            references.weight_condition(w, H[0], hs, list(omega), weights),
            references.weight_condition(long(w), long(H[0]), longs, list(long(omega))),
        ),
        (references.weight_cosine(H[0], hs, weights), references.weight_cosine(long(H[0]), longs)),
        (references.weight_diversity(hs, weights), references.weight_diversity(longs)),
        (references.weight_coherence(H[0], hs, weights), references.weight_coherence(long(H[0]), longs)),
        (
            references.span_condition(list(omega), hs, w, H[0], weights),
            references.span_condition([long(o) for o in omega], longs, long(w), long(H[0])),
        ),
        (references.gradient_rank(H, 9, weights), references.gradient_rank(long(H))),
        (references.gradient_confusion(H, 4, weights), references.gradient_confusion(long(H), 4)),
        (references.gradient_diversity(H, 2, weights), references.gradient_diversity(long(H), 2)),
        (references.gradient_coherence(H, weights), references.gradient_coherence(long(H))),
        (references.noise_scale(H, weights), references.noise_scale(long(H))),
        (references.step_share(*H[:3], weights), references.step_share(*long(H[:3]))),
        (references.step_ratio(*H[:2], weights), references.step_ratio(*long(H[:2]))),
    ]
    for masked, repeated in pairs:
        assert masked == pytest.approx(repeated, rel=1e-12)


def test_coordinate_weights_make_up_for_the_coordinates_left_out() -> None:
    model = nn.Linear(4, 3)
    weights = references.coordinate_weights(model, [0, 5, 7, 11, 12, 14])
    assert weights.tolist() == [3.0] * 4 + [1.5] * 2
    assert references.coordinate_weights(model, range(15)).tolist() == [1.0] * 15


# --- shares of the variance, health --------------------------------------------------------------------------------


def test_sources_of_variance_and_health_by_hand() -> None:
    h, h_step, h_next = np.array([3.0, 4.0]), np.array([4.0, 4.0]), np.array([3.0, 7.0])
    assert references.step_share(h, h_step, h_next) == pytest.approx(0.1)
    assert references.batch_share(h, h_step, h_next) == pytest.approx(0.9)
    assert references.step_ratio(h, h_step) == pytest.approx(0.2)
    assert references.update_ratio(np.array([0.0, 0.1]), h) == pytest.approx(0.02)
    assert references.stability(0.5, 8.0) == 2
    assert references.sharpness(np.diag([1.0, -9.0, 4.0]), list(np.eye(3)[:2])) == pytest.approx(1)


def test_metrics_do_not_change_with_the_scale_of_the_loss(rng: np.random.Generator) -> None:
    H, w, omegas = rng.standard_normal((4, 6)) + 0.5, rng.standard_normal(6), list(rng.standard_normal((2, 6)))
    for exponent in (-100, 100):
        scaled = H * 2.0**exponent
        for metric in (
            references.gradient_rank,
            references.gradient_coherence,
            references.noise_scale,
            references.gradient_snr,
            lambda rows: references.gradient_confusion(rows, 4),
            lambda rows: references.gradient_diversity(rows, 4),
            lambda rows: references.weight_condition(w, rows[0], list(rows[1:3]), omegas),
        ):
            assert metric(scaled) == pytest.approx(metric(H), rel=1e-12)
