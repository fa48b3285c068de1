"""A step that is not looked at reads no number from the device: on CUDA each would wait for all that is queued."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmon import Monitor, budget
from gradmon.sinks import MemorySink

READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
}
"""What cannot return before the device has worked out a number."""


class Reads(TorchDispatchMode):
    """Counts the calls that read a number, or a size that depends on numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in READS
        return func(*args, **(kwargs or {}))


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(model, schedule, loss, steps, *, monitored=True):
    """How many numbers are read in each step: in the training's passes and step, and in the monitor's."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = Monitor(model, optimizer, loss, sinks=[MemorySink()], schedule=schedule) if monitored else None
    found = []
    for _ in range(steps):
        batch = torch.randn(8, 16), torch.randint(4, (8,))
        with Reads() as training:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with Reads() as own:
            if monitor is not None:
                monitor.step(batch)
        found.append((training.count, own.count))
    return found


def conv():
    body = nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Dropout(0.1), nn.Linear(128, 4))


@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "passive"])
def test_step_between_probes_reads_nothing(loss):
    probed = (2, 7)
    alone = run(conv(), None, None, 10, monitored=False)
    found = run(conv(), lambda step: step in probed, loss, 10)
    # Before the first probe the mask is drawn, on the CPU; the step after a probe completes its readings.
    for step in (4, 5, 6, 9, 10):
        assert found[step - 1] == alone[step - 1], step
    for step in probed:
        assert sum(found[step - 1]) > sum(alone[step - 1]), step


@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "passive"])
def test_step_that_a_budget_passes_over_reads_nothing(loss):
    alone = run(conv(), None, None, 60, monitored=False)
    found = run(conv(), budget(0.01), loss, 60)
    quiet = sum(seen == plain for seen, plain in zip(found, alone, strict=True))
    assert quiet >= 20
