"""The check before the first step, as the monitor makes it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradmon
from gradmon import ArgumentError, Monitor, every
from gradmon.alerts import Above
from gradmon.sinks import MemorySink

TRUTH = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(dropout=0.0):
    torch.manual_seed(3)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        yield x, (x @ TRUTH).argmax(1)


def train(model, optimizer, monitor=None, count=3, scheduler=None):
    for batch in batches(count):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if monitor is not None:
            monitor.step(batch)


def momentum(parameters, rate=0.05):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def adam(parameters, rate=1e-3):
    return torch.optim.Adam(parameters, lr=rate)


def numbers(readings):
    return {r.name: (r.value, r.reason) for r in readings if r.name.startswith("preflight_")}


@pytest.mark.parametrize("make", [momentum, adam, lambda p: torch.optim.Adagrad(p, lr=0.01)])
def test_the_verdict_is_that_of_a_check_before_the_training(make):
    model = network()
    optimizer, batch = make(model.parameters()), next(iter(batches(1)))
    expected = gradmon.preflight(model, optimizer, loss, batch)
    sink = MemorySink()
    with Monitor(model, optimizer, loss, preflight=True, sinks=sink) as monitor:
        train(model, optimizer, monitor)
    found = numbers(sink.readings)
    wanted = numbers(expected.to_readings(1))
    assert wanted.keys() == found.keys()
    for name, (value, reason) in wanted.items():
        assert found[name] == (pytest.approx(value, rel=1e-9, nan_ok=True), reason), name
    assert all(r.step == 1 for r in sink.readings if r.name.startswith("preflight_"))


def test_a_scheduler_that_has_gone_on_is_not_mistaken_for_the_first_step():
    found = []
    for scheduled in (False, True):
        model, sink = network(), MemorySink()
        optimizer = momentum(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.01) if scheduled else None
        with Monitor(model, optimizer, loss, preflight=True, sinks=sink) as monitor:
            train(model, optimizer, monitor, scheduler=scheduler)
        found.append(numbers(sink.readings))
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [momentum, adam])
def test_training_is_the_same_to_the_last_bit(make):
    ends = []
    for preflight in (False, True):
        model = network(dropout=0.3)
        optimizer = make(model.parameters())
        with Monitor(model, optimizer, loss, schedule=every(2), preflight=preflight) as monitor:
            train(model, optimizer, monitor, count=5)
            assert not monitor.failures
        ends.append([*model.state_dict().values(), torch.rand(3)])
    assert all(map(torch.equal, *ends))


def test_a_run_that_will_fail_raises_an_alert_and_so_does_one_that_is_stuck():
    model, sink = network(), MemorySink()
    optimizer = momentum(model.parameters(), rate=1e-9)
    with Monitor(model, optimizer, loss, schedule=every(10), preflight=True, sinks=sink, on_alert=None) as monitor:
        train(model, optimizer, monitor, count=30)
    fired = [(alert.rule, alert.state, alert.step) for alert in sink.alerts if alert.rule in ("preflight", "stuck")]
    assert fired == [("preflight", "firing", 1), ("stuck", "firing", 20)]
    told = next(alert for alert in sink.alerts if alert.rule == "preflight")
    assert "Raise the learning rate" in told.remedy
    risks = [(r.step, r.value) for r in sink.readings if r.name == "preflight_risk"]
    assert [step for step, _ in risks] == [1, 20]  # the risk once more, with the loss of the first reading from 20 on
    early = next(r.value for r in sink.readings if r.name == "loss" and r.step == 20)
    assert risks[1][1] == monitor._start.found.risk_after(early)


def test_a_run_that_learns_all_the_same_is_spoken_of_no_more(monkeypatch):
    model, sink = network(), MemorySink()
    optimizer = momentum(model.parameters())
    monitor = Monitor(model, optimizer, loss, schedule=every(5), preflight=True, sinks=sink, on_alert=None)
    monkeypatch.setattr(gradmon.Preflight, "risk_after", lambda self, loss: 0.01)
    rule = next(rule for rule in monitor._publisher._rules if rule.name == "preflight")
    rule.limit = 0.02
    with monitor:
        train(model, optimizer, monitor, count=25)
    states = [(alert.state, alert.step) for alert in sink.alerts if alert.rule == "preflight"]
    assert states == [("firing", 1), ("resolved", 20)]


def test_a_resumed_run_is_not_checked_again():
    model, sink = network(), MemorySink()
    optimizer = adam(model.parameters())
    with Monitor(model, optimizer, loss, preflight=True) as monitor:
        train(model, optimizer, monitor)
        state = monitor.state_dict()
    with Monitor(model, optimizer, loss, preflight=True, sinks=sink) as monitor:
        monitor.load_state_dict(state)
        assert not monitor.wants_batch
        train(model, optimizer, monitor)
    assert not numbers(sink.readings)


def test_it_needs_an_optimizer_and_a_loss():
    model = network()
    message = r"`preflight` must be False without an optimizer and a loss\. Got True\."
    for optimizer, given in ((None, loss), (adam(model.parameters()), None)):
        with pytest.raises(ArgumentError, match=message):
            Monitor(model, optimizer, given, preflight=True)


def test_a_check_that_fails_is_counted_and_the_training_goes_on():
    def broken(model, batch):
        raise ValueError("no loss today")

    model, sink = network(), MemorySink()
    optimizer = adam(model.parameters())
    with Monitor(model, optimizer, broken, schedule=every(100), preflight=True, sinks=sink) as monitor:
        train(model, optimizer, monitor)
        assert dict(monitor.failures) == {"preflight": 1}
    [reading] = [r for r in sink.readings if r.name == "preflight_risk"]
    assert math.isnan(reading.value)
    assert "no loss today" in reading.reason


def test_one_of_the_callers_own_rules_takes_the_place_of_a_rule_of_that_name():
    model = network()
    optimizer = adam(model.parameters())
    own = Above("preflight_risk", 0.99, name="preflight")
    with Monitor(model, optimizer, loss, preflight=True, alerts=(rule for rule in [own])) as monitor:
        names = [rule.name for rule in monitor._publisher._rules]
        assert names == ["preflight", "stuck"]
        assert monitor._publisher._rules[0] is own
    with Monitor(model, optimizer, loss, preflight=True, alerts=None) as monitor:
        assert not monitor._publisher._rules
    with pytest.raises(ArgumentError, match="`alerts` must"):
        Monitor(model, optimizer, loss, preflight=True, alerts="none")


def test_the_time_of_the_check_is_no_part_of_the_overhead(monkeypatch):
    clock = [0.0]
    look = gradmon.starting.look

    def slow(*args, **kwargs):
        clock[0] += 1000.0
        return look(*args, **kwargs)

    def ticking():
        clock[0] += 1e-3
        return clock[0]

    monkeypatch.setattr(gradmon.starting, "look", slow)
    monkeypatch.setattr(gradmon.pacing, "time", SimpleNamespace(perf_counter=ticking))
    model = network()
    optimizer = adam(model.parameters())
    with Monitor(model, optimizer, loss, schedule=every(2), preflight=True) as monitor:
        train(model, optimizer, monitor, count=6)
        assert clock[0] > 1000
        assert monitor.readings["monitor_overhead"].value < 100
        assert monitor.readings["probe_seconds"].value < 100


def test_gradmon_disabled_checks_nothing(monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    model = network()
    optimizer = adam(model.parameters())
    with Monitor(model, optimizer, loss, preflight=True) as monitor:
        train(model, optimizer, monitor)
        assert not monitor.readings
        assert not monitor.wants_batch


def test_where_processes_cannot_be_measured_together_no_pass_is_made(monkeypatch):
    calls = []

    def counted(model, batch):
        calls.append(None)
        return loss(model, batch)

    monkeypatch.setattr(gradmon.monitor, "find_team", lambda *given: (None, 0, "the parameters are sharded"))
    model, sink = network(), MemorySink()
    optimizer = adam(model.parameters())
    with Monitor(model, optimizer, counted, preflight=True, sinks=sink) as monitor:
        train(model, optimizer, monitor)
    [reading] = [r for r in sink.readings if r.name == "preflight_risk"]
    assert math.isnan(reading.value)
    assert reading.reason == "several processes train the model: call gradmon.preflight before it is wrapped"
    assert not calls
