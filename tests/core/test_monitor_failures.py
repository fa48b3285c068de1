"""What fails inside of a monitor never stops the training."""

import gc
import math
import traceback
import weakref
from dataclasses import dataclass

import pytest
import torch

import gradmon
from gradmon import Metric, Monitor, Unavailable, every
from gradmon._evidence import BatchGradient
from gradmon.alerts import Above
from gradmon.sinks import MemorySink
from tests.core.monitored import assert_same_weights, by_step, data, explode, mlp, mse, train, trained_alone, watched


class BrokenSink(MemorySink):
    def write(self, readings):
        explode()

    def alert(self, alert):
        explode()

    def close(self):
        explode()


@dataclass(frozen=True)
class FrozenError(Exception):
    """An error that nothing can be assigned to."""

    number: int


class BrokenRule:
    name = "broken"

    def __call__(self, reading):
        explode()


def broken_metric(needs=(BatchGradient,), compute=explode):
    return Metric("broken", needs, compute, "low", "a test")


def test_failing_metric(log):
    monitor, sink, model = watched(metrics=[broken_metric(), "loss"])
    assert_same_weights(model, trained_alone())
    assert monitor.failures == {"metric broken": 3}
    assert len(log) == 1
    assert "metric broken" in log[0].getMessage()
    for reading in by_step(sink, "broken").values():
        assert math.isnan(reading.value)
        assert reading.reason == "RuntimeError: boom"
    assert all(math.isfinite(reading.value) for reading in by_step(sink, "loss").values())
    assert [r.value for r in by_step(sink, "monitor_failures").values()] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, float("nan")])
def test_metric_that_is_nan_gets_a_reason(value):
    monitor, _, _ = watched(metrics=[broken_metric(compute=lambda seen: value)])
    assert math.isnan(monitor.readings["broken"].value)
    assert monitor.readings["broken"].reason == "not a number"
    assert not monitor.failures


def test_metric_that_is_unavailable_is_no_failure(log):
    def compute(seen):
        raise Unavailable("nothing to see")

    monitor, _, _ = watched(metrics=[broken_metric(compute=compute)])
    assert monitor.readings["broken"].reason == "nothing to see"
    assert not monitor.failures
    assert not log


@pytest.mark.parametrize("order", [1, -1])
def test_failing_sink(log, order):
    model, good, bad = mlp(), MemorySink(), BrokenSink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sinks = [bad, good][::order]
    with Monitor(model, optimizer, mse, metrics=["loss"], schedule=every(1), sinks=sinks, alerts=None) as monitor:
        train(model, optimizer, data(3), monitor)
    assert_same_weights(model, trained_alone())
    assert monitor.failures == {"sink BrokenSink": 4}
    assert [r.value for r in by_step(good, "sink_errors").values()] == [0, 1, 2]
    assert len(log) == 1
    assert list(by_step(good, "loss")) == [1, 2, 3]


def test_failing_schedule(log):
    def schedule(step):
        return explode() if step == 2 else True

    monitor, sink, model = watched(metrics=["loss", "update_ratio"], schedule=schedule)
    assert_same_weights(model, trained_alone())
    assert list(by_step(sink, "loss")) == [1, 3]
    assert set(monitor.failures) == {"schedule"}
    assert len(log) == 1


def test_failing_rule(log):
    monitor, sink, model = watched(metrics=["loss"], alerts=[BrokenRule(), Above("loss", 0.0)], on_alert=None)
    assert_same_weights(model, trained_alone())
    assert set(monitor.failures) == {"alert broken"}
    assert len(log) == 1
    assert [alert.rule for alert in sink.alerts] == ["loss_high"]


def test_failing_loss(log):
    monitor, sink, model = watched(loss=explode, metrics="all")
    assert_same_weights(model, trained_alone())
    names = [name for name, metric in gradmon.METRICS.items() if not metric.on_demand]
    for name in names:
        reading = by_step(sink, name)[1]
        assert math.isnan(reading.value)
        assert reading.reason == "RuntimeError: boom"
    assert sum(monitor.failures.values()) > 0
    assert len(log) == len(set(monitor.failures))


def test_one_failing_loss_is_logged_once(log):
    watched(loss=explode, metrics="all")
    assert len(log) == 1


def test_a_failing_loss_is_logged_with_the_line_that_failed(log):
    def loss(model, batch):
        return model(batch[0])["logits"]

    watched(loss=loss, metrics=["loss", "gradient_rank", "step_ratio"])
    assert 'return model(batch[0])["logits"]' in "".join(traceback.format_exception(*log[0].exc_info))


def test_nothing_of_a_failed_pass_is_held(log):
    held = []

    def loss(model, batch):
        output = model(batch[0])
        if torch.equal(batch[0], data(3)[-1][0]):  # the first one is held by the record of the log
            held.append(weakref.ref(output))
        return output["logits"]

    gc.collect()
    gc.disable()  # it is to go at once, not when there is time
    try:
        watched(loss=loss, metrics=["loss", "gradient_rank", "step_ratio"])
        alive = [output for output in held if output() is not None]
    finally:
        gc.enable()
    assert held
    assert not alive


def test_loss_that_fails_for_a_while():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return explode() if len(calls) <= 2 else mse(model, batch)

    monitor, sink, model = watched(loss=loss, metrics=["loss", "grad_norm"])
    assert_same_weights(model, trained_alone())
    values = by_step(sink, "grad_norm")
    assert math.isnan(values[1].value)
    assert math.isfinite(values[3].value)
    assert math.isfinite(monitor.readings["loss"].value)


@pytest.mark.parametrize("batch", [None, "text", {"a": 1}, torch.tensor(1.0), torch.ones(0, 3)])
def test_batch_that_cannot_be_used(log, batch):
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, mse, schedule=every(1), sinks=[sink])
    for good in data(2):
        optimizer.zero_grad()
        mse(model, good).backward()
        optimizer.step()
        monitor.step(batch)
    assert_same_weights(model, trained_alone(2))
    assert sum(monitor.failures.values()) >= 2
    assert len(log) == len(monitor.failures)
    assert not any(math.isfinite(r.value) for r in sink.readings if r.name in gradmon.METRICS)


def test_keyboard_interrupt_is_not_swallowed():
    def loss(model, batch):
        raise KeyboardInterrupt

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, loss, schedule=every(1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        monitor.step(data(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_an_error_that_nothing_can_be_assigned_to(log):
    class Frozen:
        name = "frozen"

        def __call__(self, reading):
            raise FrozenError(1)

    monitor, _, model = watched(metrics=["loss"], alerts=[Frozen()])
    assert set(monitor.failures) == {"alert frozen"}
    assert "FrozenError" in "".join(traceback.format_exception(*log[0].exc_info))
    assert_same_weights(model, trained_alone())
