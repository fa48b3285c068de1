"""A run that is saved and taken up again reads what an uninterrupted one reads, to the last bit."""

import json

import pytest
import torch
from torch import nn

from gradmon import every
from tests.core.monitored import mlp, mse
from tests.core.resumed import Run, assert_resumes_everywhere, assert_some_numbers, data, read, sgd


def dropped(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def normed(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def conv(dtype=torch.float32):
    torch.manual_seed(1)
    body = nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(12, 2)).to(dtype)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def clipped(model, optimizer, batch):
    optimizer.zero_grad()
    mse(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


NUMBERS = [
    "weight_condition",
    "sharpness",
    "step_condition",
    "step_share",
    "step_ratio",
    "gradient_rank",
    "gradient_snr",
]


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("make", [mlp, dropped], ids=["mlp", "dropout"])
def test_with_a_loss(make, gap):
    run = assert_resumes_everywhere(model=make, loss=mse, schedule=every(gap))
    assert_some_numbers(run, NUMBERS)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("make", [normed, conv], ids=["batch_norm", "conv"])
def test_with_a_loss_in_single_precision(make, optimizer):
    run = assert_resumes_everywhere(model=make, loss=mse, optimizer=optimizer, schedule=every(2), dtype=torch.float32)
    assert_some_numbers(run, ["weight_condition", "step_condition", "gradient_snr"])


@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("mask", [None, 0.3, "default"])
def test_masks_and_layers(mask, gap):
    run = assert_resumes_everywhere(model=mlp, loss=mse, mask=mask, layers=True, schedule=every(gap))
    assert "step_condition/0" in run.monitor.readings
    assert_some_numbers(run, NUMBERS)


def test_saved_mask_takes_the_place_of_another():
    run = Run(mlp, mask=0.3, seed=1)
    for batch in data(torch.float64)[:2]:
        run.step(batch)
    state = run.saved()
    run.make = (*run.make[:4], {"mask": 0.3, "seed": 2})
    again = run.resumed(state)
    assert again.monitor.state_dict()["mask"] == run.monitor.state_dict()["mask"]


@pytest.mark.parametrize("gap", [1, 2])
def test_where_the_gradient_of_the_training_is_another(gap):
    run = assert_resumes_everywhere(model=mlp, loss=mse, train=clipped, schedule=every(gap))
    assert_some_numbers(run, NUMBERS)


def test_everything_with_a_loss():
    run = assert_resumes_everywhere(model=mlp, loss=mse, metrics=lambda: "all", mask=None, schedule=every(3))
    assert_some_numbers(run, ["input_condition", "weight_diversity"])


PASSIVE = ["step_condition", "gradient_rank", "noise_scale", "gradient_snr", "update_ratio"]


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("make", [mlp, dropped], ids=["mlp", "dropout"])
def test_passive(make, gap):
    run = assert_resumes_everywhere(model=make, loss=None, schedule=every(gap), layers=True)
    assert_some_numbers(run, [*PASSIVE[:2], PASSIVE[3]])


@pytest.mark.parametrize("make", [normed, conv], ids=["batch_norm", "conv"])
def test_passive_in_single_precision(make):
    run = assert_resumes_everywhere(
        model=make, loss=None, optimizer=adam, mask=0.3, metrics=lambda: "all", schedule=every(2), dtype=torch.float32
    )
    assert_some_numbers(run, ["step_condition", "input_gradient_rank", "gradient_snr"])


def accumulated(model, optimizer, batch):
    optimizer.zero_grad()
    for rows in (slice(None, 3), slice(3, None)):
        (mse(model, tuple(part[rows] for part in batch)) / 2).backward()
    optimizer.step()


@pytest.mark.parametrize("gap", [1, 2])
def test_passive_with_accumulation(gap):
    run = assert_resumes_everywhere(model=mlp, loss=None, train=accumulated, example_dim=0, schedule=every(gap))
    assert_some_numbers(run, ["step_condition", "gradient_rank", "gradient_snr"])


class Sequences(nn.Module):
    """Each input as a sequence of three, through a layer that looks at sequences."""

    def __init__(self, inner):
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(1, 4), inner, nn.Linear(4, 2)

    def forward(self, x):
        found = self.inner(self.enter(x.unsqueeze(-1)))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


INNER = {
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True),
}


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
@pytest.mark.parametrize("inner", INNER)
def test_sequences_in_single_precision(inner, loss):
    def make():
        torch.manual_seed(1)
        return Sequences(INNER[inner]())

    run = assert_resumes_everywhere(model=make, loss=loss, schedule=every(2), dtype=torch.float32)
    assert_some_numbers(run, ["step_condition", "gradient_rank", "gradient_snr"])


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_saving_changes_nothing(loss):
    runs = [Run(mlp, loss=loss) for _ in range(2)]
    for batch in data(torch.float64):
        for run, saves in zip(runs, (False, True), strict=True):
            run.step(batch)
            if saves:
                run.saved()
    assert read(runs[0].sink) == read(runs[1].sink)


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_state_is_taken_up_by_a_monitor_in_mid_run(loss):
    """Back to an earlier state, in the same process."""
    run, batches = Run(mlp, loss=loss), data(torch.float64)
    for batch in batches[:3]:
        run.step(batch)
    model, optimizer, monitor, _ = run.saved()
    start = len(run.sink.readings)
    for batch in batches[3:]:
        run.step(batch)
    first, middle = read(run.sink, start), len(run.sink.readings)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.monitor.load_state_dict(json.loads(monitor))
    for batch in batches[3:]:
        run.step(batch)
    assert read(run.sink, middle) == first
