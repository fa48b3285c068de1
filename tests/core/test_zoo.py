"""The zoo of small problems is what it says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests import references, zoo
from tests.core.reference_problems import BY_NAME, SEED, relative
from tests.zoo.problem import get_input


@BY_NAME
def test_shares_average_to_the_batch_gradient(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    h = references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction)
    H = references.shares(problem)
    assert H.shape == (problem.size, len(references.flat_weights(problem.model)))
    assert relative(references.mean(list(H)), h) <= 1e-12


@BY_NAME
def test_problems_are_small_and_their_examples_differ(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    H = references.shares(problem)
    assert 2 <= problem.size <= 9
    assert H.shape[1] < 3000
    for i in range(problem.size):
        assert np.linalg.norm(H[i]) > 0
        for j in range(i):
            assert relative(H[i], H[j]) > 1e-3


@BY_NAME
def test_flags_tell_the_truth(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    value = problem.loss(problem.model, problem.batch)
    assert value.shape == ((problem.size,) if case.values else ())
    assert case.values or problem.reduction == "mean"
    assert case.interacting == (problem.untied is not None) == (problem.example_loss is None)
    assert case.integer == (problem.input_module is not None) == (problem.input_path is None)
    if problem.input_path is not None:
        x = get_input(problem.batch, problem.input_path)
        assert x.is_floating_point()
        assert len(x) == problem.size


@BY_NAME
def test_problems_are_reproducible_in_every_dtype_and_leave_the_rng_alone(case: zoo.Case) -> None:
    before = torch.get_rng_state()
    double, again, single = (case.make(3, dtype) for dtype in (torch.float64, torch.float64, torch.float32))
    assert torch.equal(torch.get_rng_state(), before)
    w = references.flat_weights(double.model)
    assert np.array_equal(w, references.flat_weights(again.model))
    assert relative(references.flat_weights(single.model), w) == pytest.approx(0, abs=1e-7)
    assert not np.array_equal(w, references.flat_weights(case.make(4, torch.float64).model))
    H, rounded = references.shares(double), references.shares(single)
    assert relative(rounded, H) < 1e-3


@BY_NAME
def test_references_leave_the_problem_alone(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction)
    references.shares(problem)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in problem.model.parameters())


@BY_NAME
def test_gradient_at_own_weights_is_the_batch_gradient(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    w = references.flat_weights(problem.model)
    there = references.gradient_at(*arguments, w, problem.reduction)
    assert np.array_equal(there, references.batch_gradient(*arguments, problem.reduction))


@pytest.mark.parametrize("case", zoo.select(kinked=False), ids=lambda case: case.name)
def test_batch_gradient_is_the_slope_of_the_loss(case: zoo.Case, rng: np.random.Generator) -> None:
    problem = case.make(SEED, torch.float64)
    h = references.batch_gradient(problem.model, problem.loss, problem.batch, problem.reduction)
    direction = rng.standard_normal(len(h)) / math.sqrt(len(h))
    losses = []
    for sign in (1, -1):
        model = case.make(SEED, torch.float64).model
        start = 0
        with torch.no_grad():
            for parameter in references.trainable(model):
                piece = torch.from_numpy(direction[start : start + parameter.numel()]).view(parameter.shape)
                parameter.add_(sign * 1e-5 * piece)
                start += parameter.numel()
            value = problem.loss(model, problem.batch)
            losses.append(value.sum() if problem.reduction == "sum" else value.mean())
    slope = float(losses[0] - losses[1]) / 2e-5
    assert slope == pytest.approx(float(h @ direction), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", zoo.select(interacting=True), ids=lambda case: case.name)
def test_untied_network_with_equal_copies_is_the_network(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    assert problem.untied is not None
    copies = [dict(problem.model.named_parameters())] * problem.size
    value = problem.loss(problem.model, problem.batch)
    expected = value.sum() if problem.reduction == "sum" else value.mean()
    assert problem.untied(copies, problem.batch).item() == pytest.approx(expected.item(), rel=1e-13)


def test_shares_of_batch_norm_are_what_reaches_an_examples_rows() -> None:
    problem = zoo.interacting.batch_norm_mlp.make(SEED, torch.float64)
    first = problem.model[0]
    seen = {}

    def forward_hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: seen.update(x=args[0].detach(), grad=grad))

    handle = first.register_forward_hook(forward_hook)
    problem.loss(problem.model, problem.batch).backward()
    handle.remove()
    H = references.shares(problem)
    for i in range(problem.size):
        weight = problem.size * torch.outer(seen["grad"][i], seen["x"][i])
        assert relative(H[i, : weight.numel()], weight.numpy().ravel()) < 1e-12


def test_shares_of_values_are_gradients_of_the_values() -> None:
    for case, factor in ((zoo.losses.values_mean, 1), (zoo.losses.values_sum, 3)):
        problem = case.make(SEED, torch.float64)
        H = references.shares(problem)
        for i in range(problem.size):
            term = problem.loss(problem.model, problem.batch)[i]
            own = torch.autograd.grad(term, list(problem.model.parameters()))
            assert relative(H[i], factor * np.concatenate([g.numpy().ravel() for g in own])) < 1e-12


@pytest.mark.parametrize("case", zoo.DROPOUT_CASES, ids=lambda case: case.name)
def test_dropout_gradients_follow_the_global_rng_and_leave_it_alone(case: zoo.Case) -> None:
    problem = case.make(SEED, torch.float64)
    arguments = (problem.model, problem.loss, problem.batch)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, second = references.batch_gradient(*arguments), references.batch_gradient(*arguments)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        third = references.batch_gradient(*arguments)
    assert np.array_equal(first, second)
    assert relative(third, first) > 1e-3
