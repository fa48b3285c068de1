"""A small training, and what is said of it, for sinks of several kinds."""

import torch

from gradmon import Monitor, Reading, every
from gradmon._reading import Alert


def reading(value=1.0, step=1, name="loss", layer=None):
    return Reading(name, value, step, layer)


def alert(step=1):
    return Alert("nonfinite", "critical", "firing", 1.0, step, None, "message", "remedy")


def train(monitor, model, optimizer, steps):
    for _ in range(steps):
        batch = torch.randn(4, 3)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        monitor.step(batch)


def watched(**options):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    return model, optimizer, Monitor(model, optimizer, loss, metrics=["loss"], schedule=every(1), **options)
