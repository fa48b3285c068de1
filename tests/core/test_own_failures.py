"""What goes wrong in the monitor's own hooks and clocks reaches the training no more than anything else."""

import copy
import logging

import pytest
import torch
from torch import nn

from gradmon import Monitor, every
from gradmon._sandbox import quiet_depth
from gradmon._tensors import from_plain, to_plain
from gradmon.pacing import Pacer
from gradmon.probes import watch


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def trained(steps=6, monitored=True, skipped=(), loss=mse, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, loss, schedule=every(2), **options) if monitored else None
    for number in range(1, steps + 1):
        batch = torch.randn(4, 3), torch.randn(4, 2)
        optimizer.zero_grad()
        mse(model, batch).backward()
        if number not in skipped:
            optimizer.step()
        if monitor is not None:
            monitor.step(batch)
    return model, monitor


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_hook_that_fails_in_the_backward_pass(monkeypatch):
    def failing(gradient):
        raise RuntimeError("boom")

    alone, _ = trained(monitored=False)
    expected = trained()[1].readings
    monkeypatch.setattr(watch, "_norm", failing)
    model, monitor = trained()
    assert same(model, alone)
    assert monitor.failures["gradient hook"] > 0
    # What the hooks would have saved is a pass.
    assert monitor.readings["step_condition"].value == pytest.approx(expected["step_condition"].value, rel=1e-3)


class Wordless(Exception):
    """An error that cannot say what it is."""

    def __str__(self):
        raise ValueError("no words")


class Alone(nn.Module):
    """A layer that can be called by the training only, on all examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        if quiet_depth():
            raise Wordless
        return self.layer(x)


@pytest.mark.parametrize("loss", [None, mse])
@pytest.mark.parametrize("metrics", ["default", "all"])
def test_error_that_cannot_be_written_down(loss, metrics):
    metrics = "default" if loss is None and metrics == "all" else metrics
    model = Alone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"input_module": "layer"} if metrics == "all" else {}
    monitor = Monitor(model, optimizer, loss, schedule=every(1), metrics=metrics, **options)
    for _ in range(3):
        batch = torch.randn(4, 3), torch.randn(4, 2)
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    assert "Wordless" in str(monitor.readings["gradient_rank"].reason)
    monitor.close()


class Broken(logging.Handler):
    """A handler that fails."""

    def emit(self, record):
        raise RuntimeError("the log is closed")


def test_log_that_fails():
    def failing(model, batch):
        raise RuntimeError("boom")

    alone, _ = trained(monitored=False)
    handler = Broken()
    logging.getLogger("gradmon").addHandler(handler)
    try:
        model, monitor = trained(loss=failing)
    finally:
        logging.getLogger("gradmon").removeHandler(handler)
    assert same(model, alone)
    assert monitor.failures["probe"] == 3


@pytest.mark.parametrize("method", ["enter", "looked", "due", "leave"])
def test_clock_that_fails(monkeypatch, method):
    alone, _ = trained(monitored=False)
    real = getattr(Pacer, method)
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("boom")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Pacer, method, failing)
    model, monitor = trained()
    assert same(model, alone)
    assert sum(monitor.failures.values()) > 0


def test_no_hook_outlives_a_step_that_is_not_taken():
    model, monitor = trained(steps=3, skipped=(3,))
    assert monitor.steps == 3
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
def test_tensors_as_plain_types(shape, dtype):
    tensor = (torch.randn(shape) * 3).to(dtype)
    again = from_plain(copy.deepcopy(to_plain(tensor)))
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert torch.equal(again, tensor)
