"""The thread between the training and its sinks: nothing waits for a sink, and nothing that fits is lost."""

import gc
import os
import threading
import time

import pytest

from gradmon.alerts import Above
from gradmon.publishing import Failures, Publisher
from gradmon.sinks import Background, MemorySink
from tests.core.sinking import alert, reading, train, watched


class Slow(MemorySink):
    """Takes what it is given when it is let, on whatever thread."""

    immediate = False

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.threads = set()
        self.ended = []

    def write(self, readings):
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        super().write(readings)

    def finish(self, succeeded):
        self.ended.append(succeeded)

    def close(self):
        self.ended.append("closed")


def raising(error):
    raise error


def test_calls_come_in_order_on_a_thread_of_the_sinks_own():
    sink = Slow()
    background = Background(sink, raising)
    for step in range(1, 6):
        background.write([reading(step=step)])
    background.alert(alert(5))
    background.finish(True)
    assert sink.readings == []
    assert not background.wait(0.05)
    sink.gate.set()
    background.close()
    assert background.wait(10)
    assert [r.step for r in sink.readings] == [1, 2, 3, 4, 5]
    assert len(sink.alerts) == 1
    assert sink.ended == [True, "closed"]
    assert len(sink.threads) == 1
    assert threading.get_ident() not in sink.threads
    assert background.dropped == 0


def test_the_oldest_are_dropped_and_counted_where_the_queue_is_full():
    sink = Slow()
    background = Background(sink, raising, capacity=10)
    background.write([reading(step=0)])
    while not sink.threads:
        time.sleep(0.001)
    for step in range(1, 8):
        background.write([reading(step=step)] * 3)
    assert background.dropped == 12
    sink.gate.set()
    background.finish(False)
    background.close()
    assert background.wait(10)
    assert [r.step for r in sink.readings] == [0, 5, 5, 5, 6, 6, 6, 7, 7, 7]
    assert sink.ended == [False, "closed"]


def test_one_write_that_is_larger_than_the_queue_is_taken():
    sink = Slow()
    sink.gate.set()
    background = Background(sink, raising, capacity=10)
    background.write([reading()] * 30)
    assert background.wait(10)
    assert (len(sink.readings), background.dropped) == (30, 0)
    background.close()


def test_errors_are_told_and_the_next_call_is_made():
    class Broken(MemorySink):
        def write(self, readings):
            if readings[0].step == 2:
                raise OSError("disk full")
            super().write(readings)

    errors, sink = [], Broken()
    background = Background(sink, errors.append)
    for step in (1, 2, 3):
        background.write([reading(step=step)])
    assert background.wait(10)
    assert [str(error) for error in errors] == ["disk full"]
    assert [r.step for r in sink.readings] == [1, 3]
    background.close()


def test_no_thread_stays_behind():
    before = set(threading.enumerate())
    sink = Slow()
    sink.gate.set()
    forgotten, closed = Background(sink, raising), Background(sink, raising)
    forgotten.write([reading()])
    closed.write([reading()])
    closed.close()
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert len(sink.readings) == 2


def test_a_process_that_was_forked_has_a_thread_of_its_own():
    sink = MemorySink()
    background = Background(sink, raising)
    background.write([reading(step=1)])
    assert background.wait(10)
    child = os.fork()
    if child == 0:  # pragma: no cover
        background.write([reading(step=2)])
        fine = background.wait(10) and [r.step for r in sink.readings] == [1, 2]
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [r.step for r in sink.readings] == [1]
    background.close()


def test_a_sink_that_hangs_costs_the_training_nothing_and_loses_nothing():
    sink = Slow()
    model, optimizer, monitor = watched(sinks=[sink])
    train(monitor, model, optimizer, 50)
    assert sink.readings == []
    assert monitor.readings["loss"].step == 50
    assert monitor.readings["sink_dropped"].value == 0
    assert not monitor.flush(0.05)
    sink.gate.set()
    assert monitor.flush(10)
    assert [r.step for r in sink.readings if r.name == "loss"] == list(range(1, 51))
    monitor.close()
    assert sink.ended == [True, "closed"]


def test_a_sink_that_never_comes_back_does_not_keep_the_program(monkeypatch, caplog):
    monkeypatch.setattr("gradmon.publishing._PATIENCE", 0.2)
    sink = Slow()
    model, optimizer, monitor = watched(sinks=[sink])
    train(monitor, model, optimizer, 2)
    monitor.close()
    assert monitor.failures == {"sink Slow": 1}
    assert "Slow did not come to its end in 0.2 s" in caplog.text
    sink.gate.set()


@pytest.mark.parametrize(
    ("error", "succeeded"), [(None, True), (KeyboardInterrupt, True), (ValueError, False), (SystemExit, False)]
)
def test_sinks_learn_how_the_run_ended(error, succeeded):
    sink = Slow()
    sink.gate.set()
    model, optimizer, monitor = watched(sinks=[sink])

    def run():
        with monitor:
            train(monitor, model, optimizer, 2)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    monitor.close()
    assert sink.ended == [succeeded, "closed"]


def test_immediate_sinks_are_called_on_the_spot():
    sink = MemorySink()
    failures = Failures()
    publisher = Publisher([Above("loss", 0.5)], failures)
    publisher.open(sink, "run", 0)
    publisher.publish([reading()])
    assert len(sink.readings) == len(sink.alerts) == 1


def test_a_crash_that_is_on_its_way_is_no_good_end():
    def run():
        sink = Slow()
        sink.gate.set()
        monitor = watched(sinks=[sink])[2]
        ended.append(sink)
        try:
            raise ValueError("the training")
        finally:
            monitor.close()

    ended = []
    with pytest.raises(ValueError, match="the training"):
        run()
    assert ended[0].ended == [False, "closed"]


def test_an_exception_that_was_there_before_does_not_count():
    sink = Slow()
    sink.gate.set()
    try:
        raise ValueError("before")
    except ValueError:
        monitor = watched(sinks=[sink])[2]
        monitor.close()
    assert sink.ended == [True, "closed"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_thread_does_not_end_the_queue(error):
    class Leaving(MemorySink):
        immediate = False

        def write(self, readings):
            if readings[0].step == 1:
                raise error
            super().write(readings)

    errors, sink = [], Leaving()
    background = Background(sink, errors.append)
    background.write([reading(step=1)])
    background.write([reading(step=2)])
    assert background.wait(10)
    assert [r.step for r in sink.readings] == [2]
    assert [str(found) for found in errors] == [f"{error.__name__}: "]
    background.close()


def test_a_monitor_that_is_forgotten_leaves_no_thread():
    before = set(threading.enumerate())
    sink = Slow()
    sink.gate.set()
    model, optimizer, monitor = watched(sinks=[sink])
    train(monitor, model, optimizer, 2)
    assert monitor.flush(10)
    del monitor, optimizer, model
    gc.collect()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
