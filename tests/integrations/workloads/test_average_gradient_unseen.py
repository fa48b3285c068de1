"""The average gradient where something is only seen late: nonlinearities that are hidden, and buffers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import GradmonError
from gradmon_integrations.workloads.average_gradient import AverageGradient, secant
from tests.integrations.workloads.average_models import assert_same, batch, state_of


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_a_script_is_refused_also_once_it_was_compiled(calls_before: int) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), torch.randn(8, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch discourage TorchScript
        script = torch.jit.script(model)
    for _ in range(calls_before):
        script(x).sum().backward()
    before = state_of(model)
    with pytest.raises(GradmonError, match="TorchScript"):
        AverageGradient(sgd(model)).step(lambda: script(x).mean())
    assert_same(before, state_of(model))


def test_a_function_that_calls_an_averaged_one_itself_is_named() -> None:
    layer, x = nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
    with pytest.raises(GradmonError, match=r"a function that calls one of them itself.* add that one to `functions`"):
        AverageGradient(sgd(layer), functions={F.elu: secant}).step(lambda: F.selu(layer(x)).mean())
    AverageGradient(sgd(layer), functions={F.elu: secant, F.selu: secant}).step(lambda: F.selu(layer(x)).mean())


@pytest.mark.parametrize(("function", "linear"), [(F.softsign, "plain"), (torch.relu, "midpoint")])
def test_functions_inside_of_vmap_are_refused(function: Any, linear: Any) -> None:
    layer, x = nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
    before = state_of(layer)
    with pytest.raises(GradmonError, match=r"is called inside of a transform of torch.func, such as vmap"):
        AverageGradient(sgd(layer), linear=linear).step(lambda: torch.vmap(lambda row: function(layer(row)))(x).mean())
    assert_same(before, state_of(layer))


def test_data_may_be_made_by_vmap() -> None:
    layer, inputs = nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
    kernel, found = torch.randn(5, 5, dtype=torch.float64), []
    before = state_of(layer)

    def row(x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, kernel))

    for function in (row, torch.vmap(row)):
        layer.load_state_dict(before)
        AverageGradient(sgd(layer)).step(lambda function=function: torch.tanh(layer(function(inputs))).square().mean())
        found.append(state_of(layer))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-12, atol=1e-12)


def test_a_module_that_calls_another_function_than_it_is_named_for_is_not_passed_over() -> None:
    layer, x = nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
    for functions, model in (({F.relu6: secant}, F.relu6), ({F.hardtanh: secant}, nn.ReLU6())):
        AverageGradient(sgd(layer), functions=functions).step(lambda model=model: model(layer(x)).mean())
    with pytest.raises(GradmonError, match="HardtanhBackward0, which was not seen being called"):
        AverageGradient(sgd(layer), functions={F.relu6: secant}).step(lambda: nn.ReLU6()(layer(x)).mean())


@torch.overrides.wrap_torch_function(lambda x, **_: (x,))
def heaviside(x: Tensor, *, joined: bool) -> Tensor:
    return (x > 0).to(x.dtype) + (0 * x if joined else 0)


def test_a_function_whose_result_has_no_graph_is_refused() -> None:
    layer, x = nn.Linear(5, 6).double(), batch(8, 5, 3)[0]
    optimizer = AverageGradient(sgd(layer), functions={heaviside: secant})
    for _ in range(2):
        before = state_of(layer)
        optimizer.step(lambda: heaviside(layer(x), joined=True).mean())
        assert_same(before, state_of(layer))
        with pytest.raises(GradmonError, match="heaviside is to be averaged, but returned a tensor without a graph"):
            optimizer.step(lambda: (heaviside(layer(x), joined=False) + layer(x)).mean())
        assert_same(before, state_of(layer))


def test_buffers_are_put_back_also_in_the_step_after_one_that_failed_early() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh()).double(), batch(8, 5, 3)[0]
    optimizer = AverageGradient(sgd(model))
    left = 2

    def early() -> Tensor:
        raise RuntimeError("broken")

    def late() -> Tensor:
        nonlocal left
        loss = model(x).mean()
        left -= 1
        if not left:
            raise RuntimeError("broken")
        return loss

    before = state_of(model)
    for closure in (early, late):
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(closure)
        assert_same(before, state_of(model))
