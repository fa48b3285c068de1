"""The average gradient where something around the model could give it wrong slopes."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.average_gradient import FUNCTIONS, AverageGradient, secant
from tests.integrations.workloads.average_models import assert_same, batch, chain, closure_of, state_of


def test_weights_that_autocast_keeps_are_not_those_of_the_step_before() -> None:
    def weights(around: bool) -> list[Tensor]:
        torch.manual_seed(0)
        first, second, x = nn.Linear(5, 32), nn.Linear(32, 3), torch.randn(6, 5)
        parameters = [*first.parameters(), *second.parameters()]
        optimizer = AverageGradient(torch.optim.SGD(parameters, lr=5.0))

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return second(torch.tanh(2 * first(x).float())).float().square().mean()

        for _ in range(5):
            with torch.autocast("cpu", dtype=torch.bfloat16) if around else nullcontext():
                optimizer.step(loss)
        return parameters

    for one, other in zip(weights(True), weights(False), strict=True):
        assert torch.equal(one, other)


class Holder(nn.Module):
    """Uses the parts of a part that is not called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        h = F.batch_norm(
            self.first(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True, momentum=0.1
        )
        return self.last(torch.tanh(h))


def test_buffers_of_parts_that_are_not_called_change_once_a_step() -> None:
    torch.manual_seed(0)
    model, data = Holder().double(), batch(8, 5, 3)
    once = 0.1 * model.first(data[0]).mean(0).detach()
    AverageGradient(torch.optim.SGD(model.parameters(), lr=0.5), iterations=3).step(closure_of(model, data))
    torch.testing.assert_close(model.norm.running_mean, once, rtol=0, atol=1e-14)


class Queries(nn.Module):
    """A linear layer whose input is a parameter."""

    def __init__(self, *, viewed: bool, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.weight = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(3, 5))
        self.viewed, self.named = viewed, named

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries * 1 if self.viewed else self.queries
        if self.named:
            return torch.tanh(F.linear(input=queries, weight=self.weight)) + x
        return torch.tanh(F.linear(queries, self.weight)) + x


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
def test_the_midpoint_of_a_layer_that_is_given_a_parameter(viewed: bool, named: bool) -> None:
    model = Queries(viewed=viewed, named=named).double()
    data = batch(8, 3, 3)
    q, w = model.queries.detach().clone(), model.weight.detach().clone()
    z = q @ w.T
    out = torch.tanh(z) + data[0]
    back = 2 * (out - data[1]) / data[1].numel()
    g_z = back * (1 - torch.tanh(z) ** 2)
    q_after, w_after = q - 2.0 * g_z @ w, w - 2.0 * g_z.T @ q
    z_after = q_after @ w_after.T
    a_z = back * (torch.tanh(z_after) - torch.tanh(z)) / (z_after - z)
    a_q, a_w = a_z @ (w + w_after) / 2, a_z.T @ (q + q_after) / 2
    assert not torch.equal(a_w.sign(), (g_z.T @ q).sign())
    AverageGradient(torch.optim.SGD(model.parameters(), lr=2.0), linear="midpoint").step(closure_of(model, data))
    for got, start, after, a in ((model.queries, q, q_after, a_q), (model.weight, w, w_after, a_w)):
        torch.testing.assert_close(got.detach(), start - (after - start).abs() * a.sign(), rtol=0, atol=1e-12)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.overrides.wrap_torch_function(lambda x, scale: (x,))
def tanh_of(x: Tensor, scale: float) -> Tensor:
    return torch.tanh(scale * x)


@torch.overrides.wrap_torch_function(lambda x, *, several: (x,))
def in_one_node_or_several(x: Tensor, *, several: bool) -> Tensor:
    return torch.atan(torch.sinh(x).neg()) if several else torch.tanh(x)


class Square(torch.autograd.Function):
    """Something that no mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


@pytest.mark.parametrize("function", [swish, nn.ReLU, nn.ReLU(), Square.apply, lambda x: x])
def test_functions_whose_calls_cannot_be_seen_are_refused(function: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ArgumentError, match=r"`functions` must be functions of torch, or decorated with torch.over"):
        AverageGradient(optimizer, functions={**FUNCTIONS, function: secant})


def test_a_decorated_function_is_averaged_like_that_of_torch() -> None:
    decorated = torch.overrides.wrap_torch_function(lambda x: (x,))(swish)
    states = []
    for function in (decorated, F.silu):
        model, data = chain(function, [5, 6, 6, 3]), batch(8, 5, 3)
        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3), functions={function: secant})
        for _ in range(3):
            optimizer.step(closure_of(model, data))
        states.append(state_of(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [lambda x: torch.tanh(x, out=None), lambda x: torch.ops.aten.tanh(self=x), lambda x: tanh_of(scale=1.0, x=x)],
    ids=["without out", "self", "x"],
)
def test_how_a_function_is_given_its_input_does_not_matter(call: Any) -> None:
    functions = {**FUNCTIONS, tanh_of: secant}
    found = []
    for function in (torch.tanh, call):
        model = chain(function, [5, 4, 4, 3])
        closure = closure_of(model, batch(8, 5, 3))
        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.5), functions=functions)
        for _ in range(3):
            optimizer.step(closure)
        found.append(state_of(model))
    assert_same(*found)


def test_a_function_may_leave_other_nodes_from_call_to_call() -> None:
    found = []
    for ways in ((False, True), (True, True)):
        model, data = chain(torch.tanh, [5, 4, 3]), batch(8, 5, 3)
        optimizer = AverageGradient(
            torch.optim.SGD(model.parameters(), lr=0.5), functions={in_one_node_or_several: secant}
        )
        for several in ways:
            before = state_of(model)
            model.function = partial(in_one_node_or_several, several=several)
            optimizer.step(closure_of(model, data))
            model.load_state_dict(before)
        optimizer.step(closure_of(model, data))
        found.append(state_of(model))
    assert_same(*found)


@pytest.mark.parametrize("size", [1, 6])
def test_other_arguments_may_be_tensors_that_the_closure_computes(size: int) -> None:
    torch.manual_seed(0)
    layer, bound = nn.Linear(5, 6).double(), nn.Parameter(torch.full((size,), -1.5, dtype=torch.float64))
    x = batch(8, 5, 3)[0]
    functions = {**FUNCTIONS, F.prelu: secant}
    optimizer = AverageGradient(torch.optim.SGD([*layer.parameters(), bound], lr=0.5), functions=functions)
    before = layer.weight.detach().clone()
    optimizer.step(lambda: F.prelu(layer(x), bound.exp()).square().mean())
    assert not torch.equal(layer.weight, before)


def test_the_input_of_a_frozen_first_layer_may_be_written_to() -> None:
    torch.manual_seed(0)
    found = []
    for written in (False, True):
        torch.manual_seed(0)
        frozen, layer, x = nn.Linear(5, 6).double().requires_grad_(False), nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
        optimizer = AverageGradient(torch.optim.SGD(layer.parameters(), lr=0.5))

        def loss(frozen: Any = frozen, layer: Any = layer, x: Tensor = x, written: bool = written) -> Tensor:
            inputs = x.clone()
            h = frozen(inputs)
            inputs = inputs.mul_(0.5) if written else inputs * 0.5
            return torch.tanh(layer(inputs) + h).square().mean()

        for _ in range(3):
            optimizer.step(loss)
        found.append(state_of(layer))
    assert_same(*found)


@torch.overrides.wrap_torch_function(lambda x: (x,))
def tanh_in_double(x: Tensor) -> Tensor:
    return torch.tanh(x.double())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_slopes_of_the_callers_may_be_of_any_type(dtype: torch.dtype) -> None:
    found = []
    for slope in (lambda x, *_: (x > 0).to(dtype), lambda x, *_: (x > 0).to(x.dtype)):
        model, data = chain(F.relu, [5, 6, 6, 3]), batch(8, 5, 3)
        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3), functions={F.relu: slope})
        for _ in range(3):
            optimizer.step(closure_of(model, data))
        found.append(state_of(model))
    assert_same(*found)


def test_a_function_may_return_another_type_than_it_is_given() -> None:
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(5, 4)), torch.randn(8, 5)
    before = weight.detach().clone()
    optimizer = AverageGradient(torch.optim.SGD([weight], lr=50.0), functions={tanh_in_double: secant})
    optimizer.step(lambda: tanh_in_double(x @ weight).square().mean())
    z = x @ before
    y = torch.tanh(z.double())
    back = 2 * y / y.numel()
    after = before - 50.0 * x.T @ (back * (1 - y**2)).float()
    average = x.T @ (back * (torch.tanh((x @ after).double()) - y) / (x @ after - z)).float()
    assert not torch.equal(average.sign(), (before - after).sign())
    torch.testing.assert_close(weight.detach(), before - (after - before).abs() * average.sign())


@pytest.mark.parametrize("linear", ["plain", "midpoint"])
@pytest.mark.parametrize("inferred", [(0,), (0, 1, 2)])
def test_layers_in_inference_mode_where_there_are_no_gradients(linear: Any, inferred: tuple[int, ...]) -> None:
    found = []
    for places in ((), inferred):
        model, data = chain(torch.tanh, [5, 6, 6, 3]), batch(8, 5, 3)

        def loss(model: Any = model, data: Any = data, places: Any = places) -> Tensor:
            x = data[0]
            for place, layer in enumerate(model.layers):
                x = torch.tanh(x) if place else x
                with torch.inference_mode(place in places and not torch.is_grad_enabled()):
                    x = layer(x)
            return F.mse_loss(x, data[1])

        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3), iterations=3, linear=linear)
        for _ in range(3):
            optimizer.step(loss)
        found.append(state_of(model))
    assert_same(*found)


def test_a_default_device_that_is_not_the_models_changes_nothing() -> None:
    found = []
    for device in ("cpu", "meta"):
        model, data = chain(torch.tanh, [5, 150, 150, 3]), batch(8, 5, 3)
        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3))
        with torch.device(device):
            for _ in range(3):
                optimizer.step(closure_of(model, data))
        found.append(state_of(model))
    assert_same(*found)


def test_the_default_device_at_its_import_changes_nothing() -> None:
    code = """
import torch
torch.set_default_device("meta")
from gradmon_integrations.workloads.average_gradient.slopes import resting
assert resting(torch.tensor([0.0, 1.0], device="cpu")).tolist() == [1.0, 0.0]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("rows", [100, 1000])
def test_a_finite_slope_takes_the_place_of_an_infinite_derivative(rows: int) -> None:
    bias, data, targets = nn.Parameter(torch.zeros(60)), torch.full((rows, 60), 4.0), torch.ones(rows, 60)
    data[0] = 0.0
    base = torch.optim.SGD([bias], lr=0.01)
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_([bias], 1.0))
    optimizer = AverageGradient(base, functions={torch.sqrt: secant})
    optimizer.step(lambda: (torch.sqrt(data + bias) - targets).square().sum())
    # One row of -2 times the slope 10, and all others of 2 times about 1/4: SGD alone goes the other way.
    torch.testing.assert_close(bias.detach(), torch.full((60,), -0.01))


class Bounded(nn.Module):
    """Each call scales rows of its table down, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.last = nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 6), nn.Linear(6, 9)
        self.last.weight = self.table.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(self.table(rows).mean(1))))


@pytest.mark.parametrize("iterations", [2, 3])
@pytest.mark.parametrize("measure", [False, True])
def test_steps_keep_their_lengths_where_the_closure_writes_to_weights(iterations: int, measure: bool) -> None:
    torch.manual_seed(0)
    model, rows, targets = Bounded().double(), torch.randint(9, (8, 5)), torch.randint(9, (8,))
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.5), iterations=iterations, measure=measure)
    for _ in range(3):
        model(rows)
        twin = copy.deepcopy(model)
        before = [p.detach().clone() for p in twin.parameters()]
        F.cross_entropy(twin(rows), targets).backward()
        torch.optim.SGD(twin.parameters(), lr=0.5).step()
        optimizer.step(lambda: F.cross_entropy(model(rows), targets))
        for start, base, found in zip(before, twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close((found - start).abs(), (base - start).abs(), rtol=1e-9, atol=1e-12)
