"""How many passes a probe makes."""

import math

import pytest
import torch
from torch import nn

from gradmon import Monitor, every
from gradmon.sinks import MemorySink

SIZE = 6


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def data(count, shape=(3,), out=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x = torch.randn(SIZE, *shape, generator=generator)
        made.append((x.to(dtype), torch.randn(SIZE, out, generator=generator).to(dtype)))
    return made


# --- passes ----------------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """The last step of a recurrent net, or the mean over the tokens of an encoder."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 2)

    def forward(self, x):
        found = self.inner(x)
        return self.head(found[0][:, -1] if isinstance(found, tuple) else found.mean(1))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


class Twice(nn.Module):
    """One module that is called twice."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.block(torch.tanh(self.block(x)))))


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def conv():
    body = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 2))


def batch_norm():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


MODELS = {
    "mlp": (mlp, (3,)),
    "conv": (conv, (2, 5, 5)),
    "batch_norm": (batch_norm, (3,)),
    "transformer": (lambda: Last(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 8), (4, 8)),
    "lstm": (lambda: Last(nn.LSTM(3, 5, batch_first=True), 5), (4, 3)),
    "tied": (Tied, (3,)),
    "twice": (Twice, (3,)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_probe_takes_four_passes(name, gap, dtype):
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model, calls = make().to(dtype), []

    def counted(model, batch):
        calls.append(1)
        return mse(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    sink = MemorySink()
    monitor = Monitor(model, optimizer, counted, schedule=every(gap), sinks=[sink])
    made = {}
    for number, batch in enumerate(data(4 * gap + 1, shape, dtype=dtype), 1):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        calls.clear()
        monitor.step(batch)
        made[number] = len(calls)
    late = {number: count for number, count in made.items() if number > 2 * gap}
    if gap == 1:
        assert all(count <= 4 for count in late.values()), made
    else:
        # Three in the call that is due, one in the call after it, none in between.
        assert all(count <= (3, 1, 0)[number % gap] for number, count in late.items()), made
        assert made[2 * gap] <= 3
    assert not monitor.failures
    reasons = {r.name: r.reason for r in sink.readings if math.isnan(r.value) and r.step > gap}
    unsettled = "the curvature that is largest in size is negative", "the tracked direction is far from an eigenvector"
    assert not {name for name, reason in reasons.items() if not reason.startswith(unsettled)}
