"""What must hold for every model: invariances, ranges, parts that add up, and error estimates that are honest."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

import gradmon
from gradmon._batches import map_tensors, select_examples
from gradmon.perturbations import inputs as input_samplers
from gradmon.perturbations import weights as weight_samplers
from tests import references, zoo

NAMES = (
    "mlp_tanh",
    "mlp_relu_inplace",
    "regression",
    "cnn_group_norm",
    "batch_norm_mlp",
    "transformer_time_first",
    "tied_language_model",
    "module_used_twice",
    "rms_norm_functional",
    "token_mask",
    "values_sum",
    "penalty",
)
CASES = [case for case in zoo.CASES if case.name in NAMES]
EXAMPLES = (
    "gradient_rank",
    "gradient_confusion",
    "gradient_diversity",
    "gradient_coherence",
    "noise_scale",
    "noise_ratio",
    "gradient_snr",
)
UNSCALED = [*gradmon.METRICS.keys() - {"loss", "grad_norm", "sharpness"}]
RANGES = {
    "weight_cosine": (-1, 1),
    "gradient_confusion": (0, 1),
    "gradient_coherence": (0, 1),
    "step_share": (0, 1),
    "batch_share": (0, 1),
    "gradient_diversity": (1 / 3 - 1e-12, math.inf),
    "weight_diversity": (1 / 3 - 1e-12, math.inf),
    "gradient_rank": (0, 4),
    "input_gradient_rank": (0, 4),
    "sharpness": (-math.inf, math.inf),
    "stability": (-math.inf, math.inf),
    "weight_coherence": (-math.inf, math.inf),
}


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


def another(batch):
    """The same batch with its floating-point tensors (or all, where there is none) in another order."""
    if any(t.is_floating_point() for t in _leaves(batch)):
        return map_tensors(batch, lambda t: 0.5 * t.flip(0) if t.is_floating_point() else t)
    return map_tensors(batch, lambda t: t.roll(1, 1))


def _leaves(batch):
    found = []
    map_tensors(batch, lambda t: found.append(t) or t)
    return found


def measured(problem, *, lr=None, **options):
    if lr is not None:
        options["optimizer"] = torch.optim.SGD(problem.model.parameters(), lr=lr)
    options.setdefault("loss", problem.loss)
    options.setdefault("batch", problem.batch)
    module = None if problem.input_path is not None else problem.input_module
    return gradmon.measure(problem.model, reduction=problem.reduction, input_module=module, **options)


def same(one, two, rtol):
    assert one.keys() == two.keys()
    for name, reading in one.items():
        other = two[name]
        assert reading.reason == other.reason, name
        np.testing.assert_allclose(reading.value, other.value, rtol=rtol, atol=1e-13, err_msg=name)


# --- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_scale_of_the_loss_does_not_matter(case, exponent, dtype, rtol):
    problem = case.make(0, dtype)
    factor = 2.0**exponent
    options = {"metrics": UNSCALED, "next_batch": another(problem.batch), "mask": 0.5}
    plain = measured(problem, lr=0.25, **options)
    scaled = measured(problem, lr=0.25 / factor, loss=lambda m, b: factor * problem.loss(m, b), **options)
    same(plain, scaled, rtol)


def test_the_scale_of_the_loss_scales_the_gradient(case):
    problem = case.make()
    options = {"metrics": ["loss", "grad_norm", "sharpness"], "derivative": "finite"}
    plain = measured(problem, **options)
    scaled = measured(problem, loss=lambda m, b: 2.0**100 * problem.loss(m, b), **options)
    for name, reading in plain.items():
        assert scaled[name].value == pytest.approx(2.0**100 * reading.value, rel=1e-9), name


def test_the_order_of_the_examples_does_not_matter(case):
    problem = case.make()
    names = ["gradient_rank", "input_gradient_rank", "gradient_coherence", "noise_scale", "grad_norm"]
    order = torch.randperm(problem.size, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(order, torch.arange(problem.size))
    batch = select_examples(problem.batch, order)
    same(measured(problem, metrics=names), measured(problem, metrics=names, batch=batch), 1e-9)
    lowest, highest = references.gradient_snr_range(references.shares(problem), 1e-9)
    found = measured(problem, metrics=["gradient_snr"], batch=batch)["gradient_snr"]
    assert lowest <= found.value <= highest


def test_measuring_twice_gives_the_same(case):
    problem = case.make()
    options = {"lr": 0.1, "mask": 0.5, "next_batch": another(problem.batch), "layers": True}
    assert measured(problem, **options) == measured(problem, **options)


@pytest.mark.parametrize("case", zoo.DROPOUT_CASES, ids=[case.name for case in zoo.DROPOUT_CASES])
def test_dropout_is_the_same_in_every_pass(case):
    problem = case.make()
    names = ["weight_cosine", "weight_coherence", "step_ratio"]
    tiny = measured(problem, metrics=names, lr=1e-9, weights=weight_samplers.Random(n=4, eta=1e-9))
    assert tiny["weight_cosine"].value == pytest.approx(1, abs=1e-12)
    assert tiny["weight_coherence"].value == pytest.approx(1, abs=1e-6)
    assert tiny["step_ratio"].value < 1e-6
    h = gradmon.batch_gradient(problem.model, problem.loss, problem.batch)
    torch.testing.assert_close(gradmon.per_example_gradients(problem.model, problem.loss, problem.batch).mean(0), h)
    torch.testing.assert_close(
        h.numpy(), references.batch_gradient(problem.model, problem.loss, problem.batch), rtol=1e-12, atol=1e-14
    )


# --- ranges, and parts that add up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mask", [None, 0.3])
def test_ranges(case, seed, mask):
    problem = case.make(seed)
    options = {"metrics": list(gradmon.METRICS), "micro_batches": 3, "mask": mask}
    for name, reading in measured(problem, lr=0.1, next_batch=another(problem.batch), **options).items():
        low, high = RANGES.get(name, (0, math.inf))
        assert not math.isnan(reading.value), (name, reading.reason)
        assert low <= reading.value <= high, name
        if reading.resolution is not None:
            assert 0 < reading.resolution <= 0.5


def test_shares_add_up_to_one(case):
    problem = case.make()
    found = measured(problem, lr=0.1, metrics=["step_share", "batch_share"], next_batch=another(problem.batch))
    assert found["step_share"].value + found["batch_share"].value == pytest.approx(1, rel=1e-14)
    assert 0 < found["step_share"].value < 1


@pytest.mark.parametrize("mask", [None, 0.3])
def test_layers_add_up_to_the_whole(case, mask):
    problem = case.make()
    shared = ["weight_condition", "step_condition", "step_share", "batch_share", "step_ratio"]
    options = {"metrics": ["grad_norm", *shared], "next_batch": another(problem.batch), "mask": mask}
    found = measured(problem, lr=0.1, layers=True, **options)
    layers = {name.rpartition(".")[0] or name for name, p in problem.model.named_parameters() if p.requires_grad}
    for metric in options["metrics"]:
        parts = {r.layer: r.value for key, r in found.items() if r.name == metric and r.layer is not None}
        assert parts.keys() == layers
        assert all(key == r.name if r.layer is None else key == f"{r.name}/{r.layer}" for key, r in found.items())
        if metric == "grad_norm":
            squares = sum(part**2 for part in parts.values())
            assert math.sqrt(squares) == pytest.approx(found[metric].value, rel=1e-12)
        else:
            assert sum(parts.values()) == pytest.approx(1, rel=1e-12), metric
            assert min(parts.values()) >= 0


# --- masks ---------------------------------------------------------------------------------------------------------


def test_a_mask_of_everything_is_no_mask(case):
    problem = case.make()
    options = {"metrics": list(gradmon.METRICS), "next_batch": another(problem.batch), "lr": 0.1}
    same(measured(problem, **options), measured(problem, mask=1.0, **options), 1e-9)


def test_masked_inner_products_are_unbiased():
    problem = zoo.named("regression").make()
    arguments = (problem.model, problem.loss, problem.batch)
    full = gradmon.per_example_gram(*arguments)
    estimates = []
    for seed in range(400):
        mask = gradmon.Mask(0.25, seed)
        factors = torch.tensor(references.coordinate_weights(problem.model, mask.sample(problem.model)))
        rows = gradmon.per_example_gradients(*arguments, mask=mask)
        estimates.append((rows * factors) @ rows.T)
    found = torch.stack(estimates)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - full).abs() < 4 * error).all())
    assert bool((error < 0.2 * full.diagonal().mean()).all())


@pytest.mark.parametrize("name", ["gradient_coherence", "gradient_rank", "weight_condition", "step_ratio"])
def test_masked_readings_scatter_around_the_full_one(name):
    problem = zoo.named("cnn_group_norm").make()
    full = measured(problem, metrics=name, lr=0.1)[name].value
    found = [measured(problem, metrics=name, lr=0.1, mask=0.5, seed=seed)[name].value for seed in range(40)]
    assert np.std(found) > 0
    assert np.mean(found) == pytest.approx(full, rel=0.1)


# --- rounding ------------------------------------------------------------------------------------------------------

FEW = 4


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("kind", ["krylov", "random", "ascent"])
def test_resolution_is_honest(case, kind, scale):
    options = {
        "krylov": {"metrics": "weight_condition", "weights": weight_samplers.Krylov(scale=scale)},
        "random": {"metrics": "weight_condition", "weights": weight_samplers.Random(n=4, scale=scale)},
        "ascent": {"metrics": "input_condition", "inputs": input_samplers.Ascent(scale=scale)},
    }[kind]
    (low,) = measured(case.make(0, torch.float32), **options).values()
    (high,) = measured(case.make(0, torch.float64), **options).values()
    assert high.resolution < 1e-6
    if math.isnan(low.value):
        assert low.reason.startswith("rounding")
    else:
        assert 0 < low.resolution <= 0.5
        assert abs(low.value / high.value - 1) < FEW * low.resolution
        assert low.scale == pytest.approx(high.scale, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scale_below_the_working_precision_has_no_value(case, dtype):
    scale = torch.finfo(dtype).eps
    samplers = {
        "weight_condition": weight_samplers.Random(n=3, scale=scale),
        "sharpness": weight_samplers.Krylov(scale=scale),
    }
    for (name, sampler), seed in itertools.product(samplers.items(), range(3)):
        found = measured(case.make(seed, dtype), metrics=name, weights=sampler)[name]
        assert math.isnan(found.value)
        assert found.reason.startswith(("rounding", "zero perturbation"))


@pytest.mark.parametrize("derivative", ["finite", "exact"])
def test_half_precision_models_give_no_number_or_a_good_one(case, derivative):
    for seed in range(3):
        problem = case.make(seed, torch.bfloat16)
        twin = copy.deepcopy(problem.model).double()
        batch = map_tensors(problem.batch, lambda t: t.double() if t.is_floating_point() else t)
        names = [name for name in gradmon.METRICS if name not in EXAMPLES or derivative == "finite"]
        options = {"metrics": names, "lr": 0.5, "derivative": derivative}
        found = measured(problem, next_batch=another(problem.batch), **options)
        options["optimizer"] = torch.optim.SGD(twin.parameters(), lr=options.pop("lr"))
        module = None if problem.input_path is not None else problem.input_module
        options |= {"reduction": problem.reduction, "input_module": module, "next_batch": another(batch)}
        true = gradmon.measure(twin, problem.loss, batch, **options)
        for name, reading in found.items():
            if math.isnan(reading.value):
                assert reading.reason, name
            else:
                near = 0.05 if name in RANGES else 1e-3  # what lies between fixed ends may be off by a part of them
                np.testing.assert_allclose(reading.value, true[name].value, rtol=0.1, atol=near, err_msg=name)
