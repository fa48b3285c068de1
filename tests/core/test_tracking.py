"""The largest change of the gradient and the largest curvature: exact where they can be, never too large elsewhere."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import ArgumentError, Monitor, every
from gradmon._errors import Unavailable
from gradmon.perturbations.weights import Krylov, Lanczos, WeightPoint
from gradmon.sinks import MemorySink
from tests import references

NAMES = ["weight_condition", "sharpness", "stability"]
P = 12


# --- a quadratic loss ------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """One vector of weights."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(start.clone())


class Quadratic:
    """``0.5 w A w - b w`` with the given eigenvalues of A."""

    def __init__(self, eigenvalues, seed=0):
        generator = np.random.default_rng(seed)
        self.basis = np.linalg.qr(generator.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
        self.A = self.basis @ np.diag(eigenvalues) @ self.basis.T
        self.A = (self.A + self.A.T) / 2
        self.b = generator.normal(size=len(eigenvalues))
        self.start = generator.normal(size=len(eigenvalues))

    def model(self, start=None):
        return Point(torch.from_numpy(self.start if start is None else start))

    def __call__(self, model, batch):
        w = model.w
        return 0.5 * w @ (torch.from_numpy(self.A).to(w) @ w) - torch.from_numpy(self.b).to(w) @ w

    def h(self, w):
        return self.A @ w - self.b

    def truth(self, w, lr=0.01):
        values = np.linalg.eigvalsh(self.A)
        return {
            "weight_condition": np.abs(values).max() * np.linalg.norm(w) / np.linalg.norm(self.h(w)),
            "sharpness": values.max(),
            "stability": lr * values.max() / 2,
        }


BATCH = torch.zeros(4, 1, dtype=torch.float64)
SPECTRA = {
    "positive": np.linspace(0.1, 8, P),
    "both_signs": np.linspace(-3, 8, P),
    "negative_is_larger": np.linspace(-8, 3, P),
    "largest_is_negative": np.array([-8.0, 3.0, *np.linspace(-0.5, 0.5, P - 2)]),
    "outlier": np.array([0.01] * (P - 1) + [50.0]),
    "few": np.array([0.0] * (P - 3) + [1.0, -2.0, 5.0]),
}


def measured(problem, start=None, **options):
    model = problem.model(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return gradmon.measure(model, problem, BATCH, metrics=NAMES, optimizer=optimizer, **options)


@pytest.mark.parametrize("weights", [Krylov(P), Lanczos(0)], ids=["krylov", "lanczos"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_exact_products_are_exact(spectrum, weights):
    problem = Quadratic(SPECTRA[spectrum])
    found, expected = measured(problem, weights=weights, derivative="exact"), problem.truth(problem.start)
    for name in NAMES:
        assert found[name].value == pytest.approx(expected[name], rel=1e-8), name


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_few_products_give_the_largest_over_their_span(k):
    problem = Quadratic(SPECTRA["both_signs"])
    found = measured(problem, weights=Krylov(k), derivative="exact")
    w, h = problem.start, problem.h(problem.start)
    taken = references.krylov_directions(lambda v: h + problem.A @ (v - w), w, k, 1e-3)
    span = references.span_condition(taken.directions, [problem.A @ q for q in taken.directions], w, h)
    assert found["weight_condition"].value == pytest.approx(span, rel=1e-8)
    assert found["sharpness"].value == pytest.approx(references.sharpness(problem.A, taken.directions), rel=1e-8)


def test_differences_of_a_quadratic_are_exact_too():
    problem = Quadratic(SPECTRA["both_signs"])
    found, expected = measured(problem, weights=Krylov(P)), problem.truth(problem.start)
    for name in NAMES:
        assert found[name].value == pytest.approx(expected[name], rel=1e-8), name


def test_given_start_is_the_first_direction():
    problem, q = Quadratic(SPECTRA["both_signs"]), np.random.default_rng(5).normal(size=P)
    found = measured(problem, weights=Krylov(1, start=torch.from_numpy(7 * q)), derivative="exact")
    w, h, q = problem.start, problem.h(problem.start), q / np.linalg.norm(q)
    stretch = np.linalg.norm(problem.A @ q)
    assert found["weight_condition"].value == pytest.approx(stretch * np.linalg.norm(w) / np.linalg.norm(h), rel=1e-8)
    assert found["sharpness"].value == pytest.approx(q @ problem.A @ q, rel=1e-8)


def test_wrong_starts():
    problem = Quadratic(SPECTRA["positive"])
    with pytest.raises(ArgumentError, match=r"`start` must have 12 entries, one per weight\. Got 5"):
        measured(problem, weights=Krylov(1, start=torch.ones(5)))
    for start in (torch.zeros(P), [1.0] * P, 3):
        with pytest.raises(ArgumentError, match=r"`start` must be a tensor \(P,\) that is not zero"):
            Krylov(1, start=start)


# --- Lanczos' method against the dense Hessian -----------------------------------------------------------------------


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("seed", range(4))
def test_lanczos_agrees_with_the_dense_hessian(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    H = references.hessian(model, mse, batch)
    values, w, h = np.linalg.eigvalsh(H), references.flat_weights(model), references.batch_gradient(model, mse, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"metrics": NAMES, "optimizer": optimizer, "derivative": "exact"}
    found = gradmon.measure(model, mse, batch, weights=Lanczos(0), **options)
    largest = np.abs(values).max() * np.linalg.norm(w) / np.linalg.norm(h)
    assert found["weight_condition"].value == pytest.approx(largest, rel=1e-8)
    assert found["sharpness"].value == pytest.approx(values.max(), rel=1e-8)
    assert found["stability"].value == pytest.approx(0.15 * values.max(), rel=1e-8)
    loose = gradmon.measure(model, mse, batch, weights=Lanczos(1e-3), **options)
    assert loose["sharpness"].value == pytest.approx(values.max(), rel=2e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lanczos_on_very_few_weights(size):
    problem = Quadratic(np.linspace(-1, 4, size) if size > 1 else np.array([4.0]))
    found, expected = measured(problem, weights=Lanczos(0), derivative="exact"), problem.truth(problem.start)
    for name in NAMES:
        assert found[name].value == pytest.approx(expected[name], rel=1e-8), name


def test_lanczos_wants_exact_products():
    problem = Quadratic(SPECTRA["positive"])
    with pytest.raises(ArgumentError, match=r'`derivative` must be "exact" for Lanczos\. Got "finite"'):
        measured(problem, weights=Lanczos())
    model = problem.model()
    with pytest.raises(ArgumentError, match=r'`derivative` must be "exact" for Lanczos'):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.01), problem, weights=Lanczos())
    part = torch.ones(P, dtype=torch.float64)
    point = WeightPoint([part], part, lambda example: part, 1, torch.Generator())
    with pytest.raises(ArgumentError, match=r'`derivative` must be "exact" for `Lanczos`\. Got "finite"'):
        next(Lanczos().draw(point))
    still = WeightPoint([0 * part], part, lambda example: part, 1, torch.Generator(), product=lambda v: v)
    with pytest.raises(Unavailable, match="zero weights"):
        next(Lanczos().draw(still))


@pytest.mark.parametrize("name", ["tolerance", "scale"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "1e-3", True])
def test_wrong_arguments_of_lanczos(name, value):
    with pytest.raises(ArgumentError, match=f"`{name}` must be a positive number"):
        Lanczos(**{name: value})


def test_lanczos_scaled():
    assert Lanczos(1e-4, 1e-3).scaled(0.1) == Lanczos(1e-4, 1e-3 * 0.1)
    with pytest.raises(ArgumentError, match="`scale` must be a positive number"):
        Lanczos(scale=0)


# --- a monitor that tracks -------------------------------------------------------------------------------------------


def watched(problem, steps, lr=1e-9, start=None, **options):
    """The readings of a monitor at weights that hardly move, by name, one for each step."""
    model, sink = problem.model(start), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options.setdefault("schedule", every(1))
    monitor = Monitor(model, optimizer, problem, metrics=NAMES, mask=None, sinks=[sink], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        problem(model, BATCH).backward()
        optimizer.step()
        monitor.step(BATCH)
    assert not monitor.failures
    return {name: np.array([r.value for r in sink.readings if r.name == name]) for name in NAMES}


def test_tracking_is_the_power_method():
    problem = Quadratic(SPECTRA["positive"])
    found = watched(problem, 6)
    w, h = problem.start, problem.h(problem.start)
    taken = references.krylov_directions(lambda v: h + problem.A @ (v - w), w, 3, 1e-3)
    basis = np.stack(taken.directions, axis=1)
    products = problem.A @ basis
    q = products @ np.linalg.svd(products)[2][0]  # the change along the steepest combination
    factor = np.linalg.norm(w) / np.linalg.norm(h)
    for probe in range(1, 6):
        q = q / np.linalg.norm(q)
        moved = problem.A @ q
        assert found["weight_condition"][probe] == pytest.approx(np.linalg.norm(moved) * factor, rel=1e-4)
        assert found["sharpness"][probe] == pytest.approx(q @ moved, rel=1e-4)
        q = moved


def test_tracking_converges_from_below_at_weights_that_stay():
    problem = Quadratic(SPECTRA["positive"])
    found, expected = watched(problem, 60), problem.truth(problem.start)
    part = found["weight_condition"] / expected["weight_condition"]
    assert (part < 1 + 1e-4).all()
    assert (np.diff(part[1:]) > -1e-4).all()
    assert part[-1] > 0.999
    assert found["sharpness"][-1] == pytest.approx(expected["sharpness"], rel=1e-3)


@pytest.mark.parametrize("spectrum", ["both_signs", "largest_is_negative"])
def test_sharpness_is_not_lost_to_negative_curvature(spectrum):
    """What three products from the gradient find at the first probe is still found at the later ones."""
    problem = Quadratic(SPECTRA[spectrum])
    found, expected = watched(problem, 60), problem.truth(problem.start)
    assert found["weight_condition"][-1] == pytest.approx(expected["weight_condition"], rel=1e-3)
    first = found["sharpness"][0]
    assert expected["sharpness"] >= first > 0.5 * expected["sharpness"]
    late = found["sharpness"][1:]
    assert np.isnan(late[late < 0.5 * first]).all()


def test_sharpness_where_both_ends_are_of_a_size():
    """Two eigenvalues of one size and opposite signs: the power method never settles on one of them."""
    problem = Quadratic(np.array([-10.0, 10.0, *np.linspace(-1, 1, P - 2)]))
    found, expected = watched(problem, 40), problem.truth(problem.start)
    part = found["weight_condition"] / expected["weight_condition"]
    assert (part[5:] > 0.99).all()
    assert (part < 1.0001).all()
    shown = found["sharpness"][np.isfinite(found["sharpness"])]
    assert 1 <= len(shown) < 5
    assert (shown < expected["sharpness"] * 1.0001).all()


# --- digits ----------------------------------------------------------------------------------------------------------


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def digits(count, size, seed=3):
    x, target = load_digits(return_X_y=True)
    x, target = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(target)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(len(x), (size,), generator=generator)
        yield x[rows], target[rows]


def parts_of_the_truth(gap, *, size=64, probes=8, same=False, lr=0.05):
    """What a monitor finds over what Lanczos' method finds at the same weights, for each probe."""
    model = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    names, found = ["weight_condition", "sharpness"], []
    monitor = Monitor(model, optimizer, cross_entropy, metrics=names, schedule=every(gap), mask=None)
    first = next(digits(1, size))
    for number, batch in enumerate(digits(gap * probes, size), 1):
        batch = first if same else batch
        before = copy.deepcopy(model) if number % gap == 0 else None
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if before is not None:
            options = {"metrics": names, "weights": Lanczos(1e-8), "derivative": "exact"}
            truth = gradmon.measure(before, cross_entropy, batch, **options)
            found.append([monitor.readings[name].value / truth[name].value for name in names])
    assert not monitor.failures
    condition, sharpness = np.array(found).T
    print(f"every {gap}, {size} examples: {condition.round(2)} of the condition, {sharpness.round(2)} of the sharpness")
    return condition, sharpness


# What is reached with one product for each probe: a lower bound, and not a tight one where the batches differ.
@pytest.mark.parametrize(("gap", "size", "least"), [(1, 64, 0.35), (10, 64, 0.35), (50, 64, 0.35), (10, 256, 0.4)])
def test_tracking_on_digits(gap, size, least):
    condition, sharpness = parts_of_the_truth(gap, size=size)
    assert (condition < 1.01).all()
    assert min(condition[0], sharpness[0]) > 0.7  # three products
    assert (condition[1:] > least).all()
    assert np.median(condition[1:]) > 0.55
    shown = sharpness[np.isfinite(sharpness)]
    assert (shown < 1.01).all()
    assert (shown > 0.7 * least).all()


def test_tracking_on_one_batch():
    condition, sharpness = parts_of_the_truth(1, probes=20, same=True, lr=0.01)
    assert (condition < 1.01).all()
    assert (sharpness < 1.01).all()
    assert (condition[-5:] > 0.98).all()
    assert (sharpness[-5:] > 0.95).all()
