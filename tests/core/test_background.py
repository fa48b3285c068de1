"""The thread between the training and its sinks: nothing waits for a sink, and nothing that fits is lost."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import gradmon
from gradmon import Monitor, Reading, every
from gradmon._reading import Alert
from gradmon.alerts import Above
from gradmon.publishing import Failures, Publisher
from gradmon.sinks import Background, JsonlSink, MemorySink, read_jsonl, read_runs


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


def reading(value=1.0, step=1, name="loss", layer=None):
    return Reading(name, value, step, layer)


def alert(step=1):
    return Alert("nonfinite", "critical", "firing", 1.0, step, None, "message", "remedy")


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


def train(monitor, model, optimizer, steps):
    for _ in range(steps):
        batch = torch.randn(4, 3)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        monitor.step(batch)


def watched(**options):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    return model, optimizer, Monitor(model, optimizer, loss, metrics=["loss"], schedule=every(1), **options)


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


def test_nothing_that_was_written_is_lost_by_a_kill(tmp_path):
    """Whole lines can be read, and they are all but the newest."""
    script = textwrap.dedent("""
        import sys, torch
        from gradmon import Monitor, every
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss = lambda model, batch: model(batch).square().mean()
        monitor = Monitor(model, optimizer, loss, metrics=["loss"], schedule=every(1), sinks=sys.argv[1])
        for step in range(10**6):
            batch = torch.randn(4, 3)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
            if step == 100:
                print("there", flush=True)
    """)
    path = tmp_path / "run.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, f"jsonl:{path}"], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout.readline() == b"there\n"
        trainer.send_signal(signal.SIGKILL)
        assert trainer.wait(30) == -signal.SIGKILL
    (run,) = read_runs(path)
    losses = [r.step for r in run.readings if r.name == "loss"]
    assert losses == list(range(1, len(losses) + 1))
    assert len(losses) > 90
    assert (run.succeeded, run.ended) == (None, None)
    assert run.info["optimizer"] == "SGD"


def test_a_program_that_forgets_to_close_loses_nothing(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from gradmon import Reading
        from gradmon.publishing import Failures, Publisher
        from gradmon.sinks import JsonlSink
        class Late(JsonlSink):
            def write(self, readings):
                time.sleep(0.3)
                super().write(readings)
        publisher = Publisher(None, Failures())
        publisher.open([Late(sys.argv[1])], "run", 0)
        publisher.publish([Reading("loss", 1.0, 1)])
        publisher.publish([Reading("loss", 2.0, 2)])
    """)
    path = tmp_path / "run.jsonl"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    assert [r.step for r in read_jsonl(path).readings] == [1, 2]


def test_runs_are_read_with_what_describes_them_and_how_they_ended(tmp_path):
    path = tmp_path / "runs.jsonl"
    for name, steps in (("a", 2), ("b", 1), ("a", 1)):
        model, optimizer, monitor = watched(sinks=f"jsonl:{path}", run=name, hparams={"dataset": "made up", "lr": 0.5})
        with monitor:
            train(monitor, model, optimizer, steps)
    first, second = read_runs(path)
    assert (first.run, first.rank, second.run) == ("a", 0, "b")
    # What went on from the beginning has given up what was there before.
    assert [r.step for r in first.readings if r.name == "loss"] == [1]
    assert first.succeeded is True
    assert first.time < first.ended < time.time()
    assert first.info["dataset"] == "made up"
    assert first.info["lr"] == 0.5
    assert first.info["learning_rate"] == 0.01
    assert first.info["model"] == "Linear"
    assert first.info["parameters"] == 4
    assert first.info["schedule"] == "every(n=1)"
    assert first.info["torch"] == torch.__version__
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds.count("run") == kinds.count("info") == kinds.count("end") == 3
    assert len([r for r in read_jsonl(path).readings if r.name == "loss"]) == 4


def test_a_resumed_run_that_was_killed_has_no_end(tmp_path):
    path = tmp_path / "run.jsonl"
    model, optimizer, monitor = watched(sinks=f"jsonl:{path}")
    with monitor:
        train(monitor, model, optimizer, 1)
    model, optimizer, again = watched(sinks=f"jsonl:{path}")
    train(again, model, optimizer, 1)
    assert again.flush()
    (run,) = read_runs(path)
    assert (run.succeeded, run.ended) == (None, None)
    again.close()
    assert read_runs(path)[0].succeeded is True


@pytest.mark.parametrize("hparams", [{"a": [1]}, {1: 2}, "a", {"a": None}, {"a": 10**400}])
def test_hparams_are_checked(hparams):
    with pytest.raises(gradmon.ArgumentError, match=r"`hparams` must map names to numbers, strings or booleans\. Got"):
        watched(hparams=hparams)


@pytest.mark.parametrize("line", ['{"kind":"run","version":1,"time":"abc"}', '{"kind":"run","version":1,"rank":"x"}'])
def test_a_run_line_that_makes_no_sense(line, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(gradmon.ArgumentError, match=r"`path` must hold lines that a `JsonlSink` wrote\. Got line 1 of"):
        read_runs(path)


def test_what_a_resumed_run_gave_up_is_not_its_end(tmp_path):
    path = tmp_path / "run.jsonl"
    for steps, value in ((range(1, 11), 9.0), (range(6, 9), 1.0)):
        sink = JsonlSink(path)
        sink.bind("run", 0)
        for step in steps:
            sink.write([reading(value, step)])
        if value > 1:
            sink.alert(alert(10))
        sink.close()
    (run,) = read_runs(path)
    assert [(r.step, r.value) for r in run.readings if r.step > 5] == [(6, 1.0), (7, 1.0), (8, 1.0)]
    assert run.alerts == []


def test_two_runs_in_one_file_are_told_apart(tmp_path):
    path = tmp_path / "runs.jsonl"
    sinks = {name: JsonlSink(path) for name in ("a", "b")}
    for name, sink in sinks.items():
        sink.bind(name, 0)
    for step, name in enumerate("aabab", 1):
        sinks[name].write([reading(step=step)])
    for sink in sinks.values():
        sink.close()
    found = {run.run: [r.step for r in run.readings] for run in read_runs(path)}
    assert found == {"a": [1, 2, 4], "b": [3, 5]}


def test_one_sink_cannot_have_two_names(tmp_path):
    sink = JsonlSink(tmp_path / "run.jsonl")
    first = watched(sinks=sink, run="a")[2]
    with pytest.raises(gradmon.ArgumentError, match=r"`sinks` must be no other monitor's, whose readings would get"):
        watched(sinks=sink, run="b")
    first.close()


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


def test_what_had_waited_for_the_next_batch_joins_its_step(tmp_path):
    path = tmp_path / "run.jsonl"
    for given in ([reading(1.0, 5), reading(1.0, 6)], [reading(2.0, 5, "step_share"), reading(2.0, 6)]):
        sink = JsonlSink(path)
        sink.bind("run", 0)
        sink.write(given)
        sink.close()
    (run,) = read_runs(path)
    assert [(r.name, r.step, r.value) for r in run.readings] == [
        ("loss", 5, 1.0),
        ("step_share", 5, 2.0),
        ("loss", 6, 2.0),
    ]
