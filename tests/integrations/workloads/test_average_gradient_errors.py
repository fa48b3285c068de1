"""What the average gradient refuses, and that it leaves everything as it was when it fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradmon import GradmonError
from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.average_gradient import FUNCTIONS, AverageGradient
from gradmon_integrations.workloads.average_gradient.recording import ReplayError
from tests.integrations.workloads.average_models import assert_same, batch, state_of


def model_and_data() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    return model, *batch(8, 5, 3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"`iterations` must be a whole number of at least 1. Got 0\."),
        ({"iterations": 2.5}, r"`iterations` must be a whole number"),
        ({"iterations": True}, r"`iterations` must be a whole number"),
        ({"linear": "secant"}, r'`linear` must be "plain" or "midpoint". Got \'secant\''),
        ({"functions": {F.relu: 1.0}}, r"`functions` must lead from functions to their slopes"),
        ({"functions": [F.relu]}, r"`functions` must lead from functions to their slopes. Got \[<function relu"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AverageGradient(sgd(nn.Linear(2, 2)), **options)


def test_base_optimizers_that_do_not_fit() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"`base_optimizer` must make its step without a closure. Got LBFGS"):
        AverageGradient(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ArgumentError, match=r"without a closure. Got AverageGradient"):
        AverageGradient(AverageGradient(sgd(model)))
    with pytest.raises(ArgumentError, match=r"`base_optimizer` must be a torch.optim.Optimizer"):
        AverageGradient(model)  # type: ignore[arg-type]


def test_closures_that_do_not_fit() -> None:
    model, inputs, targets = model_and_data()
    optimizer = AverageGradient(sgd(model))

    def backward() -> Tensor:
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    wrong: list[tuple[Any, str]] = [
        (None, "`closure` must be a function that returns the loss"),
        (backward, "`closure` must be .* leaves the backward pass to the optimizer. Got one that ran a backward pass"),
        (lambda: model(inputs), r"`closure` must return the loss, a real scalar. Got a tensor \(8, 3\)"),
        (lambda: model(inputs).sum().to(torch.complex128), r"a real scalar. Got a tensor \(\) of torch.complex128"),
        (lambda: 1.0, "a real scalar. Got 1.0"),
        (lambda: torch.ones(()), "`closure` must return a loss that depends on a parameter"),
    ]
    before = state_of(model)
    for closure, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            optimizer.step(closure)
    # The running statistics are those that were there, too.
    assert_same(before, state_of(model))


class Count:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def test_a_replay_that_differs_names_the_call() -> None:
    layer = nn.Linear(5, 5).double()
    other = nn.Linear(5, 5).double()
    x = batch(8, 5, 3)[0]
    count = Count()

    def another_function() -> Tensor:
        return (torch.tanh if count() % 2 else torch.sigmoid)(layer(x)).mean()

    def one_more() -> Tensor:
        h = torch.tanh(layer(x))
        return (h if count() % 2 else torch.tanh(h)).mean()

    def one_less() -> Tensor:
        h = torch.tanh(layer(x))
        return (torch.tanh(h) if count() % 2 else h).mean()

    def another_weight() -> Tensor:
        return torch.tanh((layer if count() % 2 else other)(x)).mean()

    def another_shape() -> Tensor:
        z = layer(x)
        return torch.tanh(z if count() % 2 else z[:4]).mean()

    def other_options() -> Tensor:
        return F.elu(layer(x), alpha=1.0 if count() % 2 else 2.0).mean()

    def another_batch() -> Tensor:
        return torch.tanh(layer(x + count())).mean()

    for closure, message in (
        (another_function, "Call 2 was tanh, and is now sigmoid"),
        (one_more, "After 2 calls it now made one more: tanh"),
        (one_less, "Call 3, tanh, is missing now"),
        (another_weight, "Call 1, linear, now has another weight"),
        (another_shape, r"Call 2, tanh, was given \(8, 5\), and is now given \(4, 5\)"),
        (other_options, "Call 2, elu, now has other options"),
        (another_batch, "The closure must use the same batch whenever it is called"),
    ):
        count.calls = 0
        before = state_of(layer)
        with pytest.raises(ReplayError, match=message):
            AverageGradient(sgd(nn.ModuleList([layer, other]))).step(closure)
        assert_same(before, state_of(layer))


def hidden(name: str) -> tuple[Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    layer = nn.Linear(5, 5)
    if name in ("LSTM", "GRU", "RNN"):
        module = getattr(nn, name)(5, 4)
        return module, lambda: module(x[None])[0].mean()
    if name in ("LSTMCell", "GRUCell", "RNNCell"):
        cell = getattr(nn, name)(5, 4)
        return cell, lambda: (cell(x)[0] if name == "LSTMCell" else cell(x)).mean()
    if name == "script":
        net = nn.Sequential(layer, nn.Tanh())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch discourage TorchScript
            traced = torch.jit.trace(net, x)
        return net, lambda: traced(x).mean()
    if name == "vmap":
        return layer, lambda: torch.vmap(lambda row: torch.tanh(layer(row)))(x).mean()
    if name == "sparse":
        table = nn.Embedding(9, 4, sparse=True)
        return table, lambda: torch.tanh(table(torch.arange(5))).mean()
    if name == "shared":
        tied = nn.Linear(5, 5)
        tied.weight = nn.Parameter(layer.weight.data)
        return nn.ModuleList([layer, tied]), lambda: torch.tanh(tied(layer(x))).mean()
    if name == "nested":

        def penalty() -> Tensor:
            inputs = x.clone().requires_grad_()
            return torch.autograd.grad(torch.tanh(layer(inputs)).sum(), inputs, create_graph=True)[0].square().mean()

        return layer, penalty
    if name == "complex":
        held = nn.ParameterList([nn.Parameter(torch.randn(3, dtype=torch.complex64))])
        return held, lambda: torch.tanh(held[0].abs()).sum()
    if name == "half":
        half = layer.bfloat16()
        return half, lambda: torch.tanh(half(x.bfloat16())).float().mean()
    return layer, lambda: checkpoint(lambda h: torch.tanh(layer(h)), x.requires_grad_(), use_reentrant=True).mean()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LSTM", "torch.lstm hides its nonlinearities"),
        ("GRU", "torch.gru hides its nonlinearities"),
        ("RNN", "torch.rnn_tanh hides its nonlinearities"),
        ("LSTMCell", "torch.lstm_cell hides its nonlinearities"),
        ("GRUCell", "torch.gru_cell hides its nonlinearities"),
        ("RNNCell", "torch.rnn_tanh_cell hides its nonlinearities"),
        ("script", "holds TanhBackward0, which was not seen being called: TorchScript"),
        ("vmap", "tanh is called inside of a transform of torch.func, such as vmap"),
        ("sparse", "needs dense gradients, and one is sparse"),
        ("complex", "needs real parameters"),
        ("shared", "Two parameters share memory. To tie weights, use one and the same parameter twice"),
        ("nested", "The closure calls torch.autograd.grad"),
        ("half", "The slopes of tanh need float32 or float64. Got torch.bfloat16"),
        ("checkpoint", r"torch.utils.checkpoint\(use_reentrant=True\) hides"),
    ],
)
def test_what_hides_its_nonlinearities_or_has_no_sign_is_refused(name: str, message: str) -> None:
    module, closure = hidden(name)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(GradmonError, match=message):
        AverageGradient(sgd(module)).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_compiled_model_is_refused() -> None:
    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0]

    # torch names a compiled graph's node so; compiling one takes half a minute.
    named = type("CompiledFunction", (Compiled,), {})
    layer = nn.Linear(5, 5).double()
    x = batch(8, 5, 3)[0]
    with pytest.raises(GradmonError, match=r"torch.compile hides the functions"):
        AverageGradient(sgd(layer)).step(lambda: named.apply(layer(x)).mean())


def test_a_function_that_is_not_elementwise_is_refused() -> None:
    layer = nn.Linear(5, 5).double()
    x = batch(8, 5, 3)[0]
    optimizer = AverageGradient(
        sgd(layer),
        functions={
            **FUNCTIONS,
            torch.cumsum: next(iter(FUNCTIONS.values())),
            torch.diff: next(iter(FUNCTIONS.values())),
        },
    )
    with pytest.raises(GradmonError, match=r"A function that is averaged must be elementwise. diff made"):
        optimizer.step(lambda: torch.diff(layer(x)).mean())


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("base", ["sgd", "adam", "fresh adam"])
def test_a_closure_that_fails_leaves_all_but_the_bases_state_as_it_was(failing: int, base: str) -> None:
    model, inputs, targets = model_and_data()
    inner = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if base == "sgd"
        else torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    )
    optimizer = AverageGradient(inner, iterations=3)

    def closure() -> Tensor:
        return F.mse_loss(model(inputs), targets)

    for _ in range(0 if base == "fresh adam" else 2):
        optimizer.step(closure)
    count = Count()

    def broken() -> Tensor:
        loss = closure()
        if count() == failing:
            raise KeyboardInterrupt
        return loss

    weights, state, random = state_of(model), copy.deepcopy(inner.state_dict()), torch.get_rng_state()
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt) as caught:
        optimizer.step(broken)
    assert count.calls == failing
    assert_same(weights, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    now = inner.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert now["state"].keys() == state["state"].keys()
    # A state that there was before is not copied in each step: once the base has made its step, the exception says so.
    advanced = base != "fresh adam" and failing > 1
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == advanced
    assert all("The base optimizer's state may have taken up the gradient" in note for note in notes)
    for place, held in () if advanced else state["state"].items():
        assert_same(
            {k: torch.as_tensor(v) for k, v in held.items() if v is not None},
            {k: torch.as_tensor(v) for k, v in now["state"][place].items() if v is not None},
        )
    # And it goes on as if nothing had happened.
    twin = copy.deepcopy(model)
    assert state_of(twin).keys() == weights.keys()
    optimizer.step(closure)


def test_a_failing_replay_gives_the_modules_their_buffers_back() -> None:
    model, inputs, targets = model_and_data()
    optimizer = AverageGradient(sgd(model))
    norm: Any = model[1]
    held = norm.running_mean
    count = Count()

    def broken() -> Tensor:
        loss = F.mse_loss(model(inputs), targets)
        if count() == 2:
            raise RuntimeError("broken")
        return loss

    for _ in range(2):
        count.calls = 0
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(broken)
        assert norm.running_mean is held
        assert int(norm.num_batches_tracked) == 0
