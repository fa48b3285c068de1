"""What a look has held is freed at its end, and not when the garbage is collected: it may be as large as the model."""

import gc
import logging
import math
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

import gradmon
from gradmon import Monitor, every
from tests.core.monitored import data, mlp, mse


@pytest.fixture
def uncollected():
    logging.disable()  # the test runner keeps records, with the frames that their errors went through
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


def norm_net():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def not_finite(model, batch):
    return mse(model, batch) * math.nan


class Failing:
    """Fails in the passes of the monitor, not in those of the training."""

    now = False

    def __call__(self, model, batch):
        if Failing.now:
            raise ValueError("boom")
        return mse(model, batch)


CASES = {
    "all numbers": (mlp, mse, 6),
    "no numbers of examples": (norm_net, mse, 6),
    "one example": (mlp, mse, 1),
    "no finite gradient": (mlp, not_finite, 6),
    "failing loss": (mlp, Failing(), 6),
}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("passive", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_monitor_lets_batches_and_gradients_go(case, passive, skipped, uncollected):
    make, loss, size = CASES[case]
    model, held = make(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, None if passive else loss, schedule=every(1), sinks=[], alerts=[]) as monitor:
        for step, whole in enumerate(data(4)):
            batch = tuple(part[:size].clone() for part in whole)
            optimizer.zero_grad()
            loss(model, batch).backward()
            if step != 1 or not skipped:
                optimizer.step()
            Failing.now = True
            monitor.step(batch)
            Failing.now = False
            held += [weakref.ref(part) for part in batch]
            held += [TensorWeakRef(parameter.grad) for parameter in model.parameters()]
        assert monitor.readings
        optimizer.zero_grad()
        del batch, whole
        assert not [ref for ref in held if ref() is not None]


@pytest.mark.parametrize("case", [case for case in CASES if case != "failing loss"])
def test_a_measurement_lets_the_batch_go(case, uncollected):
    make, loss, size = CASES[case]
    model = make()
    batch = tuple(part[:size].clone() for part in data(1)[0])
    held = [weakref.ref(part) for part in batch]
    assert gradmon.measure(model, loss, batch)
    del batch
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.parametrize("passive", [False, True])
def test_a_monitor_lets_activations_go(passive, uncollected):
    """Those that the examples' gradients are made of, which the passes of a step leave to whoever looks."""
    held = []

    class Noting(nn.Module):
        def forward(self, x):
            y = x.tanh()
            held.append(StorageWeakRef(y.untyped_storage()))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), Noting(), nn.Linear(5, 5), Noting(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, None if passive else mse, schedule=every(1), sinks=[], alerts=[]) as monitor:
        for batch in data(4):
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
            assert monitor.readings["gradient_rank"].reason is None
    assert len(held) >= 8
    assert all(ref.expired() for ref in held)
