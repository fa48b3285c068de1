"""A small training under a monitor."""

import torch
from torch import nn

from gradmon import Monitor, every
from gradmon.sinks import MemorySink

SIZE = 6
CLOCK = {"probe_seconds", "monitor_overhead"}


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def data(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x = torch.randn(SIZE, 3, generator=generator)
        made.append((x.to(dtype), torch.randn(SIZE, 2, generator=generator).to(dtype)))
    return made


def train(model, optimizer, batches, monitor=None, *, after=lambda step: None):
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(batch)
        after(step)


def watched(steps=3, loss=mse, dtype=torch.float64, lr=0.05, **options):
    """A short training with a monitor on every step; everything that it wrote is in the sink."""
    model, sink = mlp(dtype), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options.setdefault("schedule", every(1))
    options.setdefault("mask", None)
    monitor = Monitor(model, optimizer, loss, sinks=[sink], **options)
    train(model, optimizer, data(steps, dtype), monitor)
    return monitor, sink, model


def by_step(sink, name):
    return {reading.step: reading for reading in sink.readings if reading.name == name and reading.layer is None}


def with_closure(model, optimizer, batch, step):
    def closure():
        optimizer.zero_grad()
        value = mse(model, batch)
        value.backward()
        return value

    optimizer.step(closure)


def explode(*args):
    raise RuntimeError("boom")


def trained_alone(steps=3):
    model = mlp()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), data(steps))
    return model


def assert_same_weights(model, other):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
