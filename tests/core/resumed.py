"""Runs that are saved and taken up again."""

import copy
import json
import math

import torch

from gradmon import Monitor, every
from gradmon.sinks import MemorySink
from tests.core import monitored
from tests.core.monitored import CLOCK, mse

STEPS = 7


def data(dtype, count=STEPS):
    return monitored.data(count, dtype)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def plain(model, optimizer, batch):
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


class Run:
    """A training with a monitor, which can be saved after any step."""

    def __init__(self, model, optimizer=sgd, loss=mse, train=plain, **options):
        self.make = model, optimizer, loss, train, options
        self.model, self.train, self.sink = model(), train, MemorySink()
        self.optimizer = optimizer(self.model.parameters())
        # Rules and metrics have a state: each run makes its own.
        options = {name: value() if name in ("alerts", "metrics") else value for name, value in options.items()}
        options.setdefault("schedule", every(1))
        self.monitor = Monitor(self.model, self.optimizer, loss, sinks=[self.sink], **options)

    def step(self, batch):
        self.train(self.model, self.optimizer, batch)
        self.monitor.step(batch)

    def saved(self):
        """All that a checkpoint holds; the monitor's part by way of text."""
        monitor = json.dumps(self.monitor.state_dict())
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), monitor, torch.get_rng_state()))

    def resumed(self, state):
        """A new run that goes on from what was saved."""
        model, optimizer, loss, train, options = self.make
        torch.manual_seed(99)
        run = Run(model, optimizer, loss, train, **options)
        run.model.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
        run.monitor.load_state_dict(json.loads(state[2]))
        torch.set_rng_state(state[3])
        return run


def read(sink, start=0):
    """Everything that came after so many readings, but for the times; as text, in which NaN equals NaN."""
    return [str(reading) for reading in sink.readings[start:] if reading.name not in CLOCK]


def told(alerts):
    """The alerts, but for that on the times; as text."""
    return [str(alert) for alert in alerts if alert.rule != "overhead_high"]


def assert_resumes_everywhere(*, dtype=torch.float64, **made):
    """Saved after every step, each time taken up by a new run, which goes on to the end."""
    run, batches = Run(**made), data(dtype)
    torch.manual_seed(5)
    states, seen = [run.saved()], [(0, 0)]
    for batch in batches:
        run.step(batch)
        states.append(run.saved())
        seen.append((len(run.sink.readings), len(run.sink.alerts)))
    assert not [name for name in run.monitor.failures if not name.startswith("metric")]
    for number, state in enumerate(states):
        again = run.resumed(state)
        assert again.monitor.steps == number
        assert json.dumps(again.monitor.state_dict()) == state[2], f"saved anew after step {number}"
        for batch in batches[number:]:
            again.step(batch)
        readings, alerts = seen[number]
        assert read(again.sink) == read(run.sink, readings), f"resumed after step {number}"
        assert told(again.sink.alerts) == told(run.sink.alerts[alerts:])
        assert told(again.monitor.alerts) == told(run.monitor.alerts)
        names = run.monitor.readings.keys() - CLOCK
        assert {n: str(again.monitor.readings[n]) for n in names} == {n: str(run.monitor.readings[n]) for n in names}
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    return run


def assert_some_numbers(run, names):
    """The comparison was one of numbers, and not of reasons for their absence."""
    for name in names:
        found = [r.value for r in run.sink.readings if r.name == name and r.layer is None]
        assert len(found) > 1, name
        assert all(math.isfinite(value) for value in found), name
