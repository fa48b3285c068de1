"""Wrong arguments: every public one is refused with a message that names it."""

import re

import pytest
import torch
from torch import nn

import gradmon
from gradmon import ArgumentError, Mask, every, log_spaced
from gradmon.perturbations import inputs as input_samplers
from gradmon.perturbations import weights as weight_samplers


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def mse(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def batch(size: int = 5):
    return torch.ones(size, 3), torch.zeros(size, 2)


def refused(message: str):
    return pytest.raises(ArgumentError, match=re.escape(message))


FUNCTIONS = [gradmon.measure, gradmon.batch_gradient, gradmon.per_example_gradients, gradmon.per_example_gram]
MASKED = FUNCTIONS[:3]


@pytest.fixture(params=FUNCTIONS, ids=lambda function: function.__name__)
def function(request):
    return request.param


# --- model, loss, batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "model", lambda x: x, nn.Linear])
def test_model_must_be_a_module(function, wrong):
    with refused("`model` must be a torch.nn.Module. Got"):
        function(wrong, mse, batch())


def test_model_must_have_something_to_train(function):
    for wrong in (nn.Tanh(), model().requires_grad_(False)):
        with refused("`model` must have at least one trainable parameter. Got none."):
            function(wrong, mse, batch())


def test_lazy_parameters_must_be_initialised(function):
    with refused("`model` must have run once, so that lazy parameters are initialised. Got `weight` lazy."):
        function(nn.LazyLinear(2), mse, batch())


def test_parameters_must_be_real(function):
    with refused("`model` must have real floating-point parameters. Got `weight` of torch.complex64."):
        function(nn.Linear(3, 2, dtype=torch.complex64), mse, batch())


@pytest.mark.parametrize("wrong", [None, "mse", 3])
def test_loss_must_be_callable(function, wrong):
    with refused("`loss` must be callable as loss(model, batch). Got"):
        function(model(), wrong, batch())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda m, b: (m(b[0]) - b[1]).square(), "shape (5, 2)"),
        (lambda m, b: m(b[0]).sum(0), "shape (2,)"),
        (lambda m, b: m(b[0]).sum(1, keepdim=True), "shape (5, 1)"),
        (lambda m, b: m(b[0])[:0].sum(1), "shape (0,)"),
    ],
)
def test_loss_must_return_a_scalar_or_one_value_per_example(function, loss, got):
    with refused(f"`loss` must return a scalar or one value per example, (5,). Got {got}."):
        function(model(), loss, batch())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda m, b: None, "NoneType"),
        (lambda m, b: mse(m, b).item(), "float"),
        (lambda m, b: (mse(m, b), m(b[0])), "tuple"),
        (lambda m, b: m(b[0]).argmax(), "torch.int64"),
    ],
)
def test_loss_must_return_a_floating_point_tensor(function, loss, got):
    with refused(f"`loss` must return a floating-point tensor. Got {got}."):
        function(model(), loss, batch())


@pytest.mark.parametrize(("wrong", "got"), [(None, "NoneType"), ({}, "dict"), ([1, "a", None], "list"), ("x", "str")])
def test_batch_must_hold_a_tensor(function, wrong, got):
    with refused(f"`batch` must hold at least one tensor. Got {got}."):
        function(model(), mse, wrong)


def test_batch_must_hold_examples(function):
    with refused("`batch` must hold a tensor whose first dimension counts the examples. Got only scalars."):
        function(model(), mse, (torch.tensor(1.0), torch.tensor(2.0)))
    with refused("`batch` must hold at least one example. Got an empty first dimension."):
        function(model(), mse, batch(0))


@pytest.mark.parametrize("wrong", ["none", None, "max", 1])
def test_reduction(function, wrong):
    with refused(f'`reduction` must be "mean" or "sum". Got {wrong!r}.'):
        function(model(), mse, batch(), reduction=wrong)


# --- mask and seed -------------------------------------------------------------------------------------------------

WRONG_FRACTIONS = [0, 0.0, -0.1, 1.1, 2, float("nan"), float("inf"), True, "0.1", [0.1]]


@pytest.mark.parametrize("wrong", WRONG_FRACTIONS)
def test_mask_fraction(wrong):
    with refused(f"`mask` must be in (0, 1]. Got {wrong}."):
        Mask(wrong)
    for function in MASKED:
        with refused(f"`mask` must be in (0, 1]. Got {wrong}."):
            function(model(), mse, batch(), mask=wrong)


@pytest.mark.parametrize("wrong", [0.5, "1", None, True])
def test_seed(wrong):
    with refused(f"`seed` must be an integer. Got {wrong}."):
        Mask(0.5, wrong)
    with refused(f"`seed` must be an integer. Got {wrong}."):
        gradmon.measure(model(), mse, batch(), mask=0.5, seed=wrong)
    with refused(f"`seed` must be an integer. Got {wrong}."):
        gradmon.measure(model(), mse, batch(), metrics="weight_condition", seed=wrong)


# --- the other arguments of measure --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "no_such"}, "`metrics` must be Metric objects or among batch_share,"),
        ({"metrics": ["loss", "no_such"]}, "Got 'no_such'."),
        ({"metrics": [3]}, "Got 3."),
        ({"metrics": 3}, "`metrics` must be"),
        ({"metrics": "step_ratio"}, "`optimizer` must be given for `step_ratio`. Got None."),
        ({"metrics": "step_share"}, "`optimizer` must be given for `step_share`. Got None."),
        ({"metrics": "stability"}, "`optimizer` must be given for `stability`. Got None."),
        ({"optimizer": "sgd"}, "`optimizer` must be a torch.optim.Optimizer. Got str."),
        ({"weights": "krylov"}, "`weights` must be a sampler of gradmon.perturbations.weights. Got str."),
        ({"weights": input_samplers.Random()}, "`weights` must be a sampler of gradmon.perturbations.weights. Got Ran"),
        (
            {"weights": weight_samplers.Random},
            "`weights` must be a sampler of gradmon.perturbations.weights. Got type.",
        ),
        ({"inputs": 3}, "`inputs` must be a sampler of gradmon.perturbations.inputs. Got int."),
        ({"inputs": weight_samplers.Random()}, "`inputs` must be a sampler of gradmon.perturbations.inputs. Got Ran"),
        ({"inputs": input_samplers.Ascent}, "`inputs` must be a sampler of gradmon.perturbations.inputs. Got"),
        ({"derivative": "central"}, '`derivative` must be "finite" or "exact". Got \'central\'.'),
        ({"derivative": None}, '`derivative` must be "finite" or "exact". Got None.'),
        ({"micro_batches": 1}, "`micro_batches` must be an integer of at least 2. Got 1."),
        ({"micro_batches": 2.0}, "`micro_batches` must be an integer of at least 2. Got 2.0."),
        ({"micro_batches": True}, "`micro_batches` must be an integer of at least 2. Got True."),
        ({"layers": 1}, "`layers` must be True or False. Got 1."),
        ({"input_module": "nowhere"}, "`input_module` must name a module of the model. Got 'nowhere'."),
        ({"input_module": nn.Linear(3, 4)}, "`input_module` must be a module of the model. Got Linear."),
        ({"input_module": 3}, "`input_module` must be a module of the model. Got int."),
        (
            {"weights": weight_samplers.Fixed(torch.ones(2, 25))},
            "`perturbations` must have 26 columns, one per weight. Got 25.",
        ),
        ({"inputs": input_samplers.Fixed(torch.ones(2, 4))}, "`perturbations` must be (n, *(3,)) or (n, *(5, 3)). Got"),
    ],
)
def test_measure(options, message):
    with refused(message):
        gradmon.measure(model(), mse, batch(), **options)


@pytest.mark.parametrize(("wrong", "got"), [({}, "dict"), ("x", "str")])
def test_next_batch_must_hold_a_tensor(wrong, got):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with refused(f"`next_batch` must hold at least one tensor. Got {got}."):
        gradmon.measure(net, mse, batch(), optimizer=optimizer, next_batch=wrong)


def test_optimizer_must_train_the_model():
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    with refused("`optimizer` must hold parameters of `model`. Got none of them."):
        gradmon.measure(model(), mse, batch(), optimizer=optimizer)


def test_an_error_leaves_the_model_as_it_was():
    net = model()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    storages = [parameter.data_ptr() for parameter in net.parameters()]
    with refused("`loss` must return"):
        gradmon.measure(net, lambda m, b: m(b[0]), batch())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert [parameter.data_ptr() for parameter in net.parameters()] == storages
    assert all(parameter.grad is None for parameter in net.parameters())


# --- per-example gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.0, 1e9, True, None, "5"])
def test_max_memory(wrong):
    for loss in (None, mse):
        with refused(f"`max_memory` must be an integer of at least 1. Got {wrong}"):
            gradmon.Monitor(model(), None, loss, max_memory=wrong)


@pytest.mark.parametrize("wrong", [-1, 1.0, True, False, "1", [0]])
def test_example_dim(wrong):
    for loss in (None, mse):
        with refused(f"`example_dim` must be an integer of at least 0, or None. Got {wrong}"):
            gradmon.Monitor(model(), None, loss, example_dim=wrong)


def no_rule(part):
    return None


WRONG_RULES = {
    "a rule": no_rule,
    "a list": [no_rule],
    "a name": "linear",
    "by name": {"linear": no_rule},
    "by module": {nn.Linear(1, 1): None},
    "no rule": {torch.nn.functional.linear: None},
    "a result": {**gradmon.per_example.RULES, nn.Linear: torch.ones(1)},
}


@pytest.mark.parametrize("wrong", WRONG_RULES.values(), ids=WRONG_RULES)
def test_rules(wrong):
    with refused("`rules` must map functions and module classes to rules. Got"):
        gradmon.Monitor(model(), rules=wrong)
    with refused("`rules` must map functions and module classes to rules. Got"):
        gradmon.Monitor(model(), None, mse, rules=wrong)
    for function in (gradmon.measure, gradmon.per_example_gradients, gradmon.per_example_gram):
        with refused("`rules` must map functions and module classes to rules. Got"):
            function(model(), mse, batch(), rules=wrong)


def test_limits_that_are_allowed():
    for options in ({"max_memory": 1}, {"example_dim": 0}, {"example_dim": 3}, {"rules": {}}, {"rules": None}):
        gradmon.Monitor(model(), **options).close()


# --- schedules and samplers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, None, "5"])
def test_schedules(wrong):
    with refused(f"`n` must be a positive integer. Got {wrong}."):
        every(wrong)
    with refused(f"`per_decade` must be a positive integer. Got {wrong}."):
        log_spaced(wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, None, "5"])
def test_counts_of_samplers(wrong):
    for kind in (
        weight_samplers.Random,
        weight_samplers.Targeted,
        input_samplers.Random,
        input_samplers.Targeted,
        input_samplers.Toward,
    ):
        with refused(f"`n` must be a positive integer. Got {wrong}."):
            kind(wrong)
    for kind in (weight_samplers.Krylov, input_samplers.Ascent):
        with refused(f"`k` must be a positive integer. Got {wrong}."):
            kind(wrong)
    with refused(f"`n` must be 1 to 2. Got {wrong}."):
        weight_samplers.Limited(wrong)
    if wrong is not None:
        for kind in (input_samplers.Random, input_samplers.Targeted, input_samplers.Toward, input_samplers.Ascent):
            with refused(f"`examples` must be a positive integer. Got {wrong}."):
                kind(examples=wrong)
        with refused(f"`examples` must be a positive integer. Got {wrong}."):
            input_samplers.Fixed(torch.ones(1, 3), examples=wrong)


def test_limited_has_two_directions():
    with refused("`n` must be 1 to 2. Got 3."):
        weight_samplers.Limited(3)


@pytest.mark.parametrize("wrong", [0, -1e-3, float("nan"), float("inf"), True, "1e-3"])
def test_radii_of_samplers(wrong):
    for kind in (weight_samplers.Random, weight_samplers.Targeted, weight_samplers.Limited):
        with refused(f"`eta` must be a positive number. Got {wrong}."):
            kind(eta=wrong)
        with refused(f"`scale` must be a positive number. Got {wrong}."):
            kind(scale=wrong)
    for kind in (weight_samplers.Krylov, input_samplers.Ascent):
        with refused(f"`scale` must be a positive number. Got {wrong}."):
            kind(scale=wrong)
    for kind in (input_samplers.Random, input_samplers.Targeted, input_samplers.Toward):
        with refused(f"`eta` must be a positive number. Got {wrong}."):
            kind(eta=wrong)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(3), "(3,)"),
        (torch.ones(2, 3, 4), "(2, 3, 4)"),
        (torch.ones(0, 26), "(0, 26)"),
        (torch.ones(2, 26, dtype=torch.int64), "(2, 26)"),
        ([[0.0] * 26], "list"),
    ],
)
def test_fixed_weight_perturbations(wrong, got):
    with refused(f"`perturbations` must be a floating-point tensor (n, P), n > 0. Got {got}."):
        weight_samplers.Fixed(wrong)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [(torch.tensor(1.0), "()"), (torch.ones(0, 3), "(0, 3)"), (torch.ones(2, 3).int(), "(2, 3)"), (None, "NoneType")],
)
def test_fixed_input_perturbations(wrong, got):
    with refused(f"`perturbations` must be a floating-point tensor (n, ...), n > 0. Got {got}."):
        input_samplers.Fixed(wrong)


def test_argument_errors_are_value_errors_of_gradmon():
    with pytest.raises(ValueError, match=re.escape("`mask` must be in (0, 1]. Got 0.")) as caught:
        Mask(0)
    assert isinstance(caught.value, gradmon.GradmonError)
