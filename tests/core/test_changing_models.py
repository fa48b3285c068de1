"""What is trained changes between steps: frozen, unfrozen and exchanged layers, and weights that somebody moves."""

import math

import pytest
import torch
from torch import nn

from gradmon import Monitor, every
from gradmon.sinks import MemorySink

CHANGED = "which parameters are trained has changed since the step"
MOVED = "something other than the optimizer has moved the weights since the step"


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def freeze(model, _):
    model[2].requires_grad_(False)


def unfreeze(model, _):
    model[4].requires_grad_(True)


def other_of_the_same_shape(model, _):
    model[2].requires_grad_(False)
    model[4].requires_grad_(True)


def another_layer(model, optimizer):
    model[2] = nn.Linear(8, 8, bias=False)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def wider_numbers(model, _):
    model.double()


CHANGES = [freeze, unfreeze, other_of_the_same_shape, another_layer, wider_numbers]


def steps(loss, change, *, between=True, count=6, mask=None, at=3):
    """The readings of some steps; after one the model is changed, before the monitor is called or after."""
    model, sink = mlp(), MemorySink()
    model[4].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, loss, sinks=[sink], schedule=every(1), mask=mask)
    torch.manual_seed(1)
    for step in range(1, count + 1):
        dtype = model[0].weight.dtype
        batch = torch.randn(8, 6, dtype=dtype), torch.randint(3, (8,))
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        if step == at and not between:
            change(model, optimizer)
        monitor.step((batch[0].to(model[0].weight.dtype), batch[1]))
        if step == at and between:
            change(model, optimizer)
    assert not monitor.failures
    return {(r.name, r.step): r for r in sink.readings if r.layer is None}


@pytest.mark.parametrize("mask", [None, 0.3])
@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "passive"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_between_a_probe_and_the_next_batch(change, loss, mask):
    found = steps(loss, change, mask=mask)
    reading = found["step_condition", 3]
    assert math.isnan(reading.value)
    assert reading.reason == CHANGED
    for step in (1, 2, 4, 5):
        assert math.isfinite(found["step_condition", step].value), step
        assert math.isfinite(found["grad_norm", step].value)


@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "passive"])
@pytest.mark.parametrize("change", CHANGES[:4], ids=lambda change: change.__name__)
def test_between_the_step_and_the_monitor(change, loss):
    """As by a callback that comes before the monitor's."""
    found = steps(loss, change, between=False)
    assert found["update_ratio", 3].reason == CHANGED
    assert found["step_condition", 3].reason == CHANGED
    assert math.isfinite(found["update_ratio", 4].value)
    assert math.isfinite(found["step_condition", 4].value)


def saved_run(loss, trained):
    model = mlp()
    for place in (2, 4):
        model[place].requires_grad_(place in trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Monitor(model, optimizer, loss, sinks=[], schedule=every(1))


@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "passive"])
def test_between_an_interrupted_run_and_the_resumed_one(loss):
    """The same number of weights, of other layers."""
    state = None
    for trained in ((2,), (4,)):
        model, optimizer, monitor = saved_run(loss, trained)
        if state is not None:
            monitor.load_state_dict(state)
        batch = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if state is not None:
            assert monitor.readings["step_condition"].reason == CHANGED
            assert monitor.readings["step_condition"].step == 1
            assert not monitor.failures
        state = monitor.state_dict()


def moved(model, _):
    with torch.no_grad():
        model[0].weight.mul_(0.9)


def moved_and_put_back(model, _):
    """As by an average of the weights that takes their place for an evaluation, but for rounding."""
    with torch.no_grad():
        model[0].weight.add_(0.125).sub_(0.125)


def moved_and_copied_back(model, _):
    with torch.no_grad():
        kept = model[0].weight.clone()
        model[0].weight.zero_()
        model[0].weight.copy_(kept)


def test_passive_after_somebody_moved_the_weights():
    assert steps(None, moved)["step_condition", 3].reason == MOVED
    expected = steps(None, moved_and_copied_back)["step_condition", 3].value
    assert math.isfinite(expected)
    assert steps(None, moved_and_put_back)["step_condition", 3].value == pytest.approx(expected, rel=1e-3)


def test_passive_beside_another_optimizer_that_steps_first():
    """The gradient was taken before that one's step: the two steps cannot be told apart."""
    model, sink = mlp(), MemorySink()
    first, second = torch.optim.SGD(model[:2].parameters(), lr=0.1), torch.optim.SGD(model[2:].parameters(), lr=0.1)
    monitor = Monitor(model, second, None, sinks=[sink], schedule=every(1))
    for _ in range(3):
        batch = torch.randn(8, 6), torch.randint(3, (8,))
        model.zero_grad()
        cross_entropy(model, batch).backward()
        first.step()
        second.step()
        monitor.step(batch)
    reasons = [reading.reason for reading in sink.readings if reading.name == "step_condition" and not reading.layer]
    assert reasons == [MOVED, MOVED]


def adversaries(toggle, part=slice(None)):
    """The readings of two networks, of which each is frozen (or a part of it) while the other one is trained."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(*sizes[::-1])).double() for sizes in [(4, 6)] * 2]
    sinks = [MemorySink(), MemorySink()]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    monitors = [
        Monitor(*both, schedule=every(1), sinks=[sink]) for *both, sink in zip(networks, optimizers, sinks, strict=True)
    ]

    def frozen(network, yes):
        for parameter in list(network.parameters())[part]:
            parameter.requires_grad_(not (yes and toggle))

    for _ in range(4):
        x = torch.randn(8, 4).double()
        for place in (1, 0):
            frozen(networks[1 - place], True)
            optimizers[place].zero_grad()
            made = networks[0](x)
            networks[1](made if place == 0 else torch.stack([made, x])[0] - x).square().mean().backward()
            optimizers[place].step()
            monitors[place].step(x)
            frozen(networks[1 - place], False)
    return [{(r.name, r.step): r for r in sink.readings} for sink in sinks]


def test_two_networks_each_frozen_while_the_other_one_is_trained():
    for found, plain in zip(adversaries(True), adversaries(False), strict=True):
        for key in [(name, step) for name in ("grad_norm", "gradient_rank", "noise_scale") for step in range(1, 5)]:
            assert found[key].value == pytest.approx(plain[key].value, rel=1e-9), (key, found[key].reason)


def test_a_pass_with_some_parameters_frozen():
    found = adversaries(True, part=slice(2))[0]
    assert found["gradient_rank", 4].reason == "some of the parameters that are trained were frozen in a forward pass"
    assert found["grad_norm", 4].value > 0
