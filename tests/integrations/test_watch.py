import math
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from gradmon import Alert, Reading
from gradmon._errors import ArgumentError, GradmonError
from gradmon.sinks import JsonlSink
from gradmon_integrations.watch import command
from gradmon_integrations.watch.files import FileSource, Tail
from gradmon_integrations.watch.runs import SourceError
from tests.integrations.emulator import Gate, Terminal
from tests.integrations.watched import FIRING, NONFINITE, once, probe, watch


def wrote(path, steps=3, run="mlp", rank=0, alerts=(), end=None, **more):
    sink = JsonlSink(path)
    sink.bind(run, rank)
    sink.describe({"model": "Net", "optimizer": "Adam", "lr": 0.1})
    for step in range(1, steps + 1):
        probe(sink, step, **more)
        for alert in alerts:
            if alert.step == step:
                sink.alert(alert)
    if end is not None:
        sink.finish(end)
    sink.close()
    return path


@pytest.fixture(scope="module", autouse=True)
def cpu_bound_code_is_imported():
    """What the forked scenes use is imported before they fork."""
    import rich.live  # noqa: F401


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_finished_run(tmp_path, capsys):
    path = wrote(tmp_path / "a.jsonl", alerts=[FIRING], end=True)
    assert once(path) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"gradmon watch  {path}")
    assert re.search(r"^mlp  finished +3 +\d s ago +\d s ago +Net Adam", text, re.MULTILINE)
    assert re.search(r"^  loss +low +0.667 +█▃▁", text, re.MULTILINE)
    assert re.search(r"^  weight_condition +low +> 1000 +! +3000 ", text, re.MULTILINE)
    assert "! ill_conditioned since step 2, weight_condition now 3000, mostly in fc. Slow down." in " ".join(
        text.split()
    )
    assert "learning_rate" in text
    assert "sink_errors" not in text


def test_counts_that_are_not_zero_are_shown(tmp_path, capsys):
    assert once(wrote(tmp_path / "a.jsonl", sink_errors=2.0)) == 0
    assert re.search(r"^  sink_errors +2 ", capsys.readouterr().out, re.MULTILINE)


def test_an_error_and_a_run_without_an_end(tmp_path, capsys):
    wrote(tmp_path / "bad.jsonl", run="bad", end=False)
    wrote(tmp_path / "on.jsonl", run="on", rank=2)
    assert once(tmp_path) == 0
    text = capsys.readouterr().out
    assert re.search(r"^bad +ended by an error +3 +\d s ago", text, re.MULTILINE)
    assert re.search(r"^on rank 2 +running +3 ", text, re.MULTILINE)


def test_a_silent_run(tmp_path, capsys):
    path = wrote(tmp_path / "a.jsonl")
    os.utime(path, (time.time(), time.time() - 700))
    assert once(path) == 0
    assert "stalled or killed, silent for 11 min 40 s" in capsys.readouterr().out
    assert once(path, "--silence", 800) == 0
    assert re.search(r"mlp +running", capsys.readouterr().out)


def test_a_critical_alert_gives_3(tmp_path, capsys):
    path = wrote(tmp_path / "a.jsonl", alerts=[FIRING, NONFINITE])
    assert once(path) == 3
    assert capsys.readouterr().out.index("nonfinite") < 1e9
    wrote(path, steps=0)
    resolved = JsonlSink(path)
    resolved.bind("mlp", 0)
    resolved.alert(NONFINITE._replace(state="resolved", step=4))
    resolved.close()
    assert once(path) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"x does not exist\."),
        (lambda path: path.mkdir(), r"x holds no run: no file named \*\.jsonl that a `JsonlSink` wrote\."),
        (lambda path: path.write_text(""), r"x is empty so far\."),
        (
            lambda path: ((path / "r").mkdir(parents=True), (path / "r" / "events.out.tfevents.1.host").touch()),
            r"x holds event files of TensorBoard only: `tensorboard --logdir .*x` shows them\. To watch a run, give",
        ),
        (
            lambda path: (path.mkdir(), (path / "data.jsonl").write_text('{"text": "hello"}\n')),
            r"x holds no run: no file named \*\.jsonl that a `JsonlSink` wrote\.",
        ),
    ],
)
def test_where_there_is_nothing(make, message, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(GradmonError, match=message):
        once(tmp_path / "x")


@pytest.mark.parametrize(
    "text", ["hello\n", "[1]\n", '{"text": "hello"}\n', '{"kind":"reading"}\n', '{"kind":"end"}\n', '{"kind":"info"}\n',
             '{"kind":"run","rank":"x"}\n', '{"kind":"reading","name":"loss","value":{}}\n']
)  # fmt: skip
def test_another_file(text, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ArgumentError, match="`path` must hold lines that a `JsonlSink` wrote"):
        once(tmp_path / "x")


def test_a_newer_format(tmp_path):
    (tmp_path / "x").write_text('{"kind":"run","run":"a","rank":0,"version":99,"time":1}\n')
    with pytest.raises(ArgumentError, match="version 99"):
        once(tmp_path / "x")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = wrote(tmp_path / "a.jsonl")
    path.chmod(0)
    with pytest.raises(ArgumentError, match="be a file that can be read"):
        once(path)


def test_a_file_is_followed_while_it_grows(tmp_path):
    source = FileSource(tmp_path)
    with pytest.raises(SourceError):
        source.read()
    path = tmp_path / "deep" / "a.jsonl"
    sink = JsonlSink(path)
    sink.bind("mlp", 0)
    (run,) = source.read()
    assert run.step is None
    assert run.state(time.time(), 600) == ("waiting for the first look", True)
    probe(sink, 1)
    with path.open("ab") as file:
        file.write(b'{"kind":"reading","name":"loss","val')
    (run,) = source.read()
    assert run.step == 1
    assert run.history.values("loss") == [2.0]
    with path.open("ab") as file:
        file.write(b'ue":7.5,"step":2}\n')
    (run,) = source.read()
    assert run.history.values("loss") == [2.0, 7.5]
    wrote(tmp_path / "new.jsonl", run="new")
    assert [one.run for one in source.read()] == ["mlp", "new"]
    sink.close()


def test_a_long_file_is_read_in_parts(tmp_path, monkeypatch):
    path = wrote(tmp_path / "a.jsonl", steps=50)
    monkeypatch.setattr("gradmon_integrations.watch.files._CHUNK", 17)
    (run,) = FileSource(path).read()
    assert run.step == 50
    assert len(run.history.series["loss"]) == 50


def test_layers_are_not_kept_but_a_name_like_it_is(tmp_path):
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.bind("mlp", 0)
    sink.write([Reading("grad_norm", 1.0, 1, layer="fc"), Reading('odd"layer":', 2.0, 1), Reading("loss", 3.0, 1)])
    sink.alert(Alert("dead_layer", "warning", "firing", 0.0, 1, "fc", "No gradient.", "Look."))
    sink.close()
    (run,) = FileSource(tmp_path / "a.jsonl").read()
    assert list(run.history.series) == ['odd"layer":', "loss"]
    assert [alert.layer for alert in run.history.active] == ["fc"]


def test_a_file_that_is_replaced_or_moved_away(tmp_path):
    path = wrote(tmp_path / "a.jsonl", steps=5)
    tail = Tail(path)
    tail.read()
    assert tail.runs["mlp", 0].step == 5
    other = wrote(tmp_path / "b", steps=2, run="other")
    other.replace(path)
    tail.read()
    assert list(tail.runs) == [("other", 0)]
    path.write_text("")
    tail.read()
    assert tail.runs == {}
    wrote(path, run="third")
    tail.read()
    path.unlink()
    tail.read()
    assert list(tail.runs) == [("third", 0)]


def test_a_line_that_was_torn_and_a_run_that_was_resumed(tmp_path):
    path = wrote(tmp_path / "a.jsonl", steps=6, alerts=[FIRING, NONFINITE._replace(step=5)])
    with path.open("ab") as file:
        file.write(b'{"kind":"rea')
    sink = JsonlSink(path)
    sink.bind("mlp", 0)
    (run,) = FileSource(path).read()
    assert run.step == 6
    assert [alert.rule for alert in run.history.active] == ["ill_conditioned", "nonfinite"]
    probe(sink, 4)
    sink.close()
    (run,) = FileSource(path).read()
    assert run.step == 4
    assert [reading.step for reading in run.history.series["loss"]] == [1, 2, 3, 4]
    assert [alert.rule for alert in run.history.active] == ["ill_conditioned"]


def test_alerts_of_a_run_that_was_saved_at_a_step_that_was_looked_at(tmp_path):
    path = wrote(tmp_path / "a.jsonl", steps=3, alerts=[FIRING, FIRING._replace(step=3, state="resolved"), NONFINITE])
    sink = JsonlSink(path)
    sink.bind("mlp", 0)
    sink.alert(NONFINITE)  # it fires since step 3, after which the run was saved
    probe(sink, 3)
    sink.close()
    (run,) = FileSource(path).read()
    assert [(alert.rule, alert.state) for alert in run.history.alerts] == [
        ("ill_conditioned", "firing"),
        ("ill_conditioned", "resolved"),
        ("nonfinite", "firing"),
    ]
    assert [alert.rule for alert in run.history.active] == ["nonfinite"]


def test_several_runs_in_one_file_keep_their_times(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"kind":"run","run":"one","rank":0,"version":1,"time":100}\n'
        '{"kind":"reading","name":"loss","value":1.0,"step":1}\n'
        '{"kind":"run","run":"two","rank":0,"version":1,"time":200}\n'
        '{"kind":"end","succeeded":true,"time":250}\n'
        '{"kind":"run","run":"three","rank":0,"version":1,"time":300}\n'
        '{"kind":"something new","x":1}\n'
    )
    one, two, three = FileSource(path).read()
    assert (one.began, one.newest) == (100, 200)
    assert (two.began, two.newest, two.succeeded, two.ended) == (200, 250, True, 250)
    assert three.newest == pytest.approx(path.stat().st_mtime)


def test_a_file_without_a_run_line(tmp_path):
    (tmp_path / "plain.jsonl").write_text('{"kind":"reading","name":"loss","value":null,"step":1}\n')
    (run,) = FileSource(tmp_path / "plain.jsonl").read()
    assert (run.run, run.rank, run.began) == ("plain", 0, None)
    assert math.isnan(run.history.newest("loss").value)


# --- the command ---------------------------------------------------------------------------------------------------


def test_one_run_of_several(tmp_path, capsys):
    for name in ("one", "two"):
        wrote(tmp_path / f"{name}.jsonl", run=name)
    assert once(tmp_path, "--run", "two") == 0
    text = capsys.readouterr().out
    assert "two" in text
    assert " one " not in text
    with pytest.raises(GradmonError, match=r"There is no run 'three'\. There are: one, two\."):
        once(tmp_path, "--run", "three")


def test_one_source_of_several(tmp_path, capsys):
    wrote(tmp_path / "a.jsonl")
    assert once(tmp_path / "a.jsonl", tmp_path / "nothing") == 0
    seen = capsys.readouterr()
    assert seen.err == f"gradmon: {tmp_path / 'nothing'} does not exist.\n"
    assert "mlp" in seen.out


@pytest.mark.parametrize("option", ["--interval", "--silence"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "nan", "inf"])
def test_wrong_options(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        watch(tmp_path, f"{option}={value}")
    assert ended.value.code == 2
    assert f"must be a positive number of seconds. Got '{value}'" in capsys.readouterr().err


def test_without_rich(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(GradmonError, match=r'needs rich .* pip install "gradmon\[terminal\]"'):
        once(tmp_path)


# --- in a terminal -------------------------------------------------------------------------------------------------


def test_it_shows_what_is_new_and_leaves_the_terminal_as_it_was(tmp_path):
    gate, path = Gate(), tmp_path / "runs" / "a.jsonl"

    def scene():
        print("before")
        status = watch(tmp_path / "runs", "--interval", 0.05)
        print(f"after {status}")
        gate.wait()

    terminal = Terminal(90, 30)
    terminal.start(scene)
    terminal.until(lambda: "runs does not exist. Trying again." in " ".join(terminal.text.split()))
    sink = JsonlSink(path)
    sink.bind("mlp", 0)
    probe(sink, 1)
    terminal.until(lambda: re.search(r"mlp  running  1 ", terminal.text))
    assert "Trying again" not in terminal.text
    for step in range(2, 6):
        probe(sink, step)
    sink.alert(FIRING)
    terminal.until(lambda: re.search(r"mlp  running  5 ", terminal.text) and "Slow down." in terminal.text)
    terminal.resize(60, 20)
    terminal.until(lambda: terminal.screen.display[0].startswith("gradmon watch"))
    sink.finish(True)
    sink.close()
    terminal.until(lambda: "finished" in terminal.text)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.until(lambda: "after 130" in terminal.text)
    assert b"\x1b[?1049h" in terminal.raw
    assert b"\x1b[?1049l" in terminal.raw
    assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")
    last = terminal.raw.rpartition(b"\x1b[?1049l")[2].decode()
    assert "finished" in last
    gate.look(terminal)
    assert terminal.end() == 0


def test_where_the_output_is_no_terminal_there_are_lines(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.jsonl"
    left = [lambda: wrote(path, steps=2), time.sleep, lambda: wrote(path, alerts=[FIRING], end=True), time.sleep]

    def sleep(seconds):
        assert seconds == 0.5
        if not left:
            raise KeyboardInterrupt
        work = left.pop(0)
        work(1.1) if work is time.sleep else work()

    monkeypatch.setattr(command, "time", SimpleNamespace(time=time.time, sleep=sleep))
    assert watch(path, "--interval", 0.5) == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path} does not exist."
    assert lines[1] == "mlp  running  step 2  loss 1  alerts none"
    assert lines[2:] == ["mlp  finished  step 3  loss 0.667  alerts ill_conditioned"]
