"""A monitor that keeps a budget of time: whole groups of metrics, and never more than it allows."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradmon
from gradmon import Monitor, budget
from gradmon.metrics import OWN
from gradmon.sinks import MemorySink

EVIDENCE = {
    "gradient": {"BatchGradient"},
    "examples": {"PerExampleGradients", "GradientMoments", "InputGradients"},
    "weights": {"WeightSweep", "Curvature"},
    "step": {"Step", "StepPair"},
}
NEXT = {"step_condition", "step_share", "batch_share"}
CLOCK = set(OWN)


@pytest.fixture(autouse=True)
def cpu_time(monkeypatch):
    """The time of this thread alone, so that it does not matter what else the machine does."""
    monkeypatch.setattr("gradmon.pacing.time", SimpleNamespace(perf_counter=time.thread_time))


def group_of(name):
    needs = {kind.__name__ for kind in gradmon.METRICS[name].needs}
    return next(group for group, kinds in reversed(EVIDENCE.items()) if needs & kinds)


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def trained(steps, loss, schedule, **options):
    torch.manual_seed(1)
    model, sink = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, loss, schedule=schedule, sinks=[sink], **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        batch = torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    return monitor, sink, model


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_monitor_looks_at_whole_groups(loss):
    monitor, sink, model = trained(1500, loss, budget(0.5))
    assert not monitor.failures
    wanted = {}
    for name in {r.name for r in sink.readings} - CLOCK:
        wanted.setdefault(group_of(name), set()).add(name)
    assert len(wanted) > 1
    by_step = {}
    for reading in sink.readings:
        by_step.setdefault(reading.step, set()).add(reading.name)
    for step, names in by_step.items():
        assert names >= CLOCK, step
        for members in wanted.values():
            # All of a group or nothing; only of the last probe the next batch may still be missing.
            missing = members - names
            assert not missing or missing == members or (step == max(by_step) and missing <= NEXT), step
        assert "loss" in names or loss is None or len(by_step) < 10
    kinds = {frozenset(names - NEXT) for names in by_step.values()}
    assert len(kinds) > 1  # what is cheap came alone, too
    assert max(by_step) > 1
    counts = [sum(bool(members & names) for names in by_step.values()) for members in wanted.values()]
    assert min(counts) > 0
    alone = trained(1500, loss, lambda step: False)[2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_monitor_keeps_its_budget_roughly(loss):
    monitor, sink, _ = trained(3000, loss, budget(0.2))
    overhead = [r for r in sink.readings if r.name == "monitor_overhead"]
    seconds = [r for r in sink.readings if r.name == "probe_seconds"]
    assert len(overhead) == len(seconds) > 1
    assert all(math.isfinite(r.value) and r.value > 0 for r in seconds)
    assert monitor.readings["monitor_overhead"].value < 1.0  # loosely: caches are shared
    assert {r.step for r in overhead} == {r.step for r in sink.readings} - {0}


def test_two_schedules_do_not_mix():
    """A schedule by steps looks at everything, and one budget knows nothing of another."""
    first, second = budget(0.5), budget(0.5)
    trained(400, mse, first)
    assert first.ledger.steps > 0
    assert second.ledger.steps == 0
    assert second.state_dict()["costs"] == {}
    _, sink, _ = trained(20, mse, gradmon.every(10))
    assert {r.step for r in sink.readings} == {10, 20}
    assert {r.name for r in sink.readings if r.step == 10} >= {"loss", "weight_condition", "gradient_rank", *NEXT}


def test_state_of_a_monitor_with_a_budget():
    schedule = budget(0.5)
    monitor, _, _ = trained(400, mse, schedule)
    state = json.loads(json.dumps(monitor.state_dict()))
    other, fresh = budget(0.5), trained(0, mse, budget(0.5))[0]
    fresh.load_state_dict(state)
    found = fresh.state_dict()["pace"]  # taking up takes time, which is counted
    assert found["ledger"] == pytest.approx(state["pace"]["ledger"], rel=1.0)
    assert {**found, "ledger": None} == {**state["pace"], "ledger": None}
    other.load_state_dict(state["pace"])
    assert other.state_dict() == schedule.state_dict() == state["pace"]
    by_steps = trained(0, mse, gradmon.every(10))[0]
    by_steps.load_state_dict(state)  # another schedule takes nothing from it
    assert by_steps.state_dict()["pace"] == {}
