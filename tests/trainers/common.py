"""What the tests of all callbacks share: a plain loop to compare with, and what a training leaves behind."""

import math
import random

import numpy as np
import torch
from torch import nn

from gradmon import Monitor
from gradmon.sinks import MemorySink

CLOCK = {"probe_seconds", "monitor_overhead"}
EXAMPLES = {
    "gradient_rank", "input_gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence",
    "noise_scale", "gradient_snr", "noise_ratio",
}  # fmt: skip
CLIP = 0.01
"""Far below every gradient of these tests: a clipped norm could not be taken for one that is not."""


def seed(number=0):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def network(dtype=torch.float64):
    seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def examples(count=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 3, generator=generator)
    return x.to(dtype), torch.randn(count, 2, generator=generator).to(dtype)


def batches(size=8, count=32, dtype=torch.float64):
    x, target = examples(count, dtype)
    return list(zip(x.split(size), target.split(size), strict=True))


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


class Reference:
    """A plain loop with a monitor, and the norms and steps that it takes itself.

    Attributes:
        readings: Those of the monitor.
        norms: The length of each step's gradient before it was clipped.
        ratios: The length of each step over that of the weights before it.
        model: The trained model.
    """

    def __init__(self, data, *, model=None, optimizer=momentum, loss=mse, clip=None, schedule=None, **options):
        self.model = network() if model is None else model
        self.norms, self.ratios = [], []
        sink = MemorySink()
        taking = optimizer(self.model.parameters())
        with Monitor(self.model, taking, loss, schedule=schedule, sinks=sink, **options) as monitor:
            for batch in data:
                before = flat(self.model.parameters())
                taking.zero_grad()
                loss(self.model, batch).backward()
                self.norms.append(float(flat([p.grad for p in self.model.parameters()]).norm()))
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                taking.step()
                moved = flat(self.model.parameters()) - before
                self.ratios.append(float(moved.norm() / before.norm()))
                monitor.step(batch)
        assert not monitor.failures
        self.readings = sink.readings


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).clone() for tensor in tensors])


def assert_same_readings(found, expected, *, without=frozenset(), relative=1e-6):
    """Two histories tell the same, number by number, but for clocks and what is left out."""
    kept = [[r for r in history if r.name not in CLOCK and r.name not in without] for history in (found, expected)]
    assert [(r.name, r.step, r.layer) for r in kept[0]] == [(r.name, r.step, r.layer) for r in kept[1]]
    assert kept[0]
    for one, other in zip(*kept, strict=True):
        if math.isnan(other.value):
            assert math.isnan(one.value), (one, other)
            assert one.reason == other.reason
        else:
            assert one.value == other.value or math.isclose(one.value, other.value, rel_tol=relative), (one, other)


def series(readings, name):
    return [reading.value for reading in readings if reading.name == name and reading.layer is None]


def random_states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def assert_equal(one, other):
    """Two nestings are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other or one != one


def hooks_on(model, optimizer):
    """How many hooks there are on a model, its parameters and an optimizer."""
    count = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    for parameter in model.parameters():
        count += len(parameter._backward_hooks or ())
        count += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return count


class EndSink(MemorySink):
    """Remembers how runs ended, and whether it was closed."""

    def __init__(self):
        super().__init__()
        self.ends, self.closed = [], 0

    def finish(self, succeeded):
        self.ends.append(succeeded)

    def close(self):
        self.closed += 1


def assert_verdict(readings, found):
    """The readings of the check before the first step are those of a verdict, and there is one of each."""
    for reading in found.to_readings():
        if reading.name in {"preflight_risk", "preflight_passes"}:  # a later loss changes the one
            continue
        values = series(readings, reading.name)
        assert len(values) == 1, reading.name
        assert values[0] == reading.value or math.isclose(values[0], reading.value, rel_tol=1e-9), reading.name
    assert math.isclose(series(readings, "preflight_risk")[0], found.risk, rel_tol=1e-9)
