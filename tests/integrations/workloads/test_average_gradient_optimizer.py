"""The average gradient as an optimizer among others: groups, hooks, schedulers, copies, states, and the monitor."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Monitor, every
from gradmon_integrations.workloads.average_gradient import AverageGradient, relative_difference_metric
from gradmon_integrations.workloads.average_gradient.measurement import Measurement
from tests.integrations.workloads.average_models import assert_same, batch, closure_of, state_of


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, 3.0)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def test_groups_state_and_defaults_are_the_bases() -> None:
    model = network()
    base = adam(model)
    optimizer = AverageGradient(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    late = nn.Linear(2, 2).double()
    optimizer.add_param_group({"params": late.parameters(), "lr": 1.0})
    assert [group["lr"] for group in base.param_groups] == [0.05, 1.0]
    data = batch(8, 5, 3)
    optimizer.step(closure_of(model, data))
    assert model[0].weight.grad is not None
    optimizer.zero_grad()
    assert model[0].weight.grad is None
    assert "lr: 0.05" in repr(optimizer)


def test_a_scheduler_steps_it() -> None:
    model = network()
    optimizer = AverageGradient(adam(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for expected in (0.025, 0.0125):
        optimizer.step(closure_of(model, batch(8, 5, 3)))
        scheduler.step()
        assert optimizer.base.param_groups[0]["lr"] == expected


def test_hooks_around_a_step() -> None:
    model = network()
    optimizer = AverageGradient(adam(model))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.base.register_step_pre_hook(lambda *_: seen.append("base"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("state"))
    optimizer.step(closure_of(model, batch(8, 5, 3)))
    optimizer.state_dict()
    assert seen == ["before", "base", "after", "state"]


def test_gradients_can_be_clipped_by_a_hook_of_the_base() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    AverageGradient(base, iterations=3).step(closure_of(model, batch(8, 5, 3)))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_a_round_trip_of_its_state_continues_bit_by_bit() -> None:
    data = batch(8, 5, 3)
    model = network()
    optimizer = AverageGradient(adam(model), iterations=3, measure=True)
    for _ in range(3):
        optimizer.step(closure_of(model, data))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(closure_of(model, data))
    file.seek(0)
    saved = torch.load(file)
    twin = network(seed=1)
    twin.load_state_dict(saved["model"])
    other = AverageGradient(adam(twin), iterations=3, measure=True)
    other.load_state_dict(saved["optimizer"])
    for _ in range(3):
        other.step(closure_of(twin, data))
    assert_same(state_of(model), state_of(twin))
    assert other.relative_difference == optimizer.relative_difference
    adam(twin).load_state_dict(saved["optimizer"])  # the base alone takes it, too
    other.load_state_dict(adam(twin).state_dict())  # and the other way round
    assert math.isnan(other.relative_difference)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_train_alike(way: str) -> None:
    data = batch(8, 5, 3)
    model = network()
    optimizer = AverageGradient(adam(model), iterations=3)
    optimizer.step(closure_of(model, data))
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for _ in range(3):
        optimizer.step(closure_of(model, data))
        other.step(closure_of(twin, data))
    assert_same(state_of(model), state_of(twin))
    assert other.param_groups is other.base.param_groups is not optimizer.param_groups


def test_weights_stay_where_they_are_in_memory_and_say_that_they_changed() -> None:
    model = network()
    optimizer = AverageGradient(adam(model), iterations=3, measure=True)
    pointers = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    optimizer.step(closure_of(model, batch(8, 5, 3)))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))


def test_nothing_of_a_steps_graph_stays_in_memory() -> None:
    model, data = network(), batch(8, 5, 3)
    optimizer = AverageGradient(adam(model), linear="midpoint", iterations=3)
    held: list[weakref.ref[Any]] = []
    model[1].register_forward_hook(lambda module, args, output: held.append(weakref.ref(output)))
    gc.disable()
    try:
        for _ in range(2):
            optimizer.step(closure_of(model, data))
        assert len(held) == 6
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


def test_other_leaves_get_the_gradient_of_one_backward_pass() -> None:
    model, data = network(), batch(8, 5, 3)
    inputs = data[0].clone().requires_grad_()
    optimizer = AverageGradient(torch.optim.SGD(model[0].parameters(), lr=0.1), iterations=4)
    twin = copy.deepcopy(model)
    F.mse_loss(twin(data[0]), data[1]).backward()
    optimizer.step(lambda: F.mse_loss(model(inputs), data[1]))
    for a, b in zip(twin[2:].parameters(), model[2:].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        assert torch.equal(a, b)
    assert inputs.grad is not None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_may_take_gradients_off(set_to_none: bool) -> None:
    data = batch(8, 5, 3)
    models = [network(), network()]
    optimizers = [AverageGradient(adam(model), iterations=3) for model in models]

    def closure() -> Tensor:
        optimizers[1].zero_grad(set_to_none=set_to_none)
        return F.mse_loss(models[1](data[0]), data[1])

    for _ in range(3):
        optimizers[0].step(closure_of(models[0], data))
        optimizers[1].step(closure)
    assert_same(state_of(models[0]), state_of(models[1]))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_other_optimizers_of_the_same_kind_may_rebind_weights() -> None:
    class Rebinding(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data - group["lr"] * p.grad

    data = batch(8, 5, 3)
    models = [network(), network()]
    AverageGradient(torch.optim.SGD(models[0].parameters(), lr=0.1)).step(closure_of(models[0], data))
    AverageGradient(Rebinding(models[1].parameters(), lr=0.1)).step(closure_of(models[1], data))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-15)


def measured(model: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> tuple[AverageGradient, float]:
    """RD as it is defined, from losses at copies of the weights."""
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3), measure=True)
    closure = closure_of(model, data)
    base_changes, changes = [], []
    for _ in range(steps):
        twin = copy.deepcopy(model)
        base = torch.optim.SGD(twin.parameters(), lr=0.3)
        loss = F.mse_loss(twin(data[0]), data[1])
        loss.backward()
        base.step()
        base_changes.append(float(loss.detach() - F.mse_loss(twin(data[0]), data[1]).detach()))
        optimizer.step(closure)
        changes.append(float(loss.detach() - closure().detach()))
    base_mean, mean = sum(base_changes) / steps, sum(changes) / steps
    return optimizer, (mean - base_mean) / abs(base_mean)


def test_the_relative_difference_is_that_of_the_definition() -> None:
    optimizer, expected = measured(network(), batch(8, 5, 3), 6)
    assert optimizer.relative_difference == pytest.approx(expected, rel=1e-9)
    assert abs(expected) > 1e-3
    last = optimizer.measurement.last
    optimizer.measurement.reset()
    assert math.isnan(optimizer.relative_difference)
    assert math.isfinite(last)
    one, expected = measured(network(), batch(8, 5, 3), 1)
    assert one.relative_difference == one.measurement.last == pytest.approx(expected, rel=1e-9)


def test_without_a_denominator_there_is_no_relative_difference() -> None:
    measurement = Measurement()
    assert measurement.reason == "no step was measured: AverageGradient(..., measure=True), with at least 2 iterations"
    measurement.add(1.0, 1.0, 0.5)
    assert math.isnan(measurement.relative_difference)
    assert math.isnan(measurement.last)
    assert measurement.reason == "the base optimizer's steps would not have changed the loss"
    measurement.add(1.0, math.inf, 0.5)
    assert measurement.reason == "non-finite loss"
    measurement.reset()
    measurement.add(1.0, 1.5, 0.75)
    assert measurement.relative_difference == (0.25 + 0.5) / 0.5


def test_the_base_alone_differs_by_nothing() -> None:
    model = network()
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3), functions={}, measure=True)
    for _ in range(2):
        optimizer.step(closure_of(model, batch(8, 5, 3)))
    assert optimizer.relative_difference == 0


def test_the_monitor_sees_its_steps() -> None:
    model, data = network(), batch(8, 5, 3)
    optimizer = AverageGradient(adam(model), iterations=3, measure=True)

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(data[0]), data[1])

    def gradient(weights: dict[str, Tensor]) -> Tensor:
        twin = network()
        twin.load_state_dict(weights)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(twin, data), list(twin.parameters()))])

    names = ["update_ratio", "step_ratio", "grad_norm", "loss", "learning_rate"]
    metrics = [*names[:-1], "step_condition", relative_difference_metric(optimizer)]
    condition = None
    with Monitor(model, optimizer, loss, metrics=metrics, schedule=every(1), mask=None) as monitor:
        seen = Measurement()
        for _ in range(4):
            before = state_of(model)
            optimizer.step(lambda: loss(model, data))
            monitor.step(data)
            after = state_of(model)
            omega = torch.cat([(after[name] - before[name]).flatten() for name in before])
            size = torch.cat([value.flatten() for value in before.values()]).norm()
            moved, start = gradient(after) - gradient(before), gradient(before)
            readings = {name: monitor.readings[name].value for name in (*names, "relative_difference")}
            assert readings["update_ratio"] == pytest.approx(float(omega.norm() / size), rel=1e-9)
            assert readings["step_ratio"] == pytest.approx(float(moved.norm() / start.norm()), rel=1e-9)
            assert readings["grad_norm"] == pytest.approx(float(start.norm()), rel=1e-9)
            assert readings["learning_rate"] == 0.05
            last = {k: v - seen.state_dict()[k] for k, v in optimizer.measurement.state_dict().items()}
            assert readings["relative_difference"] == pytest.approx(
                (last["average"] - last["base"]) / abs(last["base"]), rel=1e-9
            )
            seen.load_state_dict(optimizer.measurement.state_dict())
            # It waits for the next batch, which here is the same one.
            if condition is not None:
                assert monitor.readings["step_condition"].value == pytest.approx(condition, rel=1e-9)
            condition = float(moved.norm() * size / (omega.norm() * start.norm()))
        assert not monitor.failures


def test_a_monitor_without_measured_steps_says_why() -> None:
    model, data = network(), batch(8, 5, 3)
    optimizer = AverageGradient(adam(model))
    with Monitor(
        model,
        optimizer,
        lambda model, data: F.mse_loss(model(data[0]), data[1]),
        metrics=[relative_difference_metric(optimizer)],
        schedule=every(1),
    ) as monitor:
        optimizer.step(closure_of(model, data))
        monitor.step(data)
        reading = monitor.readings["relative_difference"]
    assert math.isnan(reading.value)
    assert reading.reason == "no step was measured: AverageGradient(..., measure=True), with at least 2 iterations"
