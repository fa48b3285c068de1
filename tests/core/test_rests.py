"""Where nothing can be due for a while a monitor does nothing at all, and counts the time of those steps together."""

import json
import types

import pytest
import torch

import gradmon.pacing
from gradmon import Monitor, budget, every
from gradmon.schedules import Ledger
from gradmon.sinks import MemorySink
from tests.core.monitored import data, mlp, mse, train


class Watched(Monitor):
    """A monitor that counts how often it wakes."""

    woken = 0

    def _see(self, batch):
        self.woken += 1
        super()._see(batch)


class Timed(Watched):
    """One whose probes take a time on a made-up clock."""

    def __init__(self, *args, clock, takes, **options):
        self.clock, self.takes = clock, takes
        super().__init__(*args, **options)

    def _looked(self, batch, taken, pending):
        self.clock.now += self.takes if self._due else 0.0
        return super()._looked(batch, taken, pending)


def run(schedule, steps, loss=mse, state=None, after=lambda step: None):
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Watched(model, optimizer, loss, schedule=schedule, sinks=[sink])
    if state is not None:
        monitor.load_state_dict(state)
    train(model, optimizer, data(steps), monitor, after=after)
    assert not monitor.failures
    return monitor, sorted({reading.step for reading in sink.readings if reading.name == "grad_norm"})


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 25])
def test_every_nth_step_is_looked_at(n, loss):
    monitor, seen = run(every(n), 60, loss)
    assert seen == list(range(n, 61, n))
    assert monitor.steps == 60
    # The one before a probe, which prepares for it; the probe; and the one after it, which completes it.
    assert monitor.woken <= 3 * (60 // n) + 1
    assert {reading.step for reading in monitor.readings.values() if reading.name == "step_condition"} == {
        max(step for step in seen if step < 60)
    }


@pytest.mark.parametrize("saved", [0, 1, 8, 9, 10, 11, 12, 19, 20])
def test_resumed_in_a_rest(saved):
    state = json.loads(json.dumps(run(every(10), saved)[0].state_dict()))
    monitor, seen = run(every(10), 35 - saved, state=state)
    assert monitor.steps == 35
    assert seen == [step for step in (10, 20, 30) if step > saved]


def test_a_state_that_is_loaded_in_a_rest_ends_it():
    state = run(every(10), 8)[0].state_dict()
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, mse, schedule=every(10), sinks=[sink])
    train(model, optimizer, data(3), monitor)
    monitor.load_state_dict(state)
    train(model, optimizer, data(4), monitor)
    assert {reading.step for reading in sink.readings if reading.name == "grad_norm"} == {10}


def test_other_schedules_are_asked_once_for_each_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return step == 5

    monitor, seen = run(schedule, 12)
    assert asked == list(range(1, 14))
    assert monitor.woken == 12
    assert seen == [5]


def test_following():
    for n in (1, 2, 3, 50):
        for step in range(200):
            assert every(n).following(step) == next(later for later in range(step + 1, 300) if every(n)(later))


# --- the time --------------------------------------------------------------------------------------------------------


def test_steps_together_count_like_single_ones():
    one, many = Ledger(window=20), Ledger(window=20)
    for place in range(60):
        for _ in range(4):
            one.trained(2.0)
        many.trained(8.0, 4)
        if place % 7 == 0:
            one.spent(0.5)
            many.spent(0.5)
        assert (many.steps, many.usual) == (one.steps, one.usual)
        assert many.total == pytest.approx(one.total)
        assert many.own == one.own
        assert many.recent == pytest.approx(one.recent)


def test_window_is_never_shorter_than_it_says():
    ledger = Ledger(window=10)
    for _ in range(5):
        ledger.trained(7.0, 7)
    assert ledger.recent[0] == 14.0


def test_pause_among_steps_together():
    ledger = Ledger()
    for _ in range(60):
        ledger.trained(1.0)
    ledger.trained(5 + 1000.0, 5)
    assert ledger.usual == 1.0
    assert ledger.total == 60 + 4 + 10


@pytest.mark.parametrize(
    ("usual", "asking", "expected"),
    [(0.0, 1e-5, 0), (1e-3, 0.0, 0), (1e-3, 1e-5, 3), (1e-3, 3e-6, 0), (1.0, 1e-5, 0), (1e-6, 1e-5, 49)],
)
def test_rest_of_a_budget(usual, asking, expected):
    schedule = budget(0.03)
    if usual:
        schedule.ledger.trained(usual)
    assert schedule.rest(asking) == expected


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by five microseconds whenever it is looked at."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 5e-6
            return self.now

    clock = Clock()
    monkeypatch.setattr(gradmon.pacing, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
@pytest.mark.parametrize(("lasts", "wakes"), [(1e-3, 0.3), (1.0, 1.0)])
def test_monitor_with_a_budget_rests_in_short_steps_only(clock, loss, lasts, wakes):
    schedule, model, sink = budget(0.03), mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Timed(model, optimizer, loss, schedule=schedule, sinks=[sink], clock=clock, takes=5 * lasts)
    for batch in data(2000):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        clock.now += lasts
        monitor.step(batch)
    assert not monitor.failures
    assert monitor.steps == 2000
    assert monitor.woken <= wakes * 2000
    assert (monitor.woken == 2000) == (lasts == 1.0)
    # A probe takes 5 steps; the first ones of the dearer groups are waited for.
    seen = {reading.step for reading in sink.readings}
    assert 3 <= len(seen) <= 12
    ledger = schedule.ledger
    assert ledger.usual == pytest.approx(lasts, rel=0.05)
    # The steps after the last waking are not counted yet.
    assert 2000 - 50 < ledger.steps <= 2000
    assert ledger.total == pytest.approx(ledger.steps * lasts, rel=0.05)
    assert 0.2 * 0.03 * ledger.total <= ledger.own <= 0.03 * ledger.total


def timed(clock, schedule, steps, *, takes=5e-3, pause=0.0, each=1 << 30, state=None, waited=0.0):
    """A training of steps of a millisecond, with a pause now and then; probes of one group take the same each."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Timed(
        model, optimizer, mse, schedule=schedule, metrics="grad_norm", sinks=[], alerts=[], clock=clock, takes=takes
    )
    if state is not None:
        clock.now += waited
        monitor.load_state_dict(state)
    for number, batch in enumerate(data(1) * steps, 1):
        train(model, optimizer, [batch])
        clock.now += 1e-3 + (0.0 if number % each else pause)
        monitor.step(batch)
    assert not monitor.failures
    return monitor


@pytest.mark.parametrize("window", [1, 2, 3, 4, 8])
def test_a_budget_of_a_short_window_is_asked_again(clock, window):
    monitor = timed(clock, budget(0.03, window=window), 600)
    assert monitor.readings["grad_norm"].step > 300


@pytest.mark.parametrize("each", [10, 40])
def test_pauses_in_rests_are_no_training(clock, each):
    """Each counts ten steps at most, also where every rest holds one."""
    schedule = budget(0.003)
    timed(clock, schedule, 3000, pause=1.0, each=each)
    assert schedule.ledger.usual == pytest.approx(1e-3, rel=0.05)
    assert 0 < schedule.ledger.own <= 0.003 * (1 + 10 / each) * 3.0 * 1.05


def test_what_comes_before_a_state_is_loaded_is_nobodys_time(clock):
    state = timed(clock, budget(0.03), 600).state_dict()
    schedule = budget(0.03)
    monitor = timed(clock, schedule, 600, state=state, waited=10.0)
    assert schedule.ledger.total == pytest.approx(1.2, rel=0.05)
    assert schedule.ledger.own <= 0.03 * schedule.ledger.total
    assert monitor.readings["grad_norm"].step > 900
