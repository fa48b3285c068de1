"""Passive numbers over examples: what the training's own passes reveal is the truth, or there is no number."""

import contextlib
import copy
import functools
import gc
import math
import random
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradmon
from gradmon import Monitor, Unavailable, every
from gradmon.per_example import Listener
from gradmon.sinks import MemorySink
from tests import references, zoo
from tests.zoo import net, normal

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

NAMES = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence"]
NAMES += ["noise_scale", "noise_ratio", "gradient_snr"]
PARTS = 3

# What cannot be seen from the training's own pass, by the name of the case, and what the reason says.
UNAVAILABLE = {
    "penalty": ".",
    "parameters_used_in_the_loss": ".",
}
INPUT_UNAVAILABLE = {
    "named_tuple_batch": "several forward passes",
    "contrastive": "several forward passes",
    "called_by_its_parts": "several forward passes",
    "parameters_used_in_the_loss": ".",
}


@pytest.fixture(autouse=True)
def seeded():
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed(0)
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    while torch.overrides._get_current_function_mode_stack():  # one failing test shall not fail the next
        torch.overrides._pop_mode()


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@functools.cache
def truth(case):
    """The shares of a case in float64, (B, P)."""
    return references.shares(case.make(0, torch.float64))


def reduced(problem, value):
    return value.sum() if problem.reduction == "sum" else value.mean()


def backward(problem):
    reduced(problem, problem.loss(problem.model, problem.batch)).backward()


def listened(model, batch, run, *, gram=True, moments=True, mask=None, **options):
    """What a listener finds in one forward and backward pass."""
    listener = Listener(model, gram=gram, moments=moments, mask=mask, **options)
    listener.arm()
    try:
        run()
        return listener.collect(batch)
    finally:
        listener.disarm()


def assert_gram(found, H, factors=None):
    expected = references.gram(H, factors)
    assert found.gram.shape == expected.shape
    assert found.gram.dtype == torch.float64
    np.testing.assert_allclose(found.gram.numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def assert_moments(found, H):
    means, variances = H.mean(0), H.var(0, ddof=1)
    size = np.abs(H).max()
    np.testing.assert_allclose(np.ravel(found.means), means, rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(np.ravel(found.variances), variances, rtol=1e-9, atol=1e-12 * size**2)


def masked(model, H, fraction):
    """The kept columns of the shares, and each one's weight."""
    if fraction is None:
        return H, None
    coordinates = gradmon.Mask(fraction, 3).sample(model).numpy()
    return H[:, coordinates], references.coordinate_weights(model, coordinates)


def assert_right(readings, H, *, width=None, factors=None, rtol=1e-10):
    """Every number is that of the shares `H`."""
    noise = references.noise_scale(H, factors)
    expected = {
        "gradient_rank": references.gradient_rank(H, width, factors),
        "gradient_confusion": references.gradient_confusion(H, PARTS, factors),
        "gradient_diversity": references.gradient_diversity(H, PARTS, factors),
        "gradient_coherence": references.gradient_coherence(H, factors),
        "noise_scale": noise,
        "noise_ratio": references.noise_ratio(H, factors),
    }
    largest = np.abs(H).max(0)
    if not np.any((largest > 0) & (largest < 1e-12 * largest.max())):  # what cancels to rounding has no ratio
        expected["gradient_snr"] = references.gradient_snr(H)
    for name, value in expected.items():
        found = readings[name]
        assert found.reason is None or math.isinf(found.value), f"{name}: {found.reason}"
        loose = 10 * rtol if name == "gradient_snr" else rtol
        if name.startswith("noise") and math.isfinite(noise):  # a difference of two numbers of nearly the same size
            loose *= 1 + noise / len(H)
        np.testing.assert_allclose(found.value, value, rtol=loose, atol=1e-12, err_msg=name)


def assert_silent(readings, match=".", names=NAMES):
    """There is no number, and every reading says why."""
    for name in names:
        found = readings[name]
        assert math.isnan(found.value), f"{name}: {found.value}"
        assert isinstance(found.reason, str)
        assert re.search(match, found.reason), found.reason


def assert_right_or_silent(readings, H, **options):
    if all(math.isnan(readings[name].value) for name in NAMES):
        assert_silent(readings)
    else:
        assert_right(readings, H, **options)


TWINS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def watching(model, optimizer, **options):
    if model not in TWINS:  # the truth is found on a model that nobody listens to
        TWINS[model] = copy.deepcopy(model)
    options = {"metrics": NAMES, "schedule": every(1), "mask": None, "micro_batches": PARTS, **options}
    return Monitor(model, optimizer, **options)


def sgd(model, lr=0.3):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))]
GLOBAL = [name for name in vars(nn.modules.module) if name.startswith("_global_") and "hooks" in name]


def attached(model):
    """Everything that watches a model, or every model, at this moment."""
    saved = torch._C._autograd._top_saved_tensors_default_hooks
    return {
        "modules": [
            (name, type(module).__name__, sorted(vars(module)), [list(getattr(module, kind)) for kind in HOOKS])
            for name, module in model.named_modules()
        ],
        "parameters": [
            (name, type(p), list(p._backward_hooks or {}), list(p._post_accumulate_grad_hooks or {}))
            for name, p in model.named_parameters()
        ],
        "everywhere": [list(getattr(nn.modules.module, kind)) for kind in GLOBAL],
        "functions": len(torch.overrides._get_current_function_mode_stack()),
        "dispatch": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        "saved": saved(True),
        "patched": [
            F.linear,
            torch.matmul,
            nn.Module.__call__,
            Tensor.backward,
            Tensor.__matmul__,
            torch.autograd.grad,
        ],
    }


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(*sizes, dtype=torch.float64):
    """One regression batch for each size."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for size in sizes:
        x = torch.randn(size, 3, generator=generator).to(dtype)
        made.append((x, torch.randn(size, 2, generator=generator).to(dtype)))
    return made


def shares(model, batch, loss=mse):
    """The shares of a mean over examples that do not meet, at the weights of now."""
    twin = TWINS.get(model, model)
    if twin is not model:
        twin.load_state_dict(model.state_dict())
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.requires_grad_(other.requires_grad)
    return references.shares(zoo.averaged_problem(twin, loss, batch))


def ordinary_step(model, optimizer, monitor, batch, loss=mse):
    """One step, of which every number must be right."""
    H = shares(model, batch, loss)
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    assert_right(monitor.readings, H)


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- every model of the zoo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [None, 0.2])
@by_name(zoo.CASES)
def test_listener_finds_the_gram_matrix_and_the_moments(case, fraction):
    problem = case.make(0, torch.float64)
    H, factors = masked(problem.model, truth(case), fraction)
    mask = None if fraction is None else gradmon.Mask(fraction, 3)
    before = attached(problem.model)
    if case.name in UNAVAILABLE:
        with pytest.raises(Unavailable, match=UNAVAILABLE[case.name]):
            listened(problem.model, problem.batch, lambda: backward(problem), mask=mask)
    else:
        found = listened(problem.model, problem.batch, lambda: backward(problem), mask=mask)
        assert_gram(found, H, factors)
        assert_moments(found, H)
    assert attached(problem.model) == before


READ = [(case, (0.2, None)[place % 2]) for place, case in enumerate(zoo.CASES)]


@pytest.mark.parametrize(("case", "fraction"), READ, ids=[case.name for case, _ in READ])
def test_readings(case, fraction):
    problem = case.make(0, torch.float64)
    H, factors = masked(problem.model, truth(case), fraction)
    optimizer = sgd(problem.model)
    mask = None if fraction is None else gradmon.Mask(fraction, 3)
    monitor = watching(problem.model, optimizer, mask=mask)
    backward(problem)
    optimizer.step()
    monitor.step(problem.batch)
    assert not monitor.failures
    if case.name in UNAVAILABLE:
        assert_silent(monitor.readings, UNAVAILABLE[case.name])
        return
    assert_right(monitor.readings, H, width=truth(case).shape[1], factors=factors)
    assert set(monitor.coverage) == {name for name, p in problem.model.named_parameters() if p.requires_grad}
    assert all(isinstance(way, str) and 0 < len(way) < 60 for way in monitor.coverage.values())


@by_name([case for case in zoo.CASES if case.name != "tied_autoencoder"])  # the target's way is outside the model
def test_input_gradient_rank_is_that_of_the_active_mode(case):
    problem = case.make(0, torch.float64)
    G = references.input_gradients(problem)
    module = problem.input_module if problem.input_path is None else None
    optimizer = sgd(problem.model)
    monitor = watching(problem.model, optimizer, metrics=["input_gradient_rank"], input_module=module)
    tensors = []
    zoo._map(problem.batch, lambda t: tensors.append((t, t._version)) or t)
    backward(problem)
    optimizer.step()
    monitor.step(problem.batch)
    found = monitor.readings["input_gradient_rank"]
    if case.name in INPUT_UNAVAILABLE:
        assert_silent(monitor.readings, INPUT_UNAVAILABLE[case.name], ["input_gradient_rank"])
    elif not G.any():
        assert_silent(monitor.readings, "zero gradient", ["input_gradient_rank"])
    else:
        assert found.reason is None
        np.testing.assert_allclose(found.value, references.input_gradient_rank(G), rtol=1e-9)
    assert all(t._version == version and not t.requires_grad and t.grad is None for t, version in tensors)
    assert not monitor.failures


@by_name(zoo.HARD_CASES)
def test_rows_that_cannot_be_followed_give_no_wrong_number(case):
    problem = case.make(0, torch.float64)
    H = truth(case)
    h = references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction)
    np.testing.assert_allclose(H.mean(0), h, rtol=1e-10, atol=1e-12 * np.abs(h).max())
    optimizer = sgd(problem.model)
    monitor = watching(problem.model, optimizer)
    backward(problem)
    optimizer.step()
    monitor.step(problem.batch)
    assert_right_or_silent(monitor.readings, H)
    assert not monitor.failures


@by_name(zoo.HARD_CASES)
def test_rows_that_cannot_be_followed_give_no_wrong_number_in_active_mode_either(case):
    problem = case.make(0, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    readings = gradmon.measure(*arguments, metrics=NAMES, micro_batches=PARTS, reduction=problem.reduction)
    assert_right_or_silent(readings, truth(case), rtol=1e-9)


@by_name(zoo.SINGLE_CASES)
def test_batch_of_one(case):
    problem = case.make(0, torch.float64)
    optimizer = sgd(problem.model)
    monitor = watching(problem.model, optimizer)
    backward(problem)
    optimizer.step()
    monitor.step(problem.batch)
    assert_silent(monitor.readings, "batch of one")
    assert not monitor.failures


@by_name(zoo.DROPOUT_CASES)
def test_shares_are_those_of_the_pass_with_its_own_random_numbers(case):
    problem = case.make(0, torch.float64)
    twin = copy.deepcopy(problem.model)
    seed(7)
    terms = F.cross_entropy(twin(problem.batch[0]), problem.batch[1], reduction="none")
    rows = []
    for term in terms:
        grads = torch.autograd.grad(term, references.trainable(twin), retain_graph=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy())
    seed(7)
    found = listened(problem.model, problem.batch, lambda: backward(problem))
    assert_gram(found, np.stack(rows))
    assert_moments(found, np.stack(rows))


# --- not a bit of the training changes -----------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def trained(case, optimizer_name, monitored, metrics=NAMES):
    """Everything that a training of six steps leaves behind."""
    problem = case.make(0, torch.float32)
    seed(5)
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[optimizer_name](parameters)
    before, values = attached(problem.model), []
    monitor = watching(problem.model, optimizer, metrics=metrics) if monitored else None
    for step in range(6):
        batch = zoo._map(problem.batch, lambda t, step=step: t.roll(step, 0))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        value = reduced(problem, problem.loss(problem.model, batch))
        value.backward()
        optimizer.step()
        values.append(value.detach())
        if monitor is not None:
            monitor.step(batch)
            assert not monitor.failures
    if monitor is not None:
        assert all(monitor.readings[name].step == 6 for name in metrics)
        monitor.close()
        assert attached(problem.model) == before
    return {
        "values": values,
        "state": dict(problem.model.state_dict()),
        "grads": {name: p.grad for name, p in problem.model.named_parameters()},
        "versions": [p._version for p in problem.model.parameters()],
        "leaves": [(p.is_leaf, p.requires_grad) for p in problem.model.parameters()],
        "optimizer": optimizer.state_dict(),
        "modes": [module.training for module in problem.model.modules()],
        "random": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), random.getstate()],
    }


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert (a.dtype, a.layout) == (b.dtype, b.layout), where
        a, b = a.to_dense(), b.to_dense()
        assert torch.equal(a, b) or (a.isnan().any() and torch.equal(a.isnan(), b.isnan())), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{where}.{place}")
    else:
        assert a == b, where


ALL_CASES = [*zoo.CASES, *zoo.HARD_CASES, *zoo.SINGLE_CASES, *zoo.DROPOUT_CASES]


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(case, [*OPTIMIZERS][place % len(OPTIMIZERS)]) for place, case in enumerate(ALL_CASES)],
    ids=[case.name for case in ALL_CASES],
)
def test_training_is_the_same_to_the_last_bit(case, optimizer):
    assert_identical(trained(case, optimizer, True), trained(case, optimizer, False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@by_name([zoo.batch_norm_cnn, zoo.dropout_transformer, zoo.tied_language_model])
def test_training_is_the_same_to_the_last_bit_with_every_optimizer_and_input_gradients(case, optimizer):
    metrics = [*NAMES, "input_gradient_rank", "grad_norm", "update_ratio"]
    assert_identical(trained(case, optimizer, True, metrics), trained(case, optimizer, False))


# --- ways to train, after each of which the numbers are right ------------------------------------------------------


def test_a_training_with_a_smaller_last_batch():
    model, sink, batches = mlp(), MemorySink(), data(6, 6, 6, 4, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    monitor = watching(model, optimizer, sinks=[sink])
    for batch in batches:
        ordinary_step(model, optimizer, monitor, batch)
    assert [reading.step for reading in sink.readings if reading.name == "noise_scale"] == [1, 2, 3, 4, 5]
    assert not monitor.failures


def test_lengths_that_change_from_batch_to_batch():
    torch.manual_seed(1)
    parts = {"embed": nn.Embedding(7, 3), "rnn": nn.GRU(3, 3, batch_first=True), "head": nn.Linear(3, 3)}
    model = net(lambda m, t: m.head(m.rnn(m.embed(t))[0].mean(1)), **parts).double()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for length in (4, 7, 5, 1, 2):  # 5: as many as examples
        batch = (torch.randint(7, (5, length)), torch.randint(3, (5,)))
        ordinary_step(model, optimizer, monitor, batch, zoo.classify)
    assert not monitor.failures


def test_one_listener_listens_again_and_again():
    model = mlp()
    listener = Listener(model, gram=True, moments=True, mask=None)
    for batch in data(6, 4, 6):
        model.zero_grad()
        listener.arm()
        mse(model, batch).backward()
        found = listener.collect(batch)
        listener.disarm()
        H = shares(model, batch)
        assert_gram(found, H)
        assert_moments(found, H)
        mse(model, batch).backward()  # not listened to


def test_batch_that_is_not_told():
    model, (batch,) = mlp(), data(6)
    assert_gram(listened(model, None, lambda: mse(model, batch).backward()), shares(model, batch))
    model.zero_grad()
    listener = Listener(model, gram=True, moments=False, mask=None)
    listener.arm()
    mse(model, batch).backward()
    found = listener.collect()
    listener.disarm()
    assert_gram(found, shares(model, batch))


@pytest.mark.parametrize("forward", [False, True])
def test_without_a_backward_pass_there_is_nothing_to_collect(forward):
    model, (batch,) = mlp(), data(6)
    with pytest.raises(Unavailable, match=r"."):
        listened(model, batch, lambda: mse(model, batch) if forward else None)


GIVEN = {
    "last": lambda batches: batches[-1],
    "list": list,
    "tuple": tuple,
    "whole": lambda batches: tuple(torch.cat(parts) for parts in zip(*batches, strict=True)),
}


def accumulated_shares(model, batches, factor, loss=mse):
    """The shares of the sum of the micro-batches' gradients, in the order in which they come."""
    total = sum(len(batch[0]) for batch in batches)
    return np.concatenate([shares(model, batch, loss) * (factor * total / len(batch[0])) for batch in batches])


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (2, 2, 2), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("given", GIVEN)
def test_accumulated_micro_batches_are_one_batch(sizes, divided, given):
    model, batches = mlp(), data(*sizes)
    factor = 1 / len(sizes) if divided else 1.0
    H = accumulated_shares(model, batches, factor)

    def run():
        for batch in batches:
            (mse(model, batch) * factor).backward()

    found = listened(model, GIVEN[given](batches), run)
    assert_gram(found, H)
    assert_moments(found, H)
    model.zero_grad()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    run()
    optimizer.step()
    monitor.step(GIVEN[given](batches))
    assert_right(monitor.readings, H)
    assert monitor.readings["noise_ratio"].value == pytest.approx(monitor.readings["noise_scale"].value / len(H))
    assert not monitor.failures


def test_accumulation_under_a_sparse_schedule():
    model, sink = mlp(), MemorySink()
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(2), sinks=[sink])
    for number in range(1, 5):
        batches = data(4, 4)
        H = accumulated_shares(model, batches, 0.5)
        optimizer.zero_grad()
        for batch in batches:
            (mse(model, batch) * 0.5).backward()
        optimizer.step()
        monitor.step(batches[-1])
        if number % 2 == 0:
            assert_right(monitor.readings, H)
    assert [reading.step for reading in sink.readings if reading.name == "gradient_rank"] == [2, 4]


def siamese(model, batch):
    left, right, distance = batch
    return ((model(left) - model(right)).square().sum(1) - distance).square().mean()


def pairs(*sizes):
    return [(a[0], b[0], a[1][:, 0]) for a, b in zip(data(*sizes), data(*sizes)[::-1], strict=True)]


@pytest.mark.parametrize("given", GIVEN)
def test_accumulation_of_passes_with_two_calls_each(given):
    model, batches = mlp(), pairs(4, 4)
    batches = [(left, right + number, gap) for number, (left, right, gap) in enumerate(batches, 1)]
    H = accumulated_shares(model, batches, 1.0, siamese)

    def run():
        for batch in batches:
            siamese(model, batch).backward()

    if given != "whole":
        assert_gram(listened(model, GIVEN[given](batches), run), H)
        return
    with contextlib.suppress(Unavailable):  # the two calls of one pass hold as many rows as this batch has examples
        assert_gram(listened(model, GIVEN[given](batches), run), H)


@pytest.mark.parametrize("first", [4, 6])
def test_calls_that_hold_different_examples(first):
    def loss(model, batch):
        x, y = batch
        return F.mse_loss(torch.cat([model(x[:first]), model(x[first:])]), y)

    model, (batch,) = mlp(), data(8)
    found = listened(model, batch, lambda: loss(model, batch).backward())
    assert_gram(found, shares(model, batch))


def test_calls_that_hold_the_same_examples():
    model, (x, y) = mlp(), data(4)[0]
    batch = (x, x.flip(1).clone(), y[:, 0])
    found = listened(model, batch, lambda: siamese(model, batch).backward())
    assert_gram(found, shares(model, batch, siamese))


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_calls_that_do_not_fit_the_batch(size):
    model, (x, y) = mlp(), data(8)[0]

    def run():
        F.mse_loss(torch.cat([model(x[:4]), model(x[4:])]), y).backward()

    with pytest.raises(Unavailable, match=r"."):
        listened(model, data(size)[0], run)


def test_examples_left_out_of_the_loss_have_no_share():
    model, (x, y) = mlp(), data(6)[0]
    kept = torch.tensor([0, 2, 5])
    H = np.zeros((6, 26))
    H[kept] = 2 * shares(model, (x[kept], y[kept]))
    found = listened(model, (x, y), lambda: F.mse_loss(model(x)[kept], y[kept]).backward())
    assert_gram(found, H)


# --- mixed precision -----------------------------------------------------------------------------------------------


def mixed(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch[0])
    return F.mse_loss(out.float(), batch[1])


@pytest.mark.parametrize("scale", [None, 1.0, 2.0**16])
@pytest.mark.parametrize("unscaled", [False, True])
def test_mixed_precision(scale, unscaled):
    model, batches = mlp(torch.float32), data(8, 8, 8, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if scale is None else scale, enabled=scale is not None)
    monitor = watching(model, optimizer)
    for batch in batches:
        H = shares(model, batch, mixed)
        optimizer.zero_grad()
        scaler.scale(mixed(model, batch)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        monitor.step(batch)
        assert_right(monitor.readings, H, rtol=0.02)
    assert not monitor.failures


def test_scale_of_the_loss_cancels():
    found = []
    for scale in (2.0**-100, 1.0, 2.0**100):
        model, (batch,) = mlp(), data(6)
        optimizer = sgd(model, lr=0.1 / scale)
        monitor = watching(model, optimizer)
        (mse(model, batch) * scale).backward()
        optimizer.step()
        monitor.step(batch)
        found.append([monitor.readings[name].value for name in NAMES])
    assert not np.isnan(found).any()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-12)


def test_step_that_the_scaler_skips():
    model, batches = mlp(torch.float32), data(6, 6, 6, dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = watching(model, optimizer)
    for number, batch in enumerate(batches):
        H = shares(model, batch)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(mse(model, batch) * (math.inf if number == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(batch)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) == (number == 1)
        if number == 1:
            assert_silent(monitor.readings)
        else:
            assert_right(monitor.readings, H, rtol=1e-4)
    assert not monitor.failures


def test_gradient_that_is_not_finite():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model, lr=0.0)
    monitor = watching(model, optimizer)
    (mse(model, batches[0]) * math.nan).backward()
    optimizer.step()
    monitor.step(batches[0])
    assert_silent(monitor.readings, "non-finite gradient")
    fresh = mlp()
    model.load_state_dict(fresh.state_dict())
    ordinary_step(model, optimizer, monitor, batches[1])
    assert not monitor.failures


def test_gradient_that_is_zero():
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    (mse(model, batch) * 0.0).backward()
    optimizer.step()
    monitor.step(batch)
    assert_silent(monitor.readings, "zero gradient", ["noise_scale", "noise_ratio", "gradient_rank"])
    ordinary_step(model, optimizer, monitor, batch)
    assert not monitor.failures


# --- checkpointing -------------------------------------------------------------------------------------------------


def outside(model, x):
    return checkpoint(model, x, use_reentrant=False)


def in_segments(model, x):
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


def nested(model, x):
    def inner(x):
        return model[1](model[0](x))

    def outer(x):
        return model[2](checkpoint(inner, x, use_reentrant=False))

    return checkpoint(outer, x, use_reentrant=False)


def to_the_end(model, x):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def each_layer(model, x):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("call", [outside, in_segments, nested, to_the_end, each_layer])
def test_checkpointing(call):
    def loss(model, batch):
        return F.mse_loss(call(model, batch[0]), batch[1])

    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 5):
        ordinary_step(model, optimizer, monitor, batch, loss)
    batches = data(3, 3)
    H = accumulated_shares(model, batches, 1.0)
    optimizer.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    optimizer.step()
    monitor.step(batches)
    assert_right(monitor.readings, H)
    assert not monitor.failures


# --- what happens in between ---------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Raises when told to, in the forward or in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and not self.late:
            raise self.error
        if self.error is not None:
            x = x * 1.0
            x.register_hook(self.explode)
        return x

    def explode(self, grad: Tensor) -> None:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["forward", "between", "backward"])
def test_step_after_an_exception_is_right(error, place):
    fragile, batches = Fragile(), data(6, 6, 6, 5)
    model = nn.Sequential(*mlp()[:2], fragile, mlp()[2])
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=lambda step: step in (1, 2))
    ordinary_step(model, optimizer, monitor, batches[0])
    if place != "between":
        fragile.error, fragile.late = error, place == "backward"

    def failing_step():
        value = mse(model, batches[1])
        if place == "between":
            raise error
        value.backward()

    with pytest.raises(type(error)):
        failing_step()
    fragile.error = None
    if not (place == "forward" and isinstance(error, KeyboardInterrupt)):  # of which torch tells no hook
        assert attached(model)["functions"] == attached(model)["dispatch"] == 0
    H = shares(model, batches[2])
    optimizer.zero_grad()
    mse(model, batches[2]).backward()
    optimizer.step()
    monitor.step(batches[2])
    if place == "backward":  # nothing tells that what was seen of the first pass is not part of the step
        assert_right_or_silent(monitor.readings, H)
    else:
        assert_right(monitor.readings, H)
    assert attached(model) == clean
    assert not monitor.failures


def test_pass_whose_gradient_is_thrown_away_is_no_part_of_the_step():
    model, batches = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    mse(model, batches[0]).backward()
    optimizer.zero_grad()
    H = shares(model, batches[1])
    mse(model, batches[1]).backward()
    optimizer.step()
    monitor.step(batches[1])
    assert_right_or_silent(monitor.readings, H)
    ordinary_step(model, optimizer, monitor, batches[2])
    assert not monitor.failures


@contextlib.contextmanager
def graph_that_is_never_used():
    yield


KINDS = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "unused_graph": graph_that_is_never_used}
GAPS = ["forward", "backward", "optimizer", "monitor"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("which", ["other", "smaller", "same"])
def test_evaluation_in_between(kind, gap, which):
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    kept = []

    def evaluate(place, x):
        if place == gap:
            model.eval()
            with KINDS[kind]():
                kept.append(model(x))
            model.train()

    for batch in batches:
        other = {"other": data(6, 6)[1][0].flip(0), "smaller": data(4)[0][0], "same": batch[0]}[which]
        H = shares(model, batch)
        optimizer.zero_grad()
        evaluate("forward", other)
        value = mse(model, batch)
        evaluate("backward", other)
        value.backward()
        evaluate("optimizer", other)
        optimizer.step()
        evaluate("monitor", other)
        monitor.step(batch)
        assert_right(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_zero_grad(set_to_none, place):
    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6, 5):
        H = shares(model, batch)
        if place == "first":
            optimizer.zero_grad(set_to_none=set_to_none)
        value = mse(model, batch)
        if place == "middle":
            optimizer.zero_grad(set_to_none=set_to_none)
        value.backward()
        optimizer.step()
        if place == "last":
            optimizer.zero_grad(set_to_none=set_to_none)
        monitor.step(batch)
        assert_right(monitor.readings, H)


@pytest.mark.parametrize(
    "clip", [lambda p: nn.utils.clip_grad_norm_(p, 1e-3), lambda p: nn.utils.clip_grad_value_(p, 1e-3)]
)
def test_clipping(clip):
    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6):
        H = shares(model, batch)
        optimizer.zero_grad()
        mse(model, batch).backward()
        clip(model.parameters())
        optimizer.step()
        monitor.step(batch)
        assert_right(monitor.readings, H)


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_closures(kind):
    results = []
    for monitored in (False, True):
        model = mlp()
        make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3)}
        optimizer = make[kind](model.parameters())
        monitor = watching(model, optimizer) if monitored else None
        for batch in data(6, 6, 6):

            def closure(batch=batch, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = mse(model, batch)
                value.backward()
                return value

            H = shares(model, batch)
            optimizer.step(closure)
            if monitor is not None:
                monitor.step(batch)
                assert_right_or_silent(monitor.readings, H)
                assert not monitor.failures
        results.append(model)
    assert same_weights(*results)


def test_skipped_step_shows_no_wrong_number():
    model, batches = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    ordinary_step(model, optimizer, monitor, batches[0])
    H = shares(model, batches[1])
    optimizer.zero_grad()
    mse(model, batches[1]).backward()
    monitor.step(batches[1])
    assert monitor.readings["noise_scale"].step == 2
    assert_right_or_silent(monitor.readings, H)
    ordinary_step(model, optimizer, monitor, batches[2])
    assert not monitor.failures


def test_step_without_a_pass_shows_no_number():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    ordinary_step(model, optimizer, monitor, batches[0])
    optimizer.step()
    monitor.step(batches[0])
    assert_silent(monitor.readings)
    optimizer.zero_grad()
    ordinary_step(model, optimizer, monitor, batches[1])


@pytest.mark.parametrize("seen", ["nothing", "half"])
def test_forward_pass_from_before_the_monitor_gives_no_wrong_number(seen):
    model, (batch, other, last) = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    early = mse(model, batch)
    monitor = watching(model, optimizer)
    value = early if seen == "nothing" else early + mse(model, other)
    value.backward()
    optimizer.step()
    monitor.step(batch)
    assert_silent(monitor.readings)
    ordinary_step(model, optimizer, monitor, last)
    assert not monitor.failures


# --- when nothing may be attached ----------------------------------------------------------------------------------


class Look(nn.Module):
    """Notes what is attached to a model while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.look: Callable[[], Any] = dict

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.look())
        return x


def test_nothing_is_attached_in_steps_that_are_not_scheduled():
    look = Look()
    model = nn.Sequential(mlp()[0], look, *mlp()[1:])
    look.look = lambda: attached(model)
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(3))
    assert attached(model) == clean
    for number, batch in enumerate(data(6, 6, 6, 6, 6, 6, 6), 1):
        due = number % 3 == 0
        H = shares(model, batch)
        look.seen.clear()
        optimizer.zero_grad()
        value = mse(model, batch)
        look.seen.append(attached(model))
        value.backward()
        look.seen.append(attached(model))
        optimizer.step()
        look.seen.append(attached(model))
        monitor.step(batch)
        if due:
            assert_right(monitor.readings, H)
        else:
            assert all(seen == clean for seen in look.seen)
        if (number + 1) % 3:
            assert attached(model) == clean
    assert monitor.readings["noise_scale"].step == 6
    monitor.close()
    assert attached(model) == clean
    assert not monitor.failures


@pytest.mark.parametrize("place", ["start", "in_forward", "after_forward", "in_backward", "after_backward", "end"])
def test_close_in_the_middle(place):
    results = []
    for monitored in (False, True):
        look, (batch, other) = Look(), data(6, 6)
        model = nn.Sequential(mlp()[0], look, *mlp()[1:])
        clean = attached(model)
        optimizer = sgd(model)
        monitor = watching(model, optimizer) if monitored else None

        def close(now, monitor=monitor, model=model, clean=clean):
            if now == place and monitor is not None:
                monitor.close()
                if not now.startswith("in"):
                    assert attached(model) == clean

        close("start")
        look.look = lambda close=close: close("in_forward")
        out = model(batch[0])
        out.register_hook(lambda grad, close=close: close("in_backward"))
        value = F.mse_loss(out, batch[1])
        close("after_forward")
        value.backward()
        close("after_backward")
        optimizer.step()
        close("end")
        look.look = dict
        for step in (batch, other):
            if monitor is not None:
                monitor.step(step)
                assert attached(model) == clean
                assert not monitor.failures
            optimizer.zero_grad()
            mse(model, step).backward()
            optimizer.step()
        assert monitor is None or not set(NAMES) & set(monitor.readings)
        results.append(model)
    assert same_weights(*results)


def test_disabled(monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    look = Look()
    model = nn.Sequential(mlp()[0], look, *mlp()[1:])
    look.look = lambda: attached(model)
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    assert all(seen == clean for seen in look.seen)
    assert monitor.readings == {}
    assert monitor.coverage == {}


def test_what_a_step_has_seen_is_let_go():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    alive = []
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(args[0])))
    for batch in batches:
        ordinary_step(model, optimizer, monitor, batch)
    del alive[: len(alive) - 2]  # those of the last step's own pass
    gc.collect()
    assert len(alive) == 2
    assert [ref() for ref in alive] == [None, None]


def test_resumed_run_listens_to_the_step_that_is_due():
    model, batches = mlp(), data(6, 6, 6, 6)
    optimizer = sgd(model)
    first = watching(model, optimizer, schedule=every(3))
    for batch in batches[:2]:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        first.step(batch)
    state = first.state_dict()
    first.close()
    second = watching(model, optimizer, schedule=every(3))
    second.load_state_dict(state)
    ordinary_step(model, optimizer, second, batches[2])
    assert second.steps == 3
    assert not second.failures


def test_two_monitors_on_one_model():
    model, (batch, other) = mlp(), data(6, 6)
    clean = attached(model)
    optimizer = sgd(model)
    one, two = watching(model, optimizer), watching(model, optimizer, schedule=every(2), mask=gradmon.Mask(0.5, 3))
    for step in (batch, other):
        H = shares(model, step)
        optimizer.zero_grad()
        mse(model, step).backward()
        optimizer.step()
        one.step(step)
        two.step(step)
        assert_right(one.readings, H)
    kept, factors = masked(model, H, 0.5)
    assert_right(two.readings, kept, width=H.shape[1], factors=factors)
    one.close()
    two.close()
    assert attached(model) == clean


def test_coverage_names_the_way_of_every_parameter():
    def forward(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
        x = m.conv(x).flatten(1) * m.gain + m.table(tokens)
        return m.head(m.cell(torch.tanh(x)))

    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(1, 2, 2), "gain": normal(8), "table": nn.Embedding(5, 8), "cell": nn.Linear(8, 4)}
    model = net(forward, head=nn.Linear(4, 3), never=nn.Linear(2, 2), **parts).double()
    model.head.bias.requires_grad_(False)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    batch = (torch.randn(4, 1, 3, 3).double(), torch.randint(5, (4,)), torch.randint(3, (4,)))
    ordinary_step(model, optimizer, monitor, batch, zoo.classify)
    ways = monitor.coverage
    assert set(ways) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert ways["conv.weight"] == "conv2d"
    assert ways["cell.weight"] == ways["head.weight"] == "linear"
    assert ways["never.weight"] == ways["never.bias"] == "unused"
    assert all(ways.values())


# --- where the examples lie ----------------------------------------------------------------------------------------


def time_first():
    torch.manual_seed(1)
    return net(lambda m, x: m.head(m.rnn(x)[0]).mean(0), rnn=nn.RNN(3, 4), head=nn.Linear(4, 3)).double()


def transposed(model, batch):
    """The loss of a batch whose examples lie along axis 0, on a model that wants them along axis 1."""
    return F.cross_entropy(model(batch[0].transpose(0, 1)), batch[1])


def sequences(length):
    return torch.randn(5, length, 3, dtype=torch.float64), torch.randint(3, (5,))


@pytest.mark.parametrize("length", [4, 5, 7])
@pytest.mark.parametrize("told", ["time_first", "batch_first"])
def test_examples_along_dimension_one(length, told):
    model, batch = time_first(), sequences(length)
    H = shares(model, batch, transposed)
    given = (batch[0].transpose(0, 1).contiguous(), batch[1]) if told == "time_first" else batch

    def run():
        F.cross_entropy(model(batch[0].transpose(0, 1)), batch[1]).backward()

    assert_gram(listened(model, given, run, example_dim=1), H)
    model.zero_grad()
    optimizer = sgd(model)
    monitor = watching(model, optimizer, example_dim=1)
    run()
    optimizer.step()
    monitor.step(given)
    assert_right(monitor.readings, H)


@pytest.mark.parametrize("length", [4, 5, 7])
def test_examples_along_dimension_one_that_nobody_tells_of(length):
    model, batch = time_first(), sequences(length)
    H = shares(model, batch, transposed)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    transposed(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    if length == 5:
        assert_silent(monitor.readings)
    else:
        assert_right_or_silent(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("example_dim", [None, 0])
def test_square_input_that_is_no_tensor_of_the_batch(example_dim):
    def loss(model, batch):
        return F.mse_loss(model(2 * batch[0]), batch[1])

    model, (batch,) = mlp(), data(3)
    options = {} if example_dim is None else {"example_dim": example_dim}
    for run, given in ((lambda: loss(model, batch).backward(), batch), (lambda: mse(model, batch).backward(), None)):
        model.zero_grad()
        if example_dim is None:
            with pytest.raises(Unavailable, match=r"."):
                listened(model, given, run, **options)
        else:
            H = shares(model, batch, loss if given is not None else mse)
            assert_gram(listened(model, given, run, **options), H)


def test_square_input_that_equals_a_tensor_of_the_batch():
    model, (batch,) = mlp(), data(3)
    same = (batch[0].clone(), batch[1])
    assert_gram(listened(model, same, lambda: mse(model, batch).backward()), shares(model, batch))


# --- other ways to train: right, or no number; and the training goes on as it would --------------------------------


class Scene(NamedTuple):
    """A way to train: `train(model, batch)` makes a gradient, the sum of the shares is that gradient."""

    model: nn.Module
    batch: Any
    train: Callable[[nn.Module, Any], None]
    shares: np.ndarray
    loss: Callable[[nn.Module, Any], Tensor] = mse
    watched: nn.Module | None = None


def plain(loss):
    return lambda model, batch: loss(model, batch).backward()


def scene(model, loss, batch=None, train=None, **more):
    batch = data(6)[0] if batch is None else batch
    return Scene(model, batch, train or plain(loss), shares(model, batch, loss), loss, **more)


class Keywords(nn.Module):
    """Takes its tensors by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, *, scale: float, inputs: Tensor) -> Tensor:
        return self.body(inputs) * scale


def keyword_arguments():
    return scene(Keywords(), lambda model, batch: F.mse_loss(model(scale=2.0, inputs=batch[0]), batch[1]))


def user_hook_that_changes_the_output():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: 2 * out.square())
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor([1.0, 2.0, 3.0, 4.0]),))
    return scene(model, mse)


def user_full_backward_hooks():
    model = mlp()
    for module in model[1:]:  # the first one's input has no gradient, of which torch warns
        module.register_full_backward_hook(lambda module, grads, outs: None)
    return scene(model, mse)


def user_hooks_that_change_gradients():
    model = mlp()
    model[2].register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))
    model[1].register_full_backward_pre_hook(lambda module, grads: (3 * grads[0],))
    made = scene(mlp(), mse)
    made.shares[:, :16] *= 6
    made.shares[:, 16:] *= 2
    return made._replace(model=model)


def gradient_given_to_backward():
    def train(model, batch):
        out = model(batch[0])
        out.backward((out.detach() - batch[1]) * (2 / out.numel()))

    return scene(mlp(), mse, train=train)


def two_losses_at_once():
    def train(model, batch):
        out = model(batch[0])
        first = F.mse_loss(out[:, 0], batch[1][:, 0])
        torch.autograd.backward([first, F.mse_loss(out[:, 1], batch[1][:, 1])], [torch.tensor(0.5).double()] * 2)

    return scene(mlp(), mse, train=train)


def retained_graph():
    return scene(mlp(), mse, train=lambda model, batch: mse(model, batch).backward(retain_graph=True))


def anomaly_detection():
    def train(model, batch):
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            mse(model, batch).backward()

    return scene(mlp(), mse, train=train)


def part_of_a_model():
    torch.manual_seed(3)
    body, head = mlp(), nn.Linear(2, 2).double()
    whole = nn.Sequential(body, head)
    made = scene(whole, mse, watched=body)
    return made._replace(shares=made.shares[:, : sum(p.numel() for p in body.parameters())])


def batch_in_a_dict_of_lists():
    def loss(model, batch):
        return F.mse_loss(model(batch["inputs"][0]), batch["labels"])

    x, y = data(6)[0]
    return scene(mlp(), loss, {"id": "seven", "labels": y, "inputs": [x]})


def two_dtypes():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.body(x.float())).double())

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2).double())
    return scene(model, mse)


def weights_that_were_loaded():
    model = mlp()
    model.load_state_dict({name: value.flip(0) for name, value in mlp().state_dict().items()}, assign=True)
    return scene(model, mse)


def sparse_embedding():
    torch.manual_seed(1)
    model = net(lambda m, t: m.head(m.embed(t).flatten(1)), embed=nn.Embedding(5, 2, sparse=True), head=nn.Linear(6, 3))
    model = model.double()
    twin = copy.deepcopy(model)
    twin.embed.sparse = False
    batch = (torch.randint(5, (6, 3)), torch.randint(3, (6,)))
    return Scene(model, batch, plain(zoo.classify), shares(twin, batch, zoo.classify), zoo.classify)


def bag_of_offsets():
    torch.manual_seed(1)
    model = net(
        lambda m, t, o: m.head(torch.tanh(m.bag(t, o))), bag=nn.EmbeddingBag(5, 3), head=nn.Linear(3, 3)
    ).double()
    tokens = [torch.tensor(row) for row in ([1, 2, 2], [3], [0, 4], [1, 1, 1, 2])]
    labels = torch.tensor([0, 2, 1, 0])
    rows = []
    for row, label in zip(tokens, labels, strict=True):
        value = F.cross_entropy(model(row, torch.tensor([0])), label[None])
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy())
    batch = (torch.cat(tokens), torch.tensor([0, 3, 4, 6]), labels)
    return Scene(model, batch, plain(zoo.classify), np.stack(rows), zoo.classify)


def embedding_of_bounded_norm():
    torch.manual_seed(1)
    model = net(
        lambda m, t: m.head(m.embed(t).flatten(1)), embed=nn.Embedding(5, 2, max_norm=0.5), head=nn.Linear(6, 3)
    )
    return scene(model.double(), zoo.classify, (torch.randint(5, (6, 3)), torch.randint(3, (6,))))


def one_power_iteration_of_spectral_norm():
    torch.manual_seed(1)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(4, 3))
    return scene(model, mse)


def penalty_outside():
    def loss(model, batch):
        return mse(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())

    return scene(mlp(), loss)


def decay_of_one_weight_inside():
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.mse_loss(m.head(torch.tanh(m.body(x))), x) + 0.1 * m.body.weight.square().sum()

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3)).double()
    return scene(model, lambda model, batch: model(batch[0]))


def head_outside():
    def loss(model, batch):
        return F.mse_loss(F.linear(model.body(batch[0]), model.last), batch[1])

    return scene(net(None, body=mlp(), last=normal(2, 2)).double(), loss)


def penalty_of_the_slope():
    def loss(model, batch):
        x = batch[0].detach().clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, batch[1]) + slope.square().sum(1).mean()

    return scene(mlp(), loss)


def penalty_of_the_gradient():
    def loss(model, batch):
        value = mse(model, batch)
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + 0.1 * sum(grad.square().sum() for grad in grads)

    made = scene(mlp(), mse)
    return made._replace(train=plain(loss), shares=np.full_like(made.shares, math.nan))  # there are no shares


def sharpness_aware():
    """Two passes at two places: the gradient of the second, at moved weights, is the one that is used."""

    def train(model, batch):
        mse(model, batch).backward()
        with torch.no_grad():
            moves = [0.1 * p.grad for p in model.parameters()]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        model.zero_grad()
        mse(model, batch).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)

    made = scene(mlp(), mse, train=train)
    moved = copy.deepcopy(made.model)
    h = references.batch_gradient(moved, mse, made.batch)
    with torch.no_grad():
        start = 0
        for p in moved.parameters():
            p.add_(0.1 * torch.from_numpy(h[start : start + p.numel()]).view_as(p))
            start += p.numel()
    return made._replace(shares=shares(moved, made.batch))


def backward_in_two_parts():
    def train(model, batch):
        losses = (model(batch[0]) - batch[1]).square().mean(1) / len(batch[0])
        losses[:3].sum().backward(retain_graph=True)
        losses[3:].sum().backward()

    return scene(mlp(), mse, train=train)


def backward_of_two_terms():
    def train(model, batch):
        out = model(batch[0])
        (0.5 * F.mse_loss(out[:, 0], batch[1][:, 0])).backward(retain_graph=True)
        (0.5 * F.mse_loss(out[:, 1], batch[1][:, 1])).backward()

    return scene(mlp(), mse, train=train)


def body_first_then_head():
    """The graph is cut in two, and each half has its own backward pass."""

    def train(model, batch):
        hidden = model[1](model[0](batch[0]))
        leaf = hidden.detach().requires_grad_()
        F.mse_loss(model[2](leaf), batch[1]).backward()
        hidden.backward(leaf.grad)

    return scene(mlp(), mse, train=train)


def reentrant_checkpoint():
    def loss(model, batch):
        hidden = model[0](batch[0])
        return F.mse_loss(checkpoint(nn.Sequential(*model[1:]), hidden, use_reentrant=True), batch[1])

    return scene(mlp(), mse, train=plain(loss))


class Affine(torch.autograd.Function):
    """A Linear layer whose gradients are written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0)


def gradients_by_hand():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(Affine.apply(x, m.weight, m.bias)))

    torch.manual_seed(1)
    return scene(net(forward, weight=normal(4, 3), bias=normal(4), head=nn.Linear(4, 2)).double(), mse)


def user_hook_on_an_activation():
    factors = torch.tensor([[1.0], [0.0], [-2.0], [3.0], [0.5], [1.0]], dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.body(x)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * factors[: len(grad)])
        return m.head(torch.tanh(out))

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    batch = data(6)[0]
    seen = []
    for i in range(6):

        def term(m, x, i=i):
            out = m.body(x)
            out.register_hook(lambda grad, i=i: grad * factors[i])
            return m.head(torch.tanh(out))

        alone = copy.deepcopy(model)
        alone.function = term
        value = mse(alone, (batch[0][i : i + 1], batch[1][i : i + 1]))
        seen.append(references._gradient(value, list(alone.parameters())).numpy())
    return Scene(model, batch, plain(mse), np.stack(seen))


def user_hook_on_a_parameter():
    model = mlp()
    model[0].weight.register_hook(lambda grad: 3 * grad)
    made = scene(mlp(), mse)
    made.shares[:, :12] *= 3
    return made._replace(model=model)


def optimizer_in_the_backward_pass():
    model = mlp()
    made = scene(mlp(), mse)

    @torch.no_grad()
    def descend(p):
        p.sub_(0.5 * p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(descend)
    return made._replace(model=model)


def inputs_that_are_overwritten():
    def train(model, batch):
        x = batch[0].clone()
        F.mse_loss(model(x), batch[1]).backward()
        x.zero_()

    return scene(mlp(), mse, train=train)


def gradients_that_are_assigned():
    def train(model, batch):
        parameters = list(model.parameters())
        for p, grad in zip(parameters, torch.autograd.grad(mse(model, batch), parameters), strict=True):
            p.grad = grad

    return scene(mlp(), mse, train=train)


def gradients_of_tasks_that_are_projected():
    def train(model, batch):
        parameters = list(model.parameters())
        out = model(batch[0])
        losses = [F.mse_loss(out[:, k], batch[1][:, k]) for k in range(2)]
        grads = [torch.autograd.grad(value, parameters, retain_graph=True) for value in losses]
        for p, a, b in zip(parameters, *grads, strict=True):
            p.grad = a - b * ((a * b).sum() / (b * b).sum().clamp_min(1e-30))

    made = scene(mlp(), mse, train=train)
    return made._replace(shares=np.full_like(made.shares, math.nan))


def gradients_of_some_parameters_only():
    def train(model, batch):
        mse(model, batch).backward(inputs=list(model[0].parameters()))

    made = scene(mlp(), mse, train=train)
    made.shares[:, 16:] = 0
    return made


def functional_call():
    def loss(model, batch):
        parameters = {name: p * 1.0 for name, p in model.named_parameters()}
        return F.mse_loss(torch.func.functional_call(model, parameters, (batch[0],)), batch[1])

    return scene(mlp(), loss)


def forward_without_hooks():
    return scene(mlp(), lambda model, batch: F.mse_loss(model.forward(batch[0]), batch[1]))


def copy_of_an_armed_model():
    def train(model, batch):
        teacher = copy.deepcopy(model)
        target = teacher(batch[0].flip(0))
        target.sum().backward()
        out = model(batch[0])
        (F.mse_loss(out, batch[1]) + 0.0 * target.detach().sum()).backward()

    return scene(mlp(), mse, train=train)


def table_before_the_examples():
    def loss(model, batch):
        return F.mse_loss(model(torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]], batch[0]), batch[1])

    def forward(m: Any, table: Tensor, x: Tensor) -> Tensor:
        return m.head(torch.tanh(x @ m.body(table).T))

    torch.manual_seed(1)
    return scene(net(forward, body=nn.Linear(3, 3), head=nn.Linear(4, 2)).double(), loss)


def number_before_the_examples():
    def loss(model, batch):
        return F.mse_loss(model(torch.tensor(0.5), batch[0]), batch[1])

    def forward(m: Any, temperature: Tensor, x: Tensor) -> Tensor:
        return m.body(x) * temperature

    return scene(net(forward, body=mlp()), loss)


def cached_parametrization():
    def loss(model, batch):
        with torch.nn.utils.parametrize.cached():
            return F.mse_loss(model(batch[0]) + model(-batch[0]), batch[1])

    torch.manual_seed(1)
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    return scene(model, loss)


def compiled_model():
    model = mlp()
    return scene(model, mse)._replace(model=torch.compile(model, backend="eager"))


def compiled_call():
    model = mlp()
    call = torch.compile(model, backend="eager")
    return scene(model, mse, train=lambda model, batch: mse(call, batch).backward())


RIGHT = [keyword_arguments, user_hook_that_changes_the_output, user_full_backward_hooks, gradient_given_to_backward]
RIGHT += [two_losses_at_once, retained_graph, anomaly_detection, part_of_a_model, batch_in_a_dict_of_lists, two_dtypes]
RIGHT += [weights_that_were_loaded, one_power_iteration_of_spectral_norm, user_hooks_that_change_gradients]

NEVER_WRONG = [sparse_embedding, bag_of_offsets, embedding_of_bounded_norm, penalty_outside, decay_of_one_weight_inside]
NEVER_WRONG += [head_outside, penalty_of_the_slope, penalty_of_the_gradient, sharpness_aware, backward_in_two_parts]
NEVER_WRONG += [backward_of_two_terms, body_first_then_head, reentrant_checkpoint, gradients_by_hand]
NEVER_WRONG += [user_hook_on_an_activation, user_hook_on_a_parameter, optimizer_in_the_backward_pass]
NEVER_WRONG += [inputs_that_are_overwritten, gradients_that_are_assigned, gradients_of_tasks_that_are_projected]
NEVER_WRONG += [gradients_of_some_parameters_only, functional_call, forward_without_hooks, copy_of_an_armed_model]
NEVER_WRONG += [table_before_the_examples, number_before_the_examples, cached_parametrization]
NEVER_WRONG += [compiled_model, compiled_call]


def played(build, monitored):
    """Two steps of a scene; the model after them, and the readings of the first."""
    with torch.random.fork_rng(devices=[]):
        made = build()
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    watched = made.model if made.watched is None else made.watched
    clean = attached(watched)
    readings = []
    monitor = watching(watched, optimizer) if monitored else None
    for _ in range(2):
        optimizer.zero_grad()
        made.train(made.model, made.batch)
        optimizer.step()
        if monitor is not None:
            monitor.step(made.batch)
            readings.append(dict(monitor.readings))
    if monitor is not None:
        assert not monitor.failures
        monitor.close()
        assert attached(watched) == clean
    return made, readings


@pytest.mark.parametrize("build", [*RIGHT, *NEVER_WRONG], ids=lambda build: build.__name__)
def test_shares_of_a_scene_average_to_its_gradient(build):
    made = build()
    if np.isnan(made.shares).any():
        return
    made.train(made.model, made.batch)
    watched = made.model if made.watched is None else made.watched
    pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).to_dense() for p in references.trainable(watched)]
    h = np.concatenate([piece.double().numpy().ravel() for piece in pieces])
    tolerance = 1e-6 if build is two_dtypes else 1e-12
    np.testing.assert_allclose(made.shares.mean(0), h, rtol=0, atol=tolerance * np.abs(h).max())


def assert_no_trace(build):
    """The first step's readings and the truth, of a training that is as it is without a monitor."""
    (made, readings), (alone, _) = played(build, True), played(build, False)
    assert same_weights(made.model, alone.model)
    assert_identical([p.grad for p in made.model.parameters()], [p.grad for p in alone.model.parameters()])
    return readings[0], made.shares


@pytest.mark.parametrize("build", RIGHT, ids=lambda build: build.__name__)
def test_unusual_training_is_read_right(build):
    readings, H = assert_no_trace(build)
    assert_right(readings, H, rtol=1e-4 if build is two_dtypes else 1e-9)


@pytest.mark.parametrize("build", NEVER_WRONG, ids=lambda build: build.__name__)
def test_training_that_cannot_be_followed_gives_no_wrong_number(build):
    readings, H = assert_no_trace(build)
    if np.isnan(H).any():
        assert_silent(readings)
    else:
        assert_right_or_silent(readings, H, rtol=1e-9)


RECOVERED = [penalty_outside, penalty_of_the_slope, penalty_of_the_gradient, reentrant_checkpoint]
RECOVERED += [backward_in_two_parts, gradients_that_are_assigned, forward_without_hooks, copy_of_an_armed_model]


@pytest.mark.parametrize("build", RECOVERED, ids=lambda build: build.__name__)
def test_after_a_step_that_could_not_be_followed_the_next_is_read_right(build):
    made = build()
    optimizer = sgd(made.model, lr=0.1)
    monitor = watching(made.model, optimizer)
    made.train(made.model, made.batch)
    optimizer.step()
    monitor.step(made.batch)
    ordinary_step(made.model, optimizer, monitor, made.batch)


def test_layers_that_thaw_and_freeze():
    model, batches = mlp(), data(6, 6, 6, 6, 6)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watching(model, optimizer)
    changes = {1: lambda: model[0].requires_grad_(True), 3: lambda: model[2].weight.requires_grad_(False)}
    for number, batch in enumerate(batches):
        changes.get(number, int)()
        H = shares(model, batch)
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if number in changes:
            assert_right_or_silent(monitor.readings, H)
        else:
            assert_right(monitor.readings, H)
    assert not monitor.failures


# --- bounded memory ------------------------------------------------------------------------------------------------


OVER_PAIRS = [name for name in NAMES if name != "gradient_snr"]


def step_of(model, optimizer, monitor, batches, loss=mse):
    """A step of one backward pass for each batch; the shares of their sum."""
    H = accumulated_shares(model, batches, 1.0, loss)
    optimizer.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    optimizer.step()
    monitor.step(batches)
    return H


@pytest.mark.parametrize("max_memory", [1, 1000])
def test_accumulation_that_does_not_fit_into_memory_says_so(max_memory):
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, max_memory=max_memory)
    for _ in range(3):  # the first comes unexpected, the others do not
        step_of(model, optimizer, monitor, batches)
        assert_silent(monitor.readings, f"max_memory, {max_memory} bytes", OVER_PAIRS)
    H = step_of(model, optimizer, monitor, batches[:1])
    assert_right_or_silent(monitor.readings, H)  # it was ready for several passes
    for _ in range(2):
        H = step_of(model, optimizer, monitor, batches[:1])
        assert_right(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("max_memory", [1, 1000])
@by_name([zoo.mlp_tanh, zoo.cnn_group_norm, zoo.transformer_encoder, zoo.tied_language_model, zoo.embedding_bag])
def test_one_backward_pass_is_right_in_little_memory(case, max_memory):
    problem = case.make(0, torch.float64)
    H = truth(case)
    for mask, fraction in ((None, None), (gradmon.Mask(0.2, 3), 0.2)):
        model = copy.deepcopy(problem.model)
        optimizer = sgd(model)
        monitor = watching(model, optimizer, mask=mask, max_memory=max_memory)
        for _ in range(2):  # before and after it has found the ways
            model.load_state_dict(problem.model.state_dict())
            optimizer.zero_grad()
            reduced(problem, problem.loss(model, problem.batch)).backward()
            optimizer.step()
            monitor.step(problem.batch)
            kept, factors = masked(problem.model, H, fraction)
            assert_right(monitor.readings, kept, width=H.shape[1], factors=factors)
        assert not monitor.failures


def wide(dtype=torch.float64):
    """A model to which fewer numbers arrive than it has weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2)).to(dtype)


def test_accumulation_under_a_mask_takes_less_memory():
    """What two backward passes leave is then some coordinates, and not all that the gradients are made of."""
    mask, batches = gradmon.Mask(0.01, 3), data(4, 4)
    kept = mask.sample(wide()).numpy()
    factors = references.coordinate_weights(wide(), kept)
    limit = 8 * (8 * 8 * len(kept))  # an eighth of it holds the coordinates of eight examples
    for given in (mask, None):
        model = wide()
        optimizer = sgd(model, lr=0.01)
        monitor = watching(model, optimizer, mask=given, max_memory=limit)
        for count in (1, 1, 2, 2):
            H = step_of(model, optimizer, monitor, batches[:count])
            if given is not None:
                assert_right(monitor.readings, H[:, kept], width=H.shape[1], factors=factors)
            elif count == 1:
                assert_right(monitor.readings, H)
            else:
                assert_silent(monitor.readings, f"max_memory, {limit} bytes", OVER_PAIRS)
        assert not monitor.failures


# --- a penalty that begins in mid-run ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["every weight", "one matrix"])
@pytest.mark.parametrize("make", [mlp, wide])
def test_penalty_that_begins_in_mid_run_is_found_out(make, which):
    """At once, whether or not fewer numbers arrive at the layers' outputs than there are weights."""
    model, (batch,) = make(), data(6)
    optimizer = sgd(model, lr=0.05)
    monitor = watching(model, optimizer)
    penalised = [*model.parameters()] if which == "every weight" else [model[0].weight]
    for number in range(1, 26):
        H = shares(model, batch)
        optimizer.zero_grad()
        value = mse(model, batch)
        if 7 <= number < 24:
            value = value + 0.1 * sum(p.square().sum() for p in penalised)
        value.backward()
        optimizer.step()
        monitor.step(batch)
        if 7 <= number < 24:
            assert_silent(monitor.readings, "add up|the loss depends on it")
        else:
            assert_right(monitor.readings, H)
    assert not monitor.failures


# --- nothing outlives the step -------------------------------------------------------------------------------------


def memory_of(tree):
    """References, which keep nothing alive, to the memory behind the tensors of a nesting."""
    found = []
    zoo._map(tree, lambda t: found.append(t) or t) if isinstance(tree, Tensor | tuple | list | dict) else None
    return {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in found if t.layout == torch.strided}


class Activations:
    """The memory of everything that the modules of a model are given and return."""

    def __init__(self, model, batch):
        own = memory_of([*model.parameters(), *model.buffers(), batch])
        self._own, self._seen, self.count = set(own), [], 0
        for module in model.modules():
            module.register_forward_hook(self._note)

    def _note(self, module, args, output):
        if torch.is_grad_enabled():
            self._seen += [ref for key, ref in memory_of([args, output]).items() if key not in self._own]

    def alive(self):
        if any(not ref.expired() for ref in self._seen):
            gc.collect()
        self.count = len(self._seen)
        return sum(not ref.expired() for ref in self._seen)


LET_GO = [zoo.mlp_relu_inplace, zoo.cnn_group_norm, zoo.conv_transpose, zoo.transformer_encoder, zoo.embedding_bag]
LET_GO += [zoo.tied_language_model, zoo.module_used_twice, zoo.weight_norm, zoo.functional_parameters, zoo.checkpointed]
LET_GO += [zoo.lstm_bidirectional, zoo.prelu, zoo.batch_norm_cnn, zoo.in_place_after_layers, zoo.named_tuple_batch]
LET_GO += [zoo.penalty, zoo.frozen_parameters, zoo.gradient_penalty, zoo.recurrent_cells, zoo.dropout_transformer]


@by_name(LET_GO)
def test_no_activation_outlives_the_step(case):
    problem = case.make(0, torch.float32)
    optimizer = sgd(problem.model, lr=0.01)
    monitor = watching(problem.model, optimizer, metrics=[*NAMES, "input_gradient_rank"])
    activations = Activations(problem.model, problem.batch)
    for _ in range(2):
        optimizer.zero_grad()
        value = reduced(problem, problem.loss(problem.model, problem.batch))
        value.backward()
        optimizer.step()
        monitor.step(problem.batch)
        del value
        assert activations.alive() == 0
    assert activations.count


def forward_only(model, batch):
    mse(model, batch)


def evaluated(model, batch):
    with torch.no_grad():
        mse(model, batch)


def two_backward_passes(model, batch):
    for _ in range(2):
        mse(model, batch).backward()


def checkpointed(model, batch):
    mse(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False), batch).backward()


def penalised_outside(model, batch):
    (mse(model, batch) + sum(p.square().sum() for p in model.parameters())).backward()


def interrupted(model, batch):
    with pytest.raises(RuntimeError, match="size"):
        mse(model, (batch[0], batch[1][:, :1].expand(-1, 7)))
    mse(model, batch).backward()


def one_loss_of_two(model, batch):
    mse(model, batch)
    mse(model, batch).backward()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(
    "passes",
    [forward_only, evaluated, two_backward_passes, checkpointed, penalised_outside, interrupted, one_loss_of_two],
)
def test_no_activation_outlives_a_step_that_is_not_the_usual_one(passes, skipped):
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(2))
    activations = Activations(model, batch)
    for _ in range(4):
        optimizer.zero_grad()
        passes(model, batch)
        if not skipped:
            optimizer.step()
        monitor.step(batch)
        assert activations.alive() == 0
    assert activations.count or passes is evaluated


def test_graph_that_is_kept_by_the_training_is_kept_by_nobody_else():
    """A loss that lives on holds its graph; the moment it is let go, everything is."""
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    activations = Activations(model, batch)
    value = mse(model, batch)
    value.backward(retain_graph=True)
    optimizer.step()
    monitor.step(batch)
    assert activations.alive() > 0
    del value
    assert activations.alive() == 0


def test_memory_of_a_monitor_does_not_grow_from_probe_to_probe():
    """Transposed weights, a convolution and sequences under a mask: all that is remembered of coordinates."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x.transpose(1, 2)).transpose(1, 2)
        return m.head(F.linear(torch.tanh(F.linear(x, m.tied.T)), m.tied).mean(1))

    torch.manual_seed(1)
    parts = {"conv": nn.Conv1d(3, 6, 3, padding=1), "tied": normal(6, 10), "head": nn.Linear(6, 2)}
    model = net(forward, **parts).double()
    optimizer = sgd(model, lr=0.01)
    monitor = watching(model, optimizer, mask=gradmon.Mask(0.1, 3), alerts=None)
    batch = torch.randn(4, 9, 3).double(), torch.randn(4, 2).double()
    counts = []
    for number in range(12):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if number in (3, 11):
            gc.collect()
            counts.append(sum(issubclass(type(kept), Tensor) for kept in gc.get_objects()))
    assert math.isfinite(monitor.readings["noise_scale"].value)
    assert counts[1] <= counts[0]


def test_number_of_micro_batches_changes_from_step_to_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    listener = Listener(model, moments=True)
    for count in (2, 1, 2, 3, 1, 1, 2):
        xs = [torch.randn(4, 5).double() for _ in range(count)]
        H = torch.stack(
            [
                torch.cat([part.flatten() for part in torch.autograd.grad(model(x).square().sum(), model.parameters())])
                for x in torch.cat(xs)
            ]
        )
        listener.arm()
        for x in xs:
            (model(x).square().sum(1).mean() / count).backward()
        found = listener.collect(xs)
        listener.disarm()
        np.testing.assert_allclose(found.gram, H @ H.T, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.means, H.mean(0), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.variances, H.var(0), rtol=1e-9, atol=1e-13)
