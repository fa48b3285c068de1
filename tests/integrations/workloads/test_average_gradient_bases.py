"""The average gradient around base optimizers that climb, write into gradients, have hooks or overflow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient import AverageGradient
from gradmon_integrations.workloads.average_gradient.update import signed_step
from tests.integrations.workloads.average_models import assert_same, batch, chain, closure_of, state_of

WIDTHS = [5, 150, 150, 3]  # one weight is larger than what is worked on together


def trained(make: Callable[[Any], torch.optim.Optimizer], sign: float = 1.0, steps: int = 4) -> dict[str, Tensor]:
    model, data = chain(torch.tanh, WIDTHS), batch(16, 5, 3)
    optimizer = AverageGradient(make(model.parameters()), iterations=3)
    for _ in range(steps):
        optimizer.step(lambda: sign * F.mse_loss(model(data[0]), data[1]))
    return state_of(model)


def test_climbing_a_loss_is_descending_its_negative() -> None:
    down = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    up = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.5, maximize=True), sign=-1.0)
    assert_same(down, up)


def test_only_the_groups_that_climb_climb() -> None:
    def mixed(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "maximize": True}, {"params": rest}], lr=5.0)

    model, data = chain(torch.tanh, [6, 8, 2]), batch(6, 6, 2)
    reference, x, t = copy.deepcopy(model), *data
    AverageGradient(mixed(model.parameters())).step(closure_of(model, data))

    second = reference.layers[1]
    gradients = torch.autograd.grad(F.mse_loss(reference(x), t), list(reference.parameters()))
    before = [p.detach().clone() for p in reference.parameters()]
    signs = [1.0, -1.0, -1.0, -1.0]
    after = [w + sign * 5.0 * g for w, sign, g in zip(before, signs, gradients, strict=True)]
    z, z_after = x @ before[0].T + before[1], x @ after[0].T + after[1]
    slope = (torch.tanh(z_after) - torch.tanh(z)) / (z_after - z)
    back = 2 * (second(torch.tanh(z)) - t) / t.numel()
    inner = back @ before[2] * slope
    average = [inner.T @ x, inner.sum(0), back.T @ torch.tanh(z), back.sum(0)]
    assert not torch.equal(average[0].sign(), gradients[0].sign())
    for got, w, w_after, a, sign in zip(model.parameters(), before, after, average, signs, strict=True):
        torch.testing.assert_close(got.detach(), w + sign * (w_after - w).abs() * a.sign(), rtol=0, atol=1e-12)


class Writing(torch.optim.Optimizer):
    """Plain descent that leaves garbage in the gradients, as old optimizers do with weight decay."""

    def __init__(self, parameters: Any, hidden: bool) -> None:
        super().__init__(parameters, {"lr": 0.5})
        self.hidden = hidden

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])
                gradient = parameter.grad.data if self.hidden else parameter.grad
                gradient.mul_(-1)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_base_that_writes_into_gradients_steps_as_one_that_does_not(hidden: bool) -> None:
    plain = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=False))
    writing = trained(lambda parameters: Writing(parameters, hidden))
    for name, value in plain.items():
        torch.testing.assert_close(writing[name], value, rtol=0, atol=1e-15)


def test_nesterov_with_foreach_steps_as_without() -> None:
    one, other = (
        trained(lambda parameters, foreach=foreach: torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach
        ))
        for foreach in (False, True)
    )  # fmt: skip
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


def test_a_hook_may_put_other_gradients_in_the_place_of_those_found() -> None:
    def hooked(replace: bool) -> dict[str, Tensor]:
        model, data = nn.Sequential(nn.Linear(5, 150), nn.Linear(150, 150), nn.Linear(150, 3)).double(), batch(8, 5, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel(), dtype=torch.float64).view_as(parameter))
        optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.5), measure=True)

        def swap(*_: Any) -> None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                if replace:
                    parameter.grad = parameter.grad.neg()
                else:
                    parameter.grad.neg_()

        optimizer.base.register_step_pre_hook(swap)
        optimizer.step(closure_of(model, data))
        return state_of(model)

    assert_same(hooked(replace=True), hooked(replace=False))


def test_a_parameter_that_a_hook_takes_the_gradient_off_stays() -> None:
    model, data = chain(torch.tanh, [5, 6, 3]), batch(8, 5, 3)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.5))
    frozen = model.layers[0].weight
    optimizer.base.register_step_pre_hook(lambda *_: setattr(frozen, "grad", None))
    before = state_of(model)
    optimizer.step(closure_of(model, data))
    after = state_of(model)
    assert torch.equal(before["layers.0.weight"], after["layers.0.weight"])
    assert not torch.equal(before["layers.1.weight"], after["layers.1.weight"])


def test_a_step_to_infinity_stands_where_the_average_is_not_a_number() -> None:
    before, gradient = torch.ones(3), torch.tensor([1.0, -1.0, 1.0])
    after = torch.tensor([-torch.inf, torch.inf, 0.0])
    out = torch.empty(3)
    signed_step(before, after, gradient, torch.tensor([torch.nan, torch.nan, -1.0]), out)
    assert torch.equal(out, torch.tensor([-torch.inf, torch.inf, 2.0]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_fused_bases_step_weights_in_any_order_of_memory_as_others_do(base: Any) -> None:
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten()).double()
        model.append(nn.Linear(16, 3).double())
        model[5].weight.data = model[5].weight.data.T.contiguous().T
        images, targets = torch.randn(8, 3, 6, 6).double(), torch.randn(8, 3).double()
        optimizer = AverageGradient(base(model.parameters(), lr=0.1, fused=fused), iterations=3)
        for memory in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            model.to(memory_format=memory)
            for held in optimizer.state.values():
                for name, value in held.items():
                    if value.ndim == 4:
                        held[name] = value.contiguous(memory_format=memory)
            optimizer.step(closure_of(model, (images, targets)))
        found.append(state_of(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def test_a_small_gradient_out_of_order_that_is_written_to_is_found_again() -> None:
    found = []
    for make in (lambda weights: Writing(weights, hidden=True), lambda weights: torch.optim.SGD(weights, lr=0.5)):
        weight = nn.Parameter(torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.7, -0.6]]).double().T)
        AverageGradient(make([weight])).step(lambda weight=weight: torch.tanh(weight).square().sum())
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data * 2,
        lambda data: (data * 2).T.contiguous().T,
        lambda data: data[:, :4],
        lambda data: data[:, :4].clone(),
        lambda data: data.T,
        lambda data: data.float(),
    ],
    ids=["values", "order", "part", "copy of a part", "view", "type"],
)
@pytest.mark.parametrize("size", [6, 150])
def test_weights_whose_data_is_exchanged_between_steps_are_stepped_from_there(
    size: int, change: Callable[[Tensor], Tensor]
) -> None:
    def loss(weights: list[Tensor]) -> Tensor:
        return sum((torch.tanh(weight).square().mean() for weight in weights), torch.zeros(()))

    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, size, generator=generator).double()) for _ in range(3)]
    optimizer = AverageGradient(torch.optim.SGD(weights, lr=0.5), iterations=3)
    for _ in range(2):
        optimizer.step(lambda: loss(weights))
    old = weights[1].data
    kept = old.clone()
    weights[1].data = change(old)
    fresh = [nn.Parameter(weight.detach().clone()) for weight in weights]
    AverageGradient(torch.optim.SGD(fresh, lr=0.5), iterations=3).step(lambda: loss(fresh))
    optimizer.step(lambda: loss(weights))
    for weight, expected in zip(weights, fresh, strict=True):
        assert torch.equal(weight, expected)
    if weights[1].untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
        assert torch.equal(old, kept)


def test_weights_that_come_to_share_memory_are_found_out() -> None:
    first, second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = AverageGradient(torch.optim.SGD([first, second], lr=0.1))
    optimizer.step(lambda: torch.tanh(first @ second).square().sum())
    second.data = first.data
    with pytest.raises(GradmonError, match="Two parameters share memory"):
        optimizer.step(lambda: torch.tanh(first @ second).square().sum())
