"""What a monitor hands to rules and sinks."""

import pytest
import torch

import gradmon
from gradmon import Monitor, every
from gradmon.alerts import Above
from gradmon.publishing import Failures, Publisher
from gradmon.sinks import JsonlSink, MemorySink
from tests.core.sinking import reading, train, watched


def test_one_sink_cannot_have_two_names(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    first = watched(sinks=sink, run="a")[2]
    with pytest.raises(gradmon.ArgumentError, match=r"`sinks` must be no other monitor's, whose readings would get"):
        watched(sinks=sink, run="b")
    first.close()


def test_a_rule_that_returns_something_else_harms_nobody():
    class Odd:
        name = "odd"

        def __call__(self, reading):
            return "an alert"

    failures, sink = Failures(), MemorySink()
    publisher = Publisher([Odd(), Above("loss", 0.5)], failures)
    publisher.open(sink, "run", 0)
    publisher.publish([reading()])
    assert [found.rule for found in sink.alerts] == ["loss_high"]
    assert failures == {"alert odd": 1}


def test_alerts_of_rules_that_are_gone_do_not_fire_for_ever():
    first = Publisher([Above("loss", 0.5), Above("other", 0.5)], Failures())
    first.publish([reading(), reading(name="other")])
    again = Publisher([Above("loss", 0.5)], Failures())
    again.load_state_dict(first.state_dict())
    assert [found.rule for found in again.alerts] == ["loss_high"]


@pytest.mark.parametrize("scheduled", ["before", "after"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_learning_rate_is_that_of_the_step(scheduled, kind):
    model, sink = torch.nn.Linear(3, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=kind(0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    options = {"metrics": ["loss", "sharpness", "stability"], "schedule": every(1), "sinks": sink}
    with Monitor(model, optimizer, loss, **options) as monitor:
        for _ in range(3):
            batch = torch.randn(4, 3)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            if scheduled == "before":
                scheduler.step()
            monitor.step(batch)
            if scheduled == "after":
                scheduler.step()
    rates = [value for _, value in sink.series("learning_rate")]
    assert rates == [0.5, 0.25, 0.125]
    pairs = zip(sink.series("sharpness"), sink.series("stability"), rates, strict=True)
    told = [(stable, sharp * rate / 2) for (_, sharp), (_, stable), rate in pairs if sharp == sharp]
    assert told
    assert all(abs(found - expected) <= 1e-6 * abs(expected) for found, expected in told)


def test_plain_values_of_numpy_describe_a_run_too():
    import numpy

    sink = Described()
    watched(sinks=[sink], hparams={"n": numpy.int64(3), "rate": numpy.float32(0.5), "flag": True})[2].close()
    assert {name: type(sink.info[name]) for name in ("n", "rate", "flag")} == {"n": int, "rate": float, "flag": bool}


class Described(MemorySink):
    def describe(self, info):
        self.info = dict(info)


def test_a_rule_that_cannot_say_what_it_looks_at_harms_nobody():
    class Odd:
        name = "odd"

        @property
        def listens(self):
            raise ValueError("boom")

        def __call__(self, reading):
            return None

    failures, sink = Failures(), MemorySink()
    publisher = Publisher([Odd(), Above("loss", 0.5)], failures)
    publisher.open(sink, "run", 0)
    publisher.publish([reading()])
    assert [found.rule for found in sink.alerts] == ["loss_high"]
    assert failures == {"alert odd": 1}


@pytest.mark.parametrize("length", [1, 40])
def test_a_run_that_was_over_before_anything_was_due_is_told(log, length):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, schedule=every(50)) as monitor:
        train(monitor, model, optimizer, length)
    told = f"nothing was looked at: none of the {length} steps was due; schedule=every({length // 10 or 1}) would have"
    assert [told in record.getMessage() for record in log] == [True]
    monitor.close()
    assert len(log) == 1


@pytest.mark.parametrize("length", [0, 50])
def test_a_run_without_steps_or_with_readings_is_not_told_off(log, length):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, schedule=every(50)) as monitor:
        train(monitor, model, optimizer, length)
    assert not log
