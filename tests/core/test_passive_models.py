"""Passive numbers over every model of the zoo; not a bit of the training changes."""

import copy
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Unavailable
from tests import references, zoo
from tests.core.passive import (
    NAMES,
    PARTS,
    assert_gram,
    assert_identical,
    assert_moments,
    assert_right,
    assert_right_or_silent,
    assert_silent,
    attached,
    backward,
    by_name,
    listened,
    masked,
    reduced,
    seed,
    sgd,
    truth,
    watching,
)
from tests.zoo.problem import mapped

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

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
    mapped(problem.batch, lambda t: tensors.append((t, t._version)) or t)
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
        batch = mapped(problem.batch, lambda t, step=step: t.roll(step, 0))
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


ALL_CASES = [*zoo.CASES, *zoo.HARD_CASES, *zoo.SINGLE_CASES, *zoo.DROPOUT_CASES]


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(case, [*OPTIMIZERS][place % len(OPTIMIZERS)]) for place, case in enumerate(ALL_CASES)],
    ids=[case.name for case in ALL_CASES],
)
def test_training_is_the_same_to_the_last_bit(case, optimizer):
    assert_identical(trained(case, optimizer, True), trained(case, optimizer, False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@by_name([zoo.interacting.batch_norm_cnn, zoo.dropout.dropout_transformer, zoo.sequences.tied_language_model])
def test_training_is_the_same_to_the_last_bit_with_every_optimizer_and_input_gradients(case, optimizer):
    metrics = [*NAMES, "input_gradient_rank", "grad_norm", "update_ratio"]
    assert_identical(trained(case, optimizer, True, metrics), trained(case, optimizer, False))
