"""Numbers that can be worked out on paper."""

import math

import pytest
import torch
from torch import Tensor, nn

import gradmon
from gradmon.perturbations import inputs as input_samplers
from gradmon.perturbations import weights as weight_samplers

A = torch.tensor([[2.0, 1.0, 0.0, -1.0], [1.0, -4.0, 0.5, 0.0], [0.0, 0.5, 3.0, 1.0], [-1.0, 0.0, 1.0, 1.0]]).double()
W = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
H = A @ W
ANY_BATCH = torch.zeros(4, 1, dtype=torch.float64)


class Vector(nn.Module):
    """A vector of weights and nothing else."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values.clone())


def quadratic(matrix: Tensor = A):
    return lambda model, batch: 0.5 * (model.w @ matrix @ model.w)


def quadratics(model: nn.Module, matrices: Tensor) -> Tensor:
    """One quadratic for each example: the batch is the matrices, (B, n, n)."""
    return 0.5 * torch.einsum("i,bij,j->b", model.w, matrices, model.w)


def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
    """An example's gradient is the example itself."""
    return x @ model.w


def number(name: str, *arguments, **options) -> float:
    reading = gradmon.measure(*arguments, metrics=name, **options)[name]
    assert reading.reason is None
    return reading.value


def of_rows(rows: Tensor, name: str, **options):
    """The reading of a metric where the examples' gradients are these rows."""
    return gradmon.measure(Vector(torch.ones_like(rows[0])), linear_loss, rows, metrics=name, **options)[name]


# --- one quadratic: the gradient is A w, its change is A omega -----------------------------------------------------


@pytest.mark.parametrize(("derivative", "rtol"), [("finite", 1e-11), ("exact", 1e-14)])
def test_weight_metrics_of_a_quadratic_along_fixed_directions(derivative, rtol):
    omegas = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, -1.0, 0.0], [0.0, 0.0, 0.25, 0.25]]).double()
    options = {"weights": weight_samplers.Fixed(omegas), "derivative": derivative}
    found = {
        name: number(f"weight_{name}", Vector(W), quadratic(), ANY_BATCH, **options)
        for name in ("condition", "cosine", "diversity", "coherence")
    }
    moved = H + omegas @ A
    slopes = (omegas @ A).norm(dim=1) / omegas.norm(dim=1)
    assert found["condition"] == pytest.approx(float(slopes.max() * W.norm() / H.norm()), rel=rtol)
    assert found["cosine"] == pytest.approx(float((moved @ H / moved.norm(dim=1) / H.norm()).min()), rel=rtol)
    assert found["diversity"] == pytest.approx(float(moved.square().sum() / moved.sum(0).square().sum()), rel=rtol)
    assert found["coherence"] == pytest.approx(float((moved @ H).sum() / moved.square().sum()), rel=rtol)


@pytest.mark.parametrize("n", [1, 2])
def test_limited_looks_along_the_gradient(n):
    found = number("weight_condition", Vector(W), quadratic(), ANY_BATCH, weights=weight_samplers.Limited(n))
    assert found == pytest.approx(float((A @ H).norm() * W.norm() / H.norm() ** 2), rel=1e-9)


def test_targeted_looks_along_the_examples_gradients():
    matrices = torch.stack([A, A @ A, torch.eye(4).double(), A.flip(0, 1)])
    mean, shares = matrices.mean(0), matrices @ W
    found = number("weight_condition", Vector(W), quadratics, matrices, weights=weight_samplers.Targeted())
    slopes = (shares @ mean).norm(dim=1) / shares.norm(dim=1)
    assert found == pytest.approx(float(slopes.max() * W.norm() / (mean @ W).norm()), rel=1e-9)


def test_krylov_is_the_largest_singular_value_once_its_span_is_everything():
    top = float(torch.linalg.svdvals(A)[0] * W.norm() / H.norm())
    values = [
        number("weight_condition", Vector(W), quadratic(), ANY_BATCH, weights=weight_samplers.Krylov(k))
        for k in (1, 2, 3, 4)
    ]
    assert values[0] == pytest.approx(float((A @ H).norm() * W.norm() / H.norm() ** 2), rel=1e-9)
    assert values == sorted(values)
    assert values[2] < top * (1 - 1e-6)
    assert values[3] == pytest.approx(top, rel=1e-9)


def test_krylov_stops_where_nothing_new_is_left():
    identity = quadratic(3 * torch.eye(4, dtype=torch.float64))
    assert number("weight_condition", Vector(W), identity, ANY_BATCH) == pytest.approx(1, rel=1e-9)
    assert number("weight_diversity", Vector(W), identity, ANY_BATCH) == pytest.approx(1, rel=1e-9)  # one direction


def test_random_directions_lie_between_the_singular_values():
    singular = torch.linalg.svdvals(A) * W.norm() / H.norm()
    found = number("weight_condition", Vector(W), quadratic(), ANY_BATCH, weights=weight_samplers.Random(n=8))
    assert float(singular[-1]) < found < float(singular[0])


def test_a_quadratic_is_smooth():
    assert number("scale_ratio", Vector(W), quadratic(), ANY_BATCH) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("derivative", ["finite", "exact"])
def test_sharpness_is_the_largest_algebraic_eigenvalue(derivative):
    eigenvalues = torch.linalg.eigvalsh(A)
    assert abs(eigenvalues[0]) > eigenvalues[-1]  # the largest singular value is another one
    options = {"weights": weight_samplers.Krylov(4), "derivative": derivative}
    found = number("sharpness", Vector(W), quadratic(), ANY_BATCH, **options)
    assert found == pytest.approx(float(eigenvalues[-1]), rel=1e-8)


def test_sharpness_of_a_concave_loss_is_negative():
    concave = quadratic(-torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))
    options = {"weights": weight_samplers.Krylov(4)}
    assert number("sharpness", Vector(W), concave, ANY_BATCH, **options) == pytest.approx(-1, rel=1e-6)


def test_stability_is_half_the_learning_rate_times_the_sharpness():
    model = Vector(W)
    options = {"weights": weight_samplers.Krylov(4), "optimizer": torch.optim.SGD(model.parameters(), lr=0.3)}
    expected = 0.15 * float(torch.linalg.eigvalsh(A)[-1])
    assert number("stability", model, quadratic(), ANY_BATCH, **options) == pytest.approx(expected, rel=1e-8)


def several_rates(parameters):
    other = nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": parameters}, {"params": [other], "lr": 0.1}], lr=0.3)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda parameters: torch.optim.Adam(parameters, lr=0.3), "Adam"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.3, maximize=True), "SGD that maximizes"),
        (several_rates, "SGD with several"),
    ],
)
def test_stability_is_for_sgd_with_one_rate_only(make, what):
    model = Vector(W)
    options = {"metrics": "stability", "optimizer": make(list(model.parameters()))}
    found = gradmon.measure(model, quadratic(), ANY_BATCH, **options)["stability"]
    assert math.isnan(found.value)
    assert found.reason == f"defined for SGD with one learning rate, not for {what}"


def test_step_of_sgd_on_a_quadratic():
    model, lr = Vector(W), 0.05
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=lr)}
    found = {
        name: number(name, model, quadratic(), ANY_BATCH, **options)
        for name in ("step_ratio", "update_ratio", "step_condition", "grad_norm", "param_norm", "loss")
    }
    change = float((A @ H).norm())
    assert found["step_ratio"] == pytest.approx(lr * change / float(H.norm()), rel=1e-9)
    assert found["update_ratio"] == pytest.approx(lr * float(H.norm() / W.norm()), rel=1e-12)
    assert found["step_condition"] == pytest.approx(change * float(W.norm() / H.norm() ** 2), rel=1e-9)
    assert found["grad_norm"] == pytest.approx(float(H.norm()), rel=1e-14)
    assert found["param_norm"] == pytest.approx(float(W.norm()), rel=1e-14)
    assert found["loss"] == pytest.approx(float(0.5 * W @ A @ W), rel=1e-14)


def test_momentum_enters_the_step_but_not_the_optimizer():
    model, lr = Vector(W), 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    buffer = torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
    optimizer.state[model.w]["momentum_buffer"] = buffer.clone()
    omega = -lr * (0.5 * buffer + H)
    found = number("step_ratio", model, quadratic(), ANY_BATCH, optimizer=optimizer)
    assert found == pytest.approx(float((A @ omega).norm() / H.norm()), rel=1e-9)
    assert torch.equal(optimizer.state[model.w]["momentum_buffer"], buffer)
    assert torch.equal(model.w.detach(), W)


def test_shares_of_the_two_sources():
    model, lr = Vector(W), 0.05
    batch, following = torch.stack([A, A]), torch.stack([A @ A, A])
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=lr), "next_batch": following}
    by_step, by_batch = float((lr * A @ H).square().sum()), float((following.mean(0) @ W - H).square().sum())
    found = number("step_share", model, quadratics, batch, **options)
    assert found == pytest.approx(by_step / (by_step + by_batch), rel=1e-9)
    other = number("batch_share", model, quadratics, batch, **options)
    assert other == pytest.approx(by_batch / (by_step + by_batch), rel=1e-9)
    onto = following.mean(0) @ (W - lr * H) - H
    expected = float(onto.norm() * W.norm() / (lr * H.norm()) / H.norm())
    assert number("step_condition", model, quadratics, batch, **options) == pytest.approx(expected, rel=1e-9)


# --- per-example gradients that are given: h_i is row i ------------------------------------------------------------

NOISE_RANK = 4 * 6 / (2 + math.sqrt(6)) ** 2  # R(Y) of four examples of six weights


def test_identical_examples_agree_entirely():
    rows = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0]).double().repeat(4, 1)
    assert of_rows(rows, "gradient_coherence").value == pytest.approx(1, abs=1e-12)
    assert of_rows(rows, "gradient_confusion").value == 0
    assert of_rows(rows, "noise_scale").value == pytest.approx(0, abs=1e-12)
    assert of_rows(rows, "noise_ratio").value == pytest.approx(0, abs=1e-12)
    assert of_rows(rows, "gradient_rank").value == pytest.approx(1 / NOISE_RANK, rel=1e-12)
    assert of_rows(rows, "input_gradient_rank").value == pytest.approx(1 / NOISE_RANK, rel=1e-12)
    for n in (2, 4, 8):
        assert of_rows(rows, "gradient_diversity", micro_batches=n).value == pytest.approx(1 / min(n, 4), rel=1e-12)
    snr = of_rows(rows, "gradient_snr")
    assert (snr.value, snr.reason) == (math.inf, "no variance over the examples")


def test_orthogonal_examples_neither_help_nor_hinder():
    rows = 3 * torch.eye(4, 6, dtype=torch.float64)
    assert of_rows(rows, "gradient_coherence").value == pytest.approx(1 / 4, rel=1e-12)
    assert of_rows(rows, "gradient_confusion").value == 0
    assert of_rows(rows, "gradient_diversity").value == pytest.approx(1, rel=1e-12)
    assert of_rows(rows, "gradient_rank").value == pytest.approx(4 / NOISE_RANK, rel=1e-12)
    assert of_rows(rows, "gradient_snr").value == pytest.approx((1 / 4) ** 2 / (1 / 4), rel=1e-12)
    noise = of_rows(rows, "noise_scale")
    assert (noise.value, noise.reason) == (math.inf, "no signal above the noise")


def test_opposite_examples_cancel():
    row = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0]).double()
    rows = torch.stack([row, -row, row, -row])
    assert of_rows(rows, "gradient_confusion").value == pytest.approx(1, rel=1e-12)
    assert of_rows(rows, "gradient_coherence").value == 0
    assert of_rows(rows, "gradient_rank").value == pytest.approx(1 / NOISE_RANK, rel=1e-12)
    assert of_rows(rows, "gradient_snr").value == 0
    noise = of_rows(rows, "noise_scale")
    assert (noise.value, noise.reason) == (math.inf, "no signal above the noise")
    diversity = of_rows(rows, "gradient_diversity")
    assert math.isnan(diversity.value)
    assert diversity.reason == "zero gradient"


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 12])
@pytest.mark.parametrize("size", [1.0, 0.1, 0.7, 3.3e-9])
def test_one_example_with_a_gradient_shows_no_signal(count, size):
    rows = torch.zeros(count, 3).double()
    rows[0] = size * torch.tensor([1.0, 0.3, -0.7]).double()
    noise = of_rows(rows, "noise_scale")
    assert (noise.value, noise.reason) == (math.inf, "no signal above the noise")


def test_micro_batches_are_means_over_consecutive_parts():
    rows = torch.tensor([[4.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [-2.0, 2.0], [100.0, 100.0]]).double()
    # Two parts of two examples, the fifth left out: (2, 1) and (-2, 1).
    confusion = of_rows(rows, "gradient_confusion", micro_batches=2).value
    assert confusion == pytest.approx(3 / 5, rel=1e-12)
    assert of_rows(rows, "gradient_diversity", micro_batches=2).value == pytest.approx(10 / 4, rel=1e-12)


def test_noise_scale_and_signal_by_hand():
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]).double()
    # Mean (3, 2), variances 4 and 12, unbiased square of the mean 13 - 16 / 3.
    assert of_rows(rows, "noise_scale").value == pytest.approx(16 / (13 - 16 / 3), rel=1e-12)
    assert of_rows(rows, "noise_ratio").value == pytest.approx(16 / (13 - 16 / 3) / 3, rel=1e-12)
    assert of_rows(rows, "gradient_snr").value == pytest.approx((9 / 4 + 4 / 12) / 2, rel=1e-12)


def test_coordinates_that_no_example_uses_have_no_signal_to_noise_ratio():
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]).double()
    assert of_rows(rows, "gradient_snr").value == pytest.approx(4 / 2, rel=1e-12)


@pytest.mark.parametrize(("total", "examples", "off"), [(2000, 4, 0.05), (500, 40, 0.06), (60, 60, 0.1)])
def test_rank_of_noise_is_about_one(total, examples, off):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(examples, total, generator=generator, dtype=torch.float64) for _ in range(8)]
    ranks = torch.tensor([of_rows(rows, "gradient_rank").value for rows in draws])
    assert float(ranks.mean()) == pytest.approx(1, abs=off)


# --- a linear model with the mean squared error --------------------------------------------------------------------


@pytest.fixture
def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        return model, (torch.randn(5, 3).double(), torch.randn(5, 2).double())


def squared_error(model: nn.Module, batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def linear_shares(model: nn.Linear, x: Tensor, t: Tensor) -> Tensor:
    """``r x^T`` and ``r``, r the residual: the factor is 2 over the number of outputs."""
    residual = (x @ model.weight.T + model.bias - t).detach()
    return torch.cat([torch.einsum("bo,bi->boi", residual, x).flatten(1), residual], dim=1)


def test_linear_regression_by_hand(linear):
    model, (x, t) = linear
    expected = linear_shares(model, x, t)
    rows = gradmon.per_example_gradients(model, squared_error, (x, t))
    torch.testing.assert_close(rows, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradmon.per_example_gram(model, squared_error, (x, t)), expected @ expected.T)
    h = gradmon.batch_gradient(model, squared_error, (x, t))
    torch.testing.assert_close(h, expected.mean(0), rtol=1e-13, atol=1e-14)


def test_input_gradients_of_linear_regression_by_hand(linear):
    model, (x, t) = linear
    own = ((model(x) - t) @ model.weight).detach()
    gram = own @ own.T
    noise = 3 * 5 / (math.sqrt(3) + math.sqrt(5)) ** 2
    expected = float(gram.trace() / torch.linalg.eigvalsh(gram)[-1]) / noise
    assert number("input_gradient_rank", model, squared_error, (x, t)) == pytest.approx(expected, rel=1e-12)


def test_input_condition_of_linear_regression_by_hand(linear):
    model, (x, t) = linear
    deltas = torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.5, -0.5]]).double()
    before = linear_shares(model, x, t)
    changes = torch.stack([(linear_shares(model, x + d, t) - before).norm(dim=1) / d.norm() for d in deltas])
    expected = (changes.max(0).values * x.norm(dim=1) / before.norm(dim=1)).mean()
    options = {"inputs": input_samplers.Fixed(deltas)}
    assert number("input_condition", model, squared_error, (x, t), **options) == pytest.approx(float(expected))


def test_a_sum_is_the_batch_size_times_a_mean(linear):
    model, batch = linear

    def values(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    def means(model, batch):
        return values(model, batch).mean()

    def sums(model, batch):
        return values(model, batch).sum()

    mean = gradmon.per_example_gradients(model, means, batch)
    torch.testing.assert_close(gradmon.per_example_gradients(model, values, batch), mean)
    torch.testing.assert_close(gradmon.per_example_gradients(model, sums, batch), 5 * mean)
    torch.testing.assert_close(gradmon.per_example_gradients(model, values, batch, reduction="sum"), 5 * mean)
    torch.testing.assert_close(gradmon.per_example_gram(model, sums, batch), 25 * mean @ mean.T)
    h = gradmon.batch_gradient(model, values, batch, reduction="sum")
    torch.testing.assert_close(h, 5 * gradmon.batch_gradient(model, values, batch))
    readings = [
        gradmon.measure(model, means, batch),
        gradmon.measure(model, values, batch),
        gradmon.measure(model, sums, batch),
        gradmon.measure(model, values, batch, reduction="sum"),
    ]
    for found, factor in zip(readings, (1, 1, 5, 5), strict=True):
        for name, reading in found.items():
            scales = factor if name in ("loss", "grad_norm", "sharpness") else 1
            assert reading.value == pytest.approx(scales * readings[0][name].value, rel=1e-7), name
