"""Not a bit of a training changes under a monitor."""

import math

import pytest
import torch
from torch import nn

import gradmon
from gradmon import Monitor, every
from gradmon.sinks import MemorySink
from tests.core.monitored import data, mlp, mse, with_closure


class Norms(nn.Module):
    """BatchNorm, dropout and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.second, self.frozen = nn.Linear(8, 2), nn.Linear(3, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.norm(self.first(x))))) + self.frozen(x)


def plain(model, optimizer, batch, step):
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def clipped(model, optimizer, batch, step):
    optimizer.zero_grad(set_to_none=False)
    mse(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def accumulated(model, optimizer, batch, step):
    (mse(model, batch) / 2).backward()
    if step % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()


RECIPES = {
    "sgd_momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), plain),
    "sgd_nesterov_decay": (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1), plain),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), plain),
    "adamw_foreach": (lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True), plain),
    "adamw_fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), plain),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5), plain),
    "clipping": (lambda p: torch.optim.SGD(p, lr=0.05), clipped),
    "accumulation": (lambda p: torch.optim.Adam(p, lr=0.01), accumulated),
    "closure": (lambda p: torch.optim.SGD(p, lr=0.05), with_closure),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), with_closure),
}


def whole_training(recipe, monitored, metrics="all", gap=1):
    """Everything that a training leaves behind."""
    make, step = RECIPES[recipe]
    torch.manual_seed(3)
    model = Norms()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    monitor = None
    sink = MemorySink()
    if monitored:
        options = {"metrics": metrics, "schedule": every(gap), "layers": True, "mask": 0.3, "sinks": sink}
        monitor = Monitor(model, optimizer, mse, **options)
    rates, random = [], []
    for number, batch in enumerate(data(7, torch.float32), 1):
        step(model, optimizer, batch, number)
        if monitor is not None:
            monitor.step(batch)
        random.append(torch.rand(2))
        if recipe != "accumulation" or number % 2 == 0:
            scheduler.step()
        average.update_parameters(model)
        rates.append(scheduler.get_last_lr())
    if monitor is not None:
        assert not monitor.failures
        numbers = {reading.name for reading in sink.readings if math.isfinite(reading.value)}
        left_out = {"stability"} | {
            m.name for m in gradmon.METRICS.values() if m.on_demand or (metrics != "all" and m.costly)
        }
        assert set(gradmon.METRICS) - left_out <= numbers
        monitor.close()
    return {
        "model": dict(model.state_dict()),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "average": dict(average.state_dict()),
        "optimizer": optimizer.state_dict(),
        "rates": rates,
        "random": [*random, torch.get_rng_state()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(p._backward_hooks or {}) for p in model.parameters()],
    }


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{where}.{place}")
    else:
        assert a == b, where


@pytest.mark.parametrize(("metrics", "gap"), [("all", 1), ("default", 2)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_the_same_to_the_last_bit(recipe, metrics, gap):
    watched = whole_training(recipe, monitored=True, metrics=metrics, gap=gap)
    assert_identical(watched, whole_training(recipe, monitored=False), recipe)


def test_monitor_under_no_grad_and_autocast_changes_nothing():
    results = []
    for monitored in (False, True):
        model = mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        monitor = Monitor(model, optimizer, mse, schedule=every(1)) if monitored else None
        for batch in data(4, torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = mse(model, batch)
                value.backward()
                optimizer.step()
                with torch.no_grad():
                    if monitor is not None:
                        monitor.step(batch)
                        assert not monitor.failures
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
