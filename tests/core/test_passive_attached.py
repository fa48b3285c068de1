"""What is attached to the model for passive numbers, and when nothing may be."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import every
from tests.core.passive import (
    NAMES,
    assert_right,
    attached,
    data,
    masked,
    mlp,
    mse,
    ordinary_step,
    same_weights,
    sgd,
    shares,
    watching,
)
from tests.zoo.problem import classify, net, normal


class Look(nn.Module):
    """Notes what is attached to a model while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.look: Callable[[], Any] = dict

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.look())
        return x


def test_nothing_is_attached_in_steps_that_are_not_scheduled():
    look = Look()
    model = nn.Sequential(mlp()[0], look, *mlp()[1:])
    look.look = lambda: attached(model)
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(3))
    assert attached(model) == clean
    for number, batch in enumerate(data(6, 6, 6, 6, 6, 6, 6), 1):
        due = number % 3 == 0
        H = shares(model, batch)
        look.seen.clear()
        optimizer.zero_grad()
        value = mse(model, batch)
        look.seen.append(attached(model))
        value.backward()
        look.seen.append(attached(model))
        optimizer.step()
        look.seen.append(attached(model))
        monitor.step(batch)
        if due:
            assert_right(monitor.readings, H)
        else:
            assert all(seen == clean for seen in look.seen)
        if (number + 1) % 3:
            assert attached(model) == clean
    assert monitor.readings["noise_scale"].step == 6
    monitor.close()
    assert attached(model) == clean
    assert not monitor.failures


@pytest.mark.parametrize("place", ["start", "in_forward", "after_forward", "in_backward", "after_backward", "end"])
def test_close_in_the_middle(place):
    results = []
    for monitored in (False, True):
        look, (batch, other) = Look(), data(6, 6)
        model = nn.Sequential(mlp()[0], look, *mlp()[1:])
        clean = attached(model)
        optimizer = sgd(model)
        monitor = watching(model, optimizer) if monitored else None

        def close(now, monitor=monitor, model=model, clean=clean):
            if now == place and monitor is not None:
                monitor.close()
                if not now.startswith("in"):
                    assert attached(model) == clean

        close("start")
        look.look = lambda close=close: close("in_forward")
        out = model(batch[0])
        out.register_hook(lambda grad, close=close: close("in_backward"))
        value = F.mse_loss(out, batch[1])
        close("after_forward")
        value.backward()
        close("after_backward")
        optimizer.step()
        close("end")
        look.look = dict
        for step in (batch, other):
            if monitor is not None:
                monitor.step(step)
                assert attached(model) == clean
                assert not monitor.failures
            optimizer.zero_grad()
            mse(model, step).backward()
            optimizer.step()
        assert monitor is None or not set(NAMES) & set(monitor.readings)
        results.append(model)
    assert same_weights(*results)


def test_disabled(monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    look = Look()
    model = nn.Sequential(mlp()[0], look, *mlp()[1:])
    look.look = lambda: attached(model)
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    assert all(seen == clean for seen in look.seen)
    assert monitor.readings == {}
    assert monitor.coverage == {}


def test_what_a_step_has_seen_is_let_go():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    alive = []
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(args[0])))
    for batch in batches:
        ordinary_step(model, optimizer, monitor, batch)
    del alive[: len(alive) - 2]  # those of the last step's own pass
    gc.collect()
    assert len(alive) == 2
    assert [ref() for ref in alive] == [None, None]


def test_resumed_run_listens_to_the_step_that_is_due():
    model, batches = mlp(), data(6, 6, 6, 6)
    optimizer = sgd(model)
    first = watching(model, optimizer, schedule=every(3))
    for batch in batches[:2]:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        first.step(batch)
    state = first.state_dict()
    first.close()
    second = watching(model, optimizer, schedule=every(3))
    second.load_state_dict(state)
    ordinary_step(model, optimizer, second, batches[2])
    assert second.steps == 3
    assert not second.failures


def test_two_monitors_on_one_model():
    model, (batch, other) = mlp(), data(6, 6)
    clean = attached(model)
    optimizer = sgd(model)
    one, two = watching(model, optimizer), watching(model, optimizer, schedule=every(2), mask=gradmon.Mask(0.5, 3))
    for step in (batch, other):
        H = shares(model, step)
        optimizer.zero_grad()
        mse(model, step).backward()
        optimizer.step()
        one.step(step)
        two.step(step)
        assert_right(one.readings, H)
    kept, factors = masked(model, H, 0.5)
    assert_right(two.readings, kept, width=H.shape[1], factors=factors)
    one.close()
    two.close()
    assert attached(model) == clean


def test_coverage_names_the_way_of_every_parameter():
    def forward(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
        x = m.conv(x).flatten(1) * m.gain + m.table(tokens)
        return m.head(m.cell(torch.tanh(x)))

    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(1, 2, 2), "gain": normal(8), "table": nn.Embedding(5, 8), "cell": nn.Linear(8, 4)}
    model = net(forward, head=nn.Linear(4, 3), never=nn.Linear(2, 2), **parts).double()
    model.head.bias.requires_grad_(False)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    batch = (torch.randn(4, 1, 3, 3).double(), torch.randint(5, (4,)), torch.randint(3, (4,)))
    ordinary_step(model, optimizer, monitor, batch, classify)
    ways = monitor.coverage
    assert set(ways) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert ways["conv.weight"] == "conv2d"
    assert ways["cell.weight"] == ways["head.weight"] == "linear"
    assert ways["never.weight"] == ways["never.bias"] == "unused"
    assert all(ways.values())
