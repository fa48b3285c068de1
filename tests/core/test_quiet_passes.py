"""Passes of our own talk to no other rank, whoever makes them, also where only a part of the model is wrapped."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gradmon


@pytest.fixture
def alone():
    """A group of one rank, in which a model can be wrapped."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


TALKED = []


class Partly(nn.Module):
    """A model of which a part is wrapped; it notes whether this would talk, where no pass puts it back."""

    def __init__(self):
        super().__init__()
        self.body = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        TALKED.append(self.body.require_forward_param_sync or self.body.require_backward_grad_sync)
        return self.head(self.body(x))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def measured(model, optimizer, batch):
    gradmon.measure(model, loss, batch, optimizer=optimizer)


def checked(model, optimizer, batch):
    gradmon.preflight(model, optimizer, loss, batch)


def initialised(model, optimizer, batch):
    gradmon.reinitialize(model, loss, batch)


def monitored(model, optimizer, batch):
    with gradmon.Monitor(model, optimizer, loss, schedule=gradmon.every(1), preflight=True) as monitor:
        optimizer.step()
        monitor.step(batch)
        assert not monitor.failures


@pytest.mark.parametrize("look", [measured, checked, initialised, monitored])
def test_a_part_that_is_wrapped_is_silent(alone, look):
    torch.manual_seed(0)
    model = Partly()
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    TALKED.clear()
    look(model, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    assert TALKED
    assert not any(TALKED)
    assert model.body.require_forward_param_sync
    assert model.body.require_backward_grad_sync
