"""What the files of a run hold: whatever ends it, and however often it is resumed."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import gradmon
from gradmon.sinks import JsonlSink, read_jsonl, read_runs
from tests.core.sinking import alert, reading, train, watched


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


def test_alerts_of_a_run_that_was_saved_at_a_step_that_was_looked_at(tmp_path):
    """Part of that step is looked at again; what had ended then has ended, and what fired then still fires."""
    over, late, still = (alert(3)._replace(rule=rule) for rule in ("over", "late", "still"))
    new = alert(4)._replace(rule="new")
    path = tmp_path / "run.jsonl"
    for saved, steps in ((False, (3, 4, 5)), (True, (4, 5))):
        sink = JsonlSink(path)
        sink.bind("run", 0)
        for one in (late, still, new) if saved else (over, late, still):
            sink.alert(one)
        for step in steps:
            sink.write([reading(1.0, step)])
            if step == 4 and not saved:
                sink.alert(over._replace(step=4, state="resolved"))
                sink.alert(new)
        if not saved:
            sink.alert(late._replace(step=5, state="resolved"))
        sink.close()
    (run,) = read_runs(path)
    firing: list[str] = []
    for one in run.alerts:
        firing = [name for name in firing if name != one.rule] + [one.rule] * (one.state == "firing")
    assert firing == ["late", "still", "new"]
    assert [(one.rule, one.step) for one in run.alerts if one.state == "resolved"] == [("over", 4)]


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
