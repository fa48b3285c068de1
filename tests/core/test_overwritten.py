"""Models that overwrite what they have computed show the same numbers as those that do not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from tests.core.passive import listened

INPUTS = ["input_gradient_rank", "input_condition"]


class Tanh(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.tanh_() if self.inplace else x.tanh()


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def twins(build):
    """The same model, with and without calls that overwrite."""
    made = []
    for inplace in (True, False):
        torch.manual_seed(0)
        made.append(nn.Sequential(*build(inplace)).double())
    return made


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-14)


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ids():
    return torch.arange(15).reshape(5, 3) % 7


ENTRIES = {
    "batch": (lambda inplace: [Tanh(inplace), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)], floats(5, 4), None),
    "embedding": (
        lambda inplace: [nn.Embedding(7, 4), Tanh(inplace), nn.Flatten(), nn.Linear(12, 2)], ids(), None,
    ),
    "module": (lambda inplace: [nn.Linear(4, 4), Tanh(inplace), nn.Linear(4, 2)], floats(5, 4), "0"),
    "module with a view": (
        lambda inplace: [nn.Linear(4, 4), Tanh(inplace), nn.Flatten(), nn.Linear(12, 2)], floats(5, 3, 4), "0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_x_is_what_entered_the_model(name):
    build, x, module = ENTRIES[name]
    batch = x, floats(5, 2)
    seen, expected = (gradmon.measure(model, mse, batch, metrics=INPUTS, input_module=module) for model in twins(build))
    for metric in INPUTS:
        assert seen[metric].value == pytest.approx(expected[metric].value, rel=1e-9), metric


@pytest.mark.parametrize("name", ENTRIES)
def test_x_is_what_entered_the_training(name):
    build, x, module = ENTRIES[name]
    values = []
    for model in twins(build):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradmon.Monitor(
            model, optimizer, metrics=INPUTS[:1], schedule=gradmon.every(1), input_module=module
        ) as monitor:
            mse(model, (x.clone(), floats(5, 2))).backward()
            optimizer.step()
            monitor.step((x, floats(5, 2)))
            values.append(monitor.readings[INPUTS[0]].value)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


class Sliced(nn.Module):
    """Overwrites a view of a view."""

    def __init__(self, inplace):
        super().__init__()
        self.linear, self.bias, self.inplace = nn.Linear(4, 3), nn.Parameter(torch.ones(3)), inplace

    def forward(self, x):
        rows = self.linear(x).view(-1, 3)
        rows = rows.add_(self.bias) if self.inplace else rows + self.bias
        rows = rows.relu_() if self.inplace else rows.relu()
        return rows.view(*x.shape[:-1], 3)


VIEWS = {
    "linear": (lambda inplace: [nn.Linear(4, 3), nn.ReLU(inplace), nn.Linear(3, 2)], floats(5, 3, 4)),
    "instance norm": (
        lambda inplace: [nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, affine=True), nn.ELU(inplace=inplace)],
        floats(5, 3, 4),
    ),
    "a view of a view": (lambda inplace: [Sliced(inplace), nn.Linear(3, 2)], floats(5, 3, 4)),
    "transposed": (
        lambda inplace: [nn.Linear(4, 3), nn.ReLU(inplace), nn.Linear(3, 2)],
        floats(4, 3, 5).transpose(0, 2),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_outputs_that_are_views_may_be_overwritten(name):
    build, x = VIEWS[name]
    model, twin = twins(build)
    batch = x, torch.zeros_like(twin(x))
    expected = gradmon.per_example_gradients(twin, mse, batch).numpy()
    close(gradmon.per_example_gradients(model, mse, batch), expected)
    close(gradmon.per_example_gram(model, mse, batch), expected @ expected.T)
    found = listened(model, batch, lambda: mse(model, batch).backward())
    close(found.gram, expected @ expected.T)
