"""What is worked out together, in parts or in place is, bit by bit, what it is one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from gradmon_integrations.workloads.average_gradient import AverageGradient, averaging, update
from gradmon_integrations.workloads.average_gradient.calls import Call
from gradmon_integrations.workloads.average_gradient.secants import Secants
from gradmon_integrations.workloads.average_gradient.slopes import Form, secant
from gradmon_integrations.workloads.average_gradient.update import signed_step
from tests.integrations.workloads.average_models import assert_same, state_of

SIZES = [(3,), (7, 5), (7, 5), (4, 4), (), (128, 129), (300, 200), (257, 521)]


def waiting(dtype: torch.dtype, near: float) -> list[tuple[Call, Tensor, Tensor]]:
    """Calls of all sizes, of whose inputs about a part `near` hardly moves, if at all."""
    torch.manual_seed(0)
    calls: list[tuple[Call, Tensor, Tensor]] = []
    for size in SIZES + SIZES[:5] * 2:
        x = torch.randn(size, dtype=dtype)
        moved = torch.randn(size, dtype=dtype)
        still = torch.rand(size) < near
        moved[still] = torch.tensor([0.0, 1e-8, -1e-8, 1.19e-7])[torch.randint(4, (int(still.sum()),))].to(dtype)
        call = Call(Form(torch.tanh, "tanh", secant), x.shape, (), None)
        call.x, call.y = x, x.tanh()
        calls.append((call, x + moved, (x + moved).tanh()))
    return calls


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 0.0), (torch.float32, 1e-4), (torch.float64, 0.3), (torch.float32, 1.0)]
)
def test_slopes_that_are_worked_out_together_are_those_of_each_call(dtype: torch.dtype, near: float) -> None:
    secants = Secants()
    for _ in range(2):  # the second time into the same memory
        together, alone = waiting(dtype, near), waiting(dtype, near)
        for call, x_after, y_after in together:
            assert secants.take(call, x_after, y_after)
        assert secants.finish()
        for (call, _, _), (other, x_after, y_after) in zip(together, alone, strict=True):
            other.between(x_after, y_after)
            assert call.slope is not None
            assert other.slope is not None
            assert torch.equal(call.slope, other.slope)
            assert other.near is not None
            assert torch.equal(other.near.bool(), (x_after - call.x).abs() <= 1.19e-7)
            assert torch.equal(other.near, torch.zeros_like(x_after) if call.near is None else call.near)


def test_what_does_not_lie_in_order_or_has_another_slope_does_not_wait() -> None:
    call, x_after, y_after = next(found for found in waiting(torch.float32, 0) if found[1].shape == (4, 4))
    secants = Secants()
    assert not secants.take(call, x_after.T, y_after)
    assert not secants.take(call, x_after.double(), y_after)
    with torch.inference_mode():
        unseen = y_after.clone()
    assert not secants.take(call, x_after, unseen)
    call.form = Form(torch.tanh, "tanh", lambda x, y, x_after, y_after: y_after - y)
    assert not secants.take(call, x_after, y_after)
    assert secants.finish()
    assert call.slope is None


def test_small_tensors_that_do_not_lie_in_order_wait_where_their_input_after_the_step_does() -> None:
    call, x_after, y_after = next(found for found in waiting(torch.float32, 0) if found[1].shape == (4, 4))
    call.between(x_after, y_after)
    wanted, call.slope = call.slope, None
    assert wanted is not None
    assert call.x is not None
    assert call.y is not None
    call.keep(call.x.T.contiguous().T, call.y.T.contiguous().T)
    secants = Secants()
    assert secants.take(call, x_after, y_after.T.contiguous().T)
    assert secants.finish()
    assert torch.equal(call.slope, wanted)


def test_slopes_are_of_the_type_of_the_inputs_before_the_step() -> None:
    call, x_after, y_after = next(found for found in waiting(torch.float32, 0) if found[1].shape == (4, 4))
    secants = Secants()
    assert secants.take(call, x_after.double(), y_after.double())
    assert secants.finish()
    assert call.slope is not None
    found = call.slope
    call.between(x_after.double(), y_after.double())
    assert found.dtype is torch.float32
    assert torch.equal(found, call.slope)


@pytest.mark.parametrize("written", [1, 2])
def test_what_is_written_to_while_it_waits_is_found_out(written: int) -> None:
    found = next(found for found in waiting(torch.float32, 0) if found[1].shape == (7, 5))
    secants = Secants()
    assert secants.take(*found)
    found[written].mul_(2)  # type: ignore[union-attr]
    assert not secants.finish()
    assert found[0].slope is None
    assert secants.finish()  # and it is forgotten


def wide(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 130), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 3))
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, 3.0)
    return model


def trained(
    model: nn.Module, forward: Callable[[Tensor], Tensor], *, together: bool = True, steps: int = 2, **options: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(150, 6, generator=generator), torch.randn(150, 3, generator=generator)
    optimizer = AverageGradient(torch.optim.RMSprop(model.parameters(), lr=0.01), **options)
    if not together:
        optimizer._secants = None
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(forward(x), t))
    assert (optimizer._secants is not None) == together
    return state_of(model)


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_a_network_trains_alike_whether_slopes_are_worked_out_together(iterations: int) -> None:
    models = [wide(450), wide(450)]  # 150 x 450 is more than is worked on at a time
    found = [trained(m, m, together=way, iterations=iterations) for m, way in zip(models, (True, False), strict=True)]
    assert_same(*found)


@pytest.mark.parametrize("iterations", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"measure": True}, {"linear": "midpoint"}])
def test_weights_are_the_same_whether_they_are_stepped_together_in_parts_or_with_little_spare_memory(
    iterations: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for small, part, kept, huge in (
        (1 << 14, 1 << 16, 1 << 26, 1 << 30),
        (0, 1 << 10, 0, 1 << 8),
        (1 << 30, 1 << 16, 0, 0),
    ):
        monkeypatch.setattr(update, "SMALL", small)
        monkeypatch.setattr(update, "_CHUNK", part)
        monkeypatch.setattr(update, "KEPT", kept)
        monkeypatch.setattr(averaging, "_HUGE", huge)
        model = wide(190)
        found.append(trained(model, model, iterations=iterations, **options))
        assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_gradients_of_huge_weights_are_never_there_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "SMALL", 0)
    monkeypatch.setattr(averaging, "_HUGE", 100)
    model, found = wide(190), list[tuple[bool, int]]()
    gradient = averaging.Averaging.gradient

    def watched(self: averaging.Averaging, parameters: Sequence[Tensor], *, last: bool) -> list[Tensor]:
        gradients = gradient(self, parameters, last=last)
        found.append((last, sum(each.untyped_storage().nbytes() for each in gradients if each.numel() > 100)))
        return gradients

    monkeypatch.setattr(averaging.Averaging, "gradient", watched)
    trained(model, model, iterations=4, steps=1)
    huge = [parameter for parameter in model.parameters() if parameter.numel() > 100]
    assert found == [(False, 4 * len(huge)), (False, 4 * len(huge)), (True, sum(each.nbytes for each in huge))]


@pytest.mark.parametrize("what", ["input", "output"])
def test_a_closure_that_writes_in_place_only_without_gradients_is_called_again(what: str) -> None:
    def forward(model: nn.Sequential, x: Tensor, *, writing: bool) -> Tensor:
        z = model[0](x)
        h = torch.tanh(z)
        after = h * 3.0
        if writing and not torch.is_grad_enabled():
            (z if what == "input" else h).mul_(3.0)
        return model[8](torch.tanh(model[6](torch.tanh(model[4](after)))))

    models = [wide(20), wide(20)]
    plain = trained(models[0], lambda x: forward(models[0], x, writing=False), iterations=3)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(150, 6, generator=generator), torch.randn(150, 3, generator=generator)
    optimizer = AverageGradient(torch.optim.RMSprop(models[1].parameters(), lr=0.01), iterations=3)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(forward(models[1], x, writing=True), t)

    for _ in range(2):
        optimizer.step(closure)
    assert calls == 2 * 3 + 1  # it is known from then on
    assert_same(plain, state_of(models[1]))


def test_a_closure_that_turns_gradients_on_steps_as_one_that_does_not() -> None:
    models = [wide(190), wide(190)]

    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return models[1](x)

    assert_same(trained(models[0], models[0], iterations=3), trained(models[1], forward, iterations=3))


def test_a_closure_that_turns_inference_on_where_there_are_no_gradients() -> None:
    models = [wide(190), wide(190)]

    def forward(x: Tensor) -> Tensor:
        with torch.inference_mode(not torch.is_grad_enabled()):
            return models[1](x)

    assert_same(trained(models[0], models[0], iterations=3), trained(models[1], forward, iterations=3))


def test_the_caller_may_keep_gradients_that_a_step_shows_him() -> None:
    model = wide(190)
    seen: list[tuple[Tensor, Tensor]] = []
    for place in (1, 5, 7):
        model[place].register_full_backward_hook(
            lambda module, inputs, outputs: seen.append((inputs[0], inputs[0] + 0))
        )
    model[2].weight.register_hook(lambda g: seen.append((g, g + 0)))
    trained(model, model, iterations=4)
    assert len(seen) == 4 * 4 * 2
    assert all(torch.equal(kept, then) for kept, then in seen)


@pytest.mark.parametrize("iterations", [2, 3])
def test_gradients_that_repeat_one_number_or_are_the_same_tensor(iterations: int) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(200, 100).double()) for _ in range(4)]
    constant = torch.randn(200, 100).double()
    before, kept = [w.detach().clone() for w in weights], constant.clone()

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return (w * constant).sum()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return constant

    def closure() -> Tensor:
        one, two, three, four = weights
        return one.sum() + 0 * torch.tanh(one[0, 0]) + (two + three).square().sum() + Times.apply(four)

    AverageGradient(torch.optim.SGD(weights, lr=0.1), iterations=iterations).step(closure)
    assert torch.equal(constant, kept)
    gradients = [torch.ones_like(constant), *[2 * (before[1] + before[2])] * 2, constant]
    for w, start, g in zip(weights, before, gradients, strict=True):
        torch.testing.assert_close(w.detach(), start - 0.1 * g, rtol=0, atol=1e-12)


def test_a_step_to_infinity_stands_where_the_signs_agree_and_a_zero_stays() -> None:
    before, gradient = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, 1.0])
    after, average = torch.tensor([-torch.inf, torch.inf, -torch.inf, 0.0]), torch.tensor([2.0, -3.0, 0.0, 0.0])
    out = torch.empty(4)
    signed_step(before, after, gradient, average, out)
    assert torch.equal(out, torch.tensor([-torch.inf, torch.inf, 1.0, 1.0]))


def test_of_weights_that_climb_no_more_is_turned_around_than_their_gradients() -> None:
    class Turned(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            self.elements += found.numel() if func is torch.ops.aten.neg.default else 0
            return found

    model = wide(190)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(150, 6, generator=generator)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=1e-3, maximize=True))
    with Turned() as turned:
        optimizer.step(lambda: model(x).square().mean())
    # By the base, and for the signs of the average.
    assert turned.elements == 2 * sum(parameter.numel() for parameter in model.parameters())
