import argparse
import base64
import http.server
import io
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

from gradmon import Alert, Reading
from gradmon._errors import ArgumentError, GradmonError
from gradmon.metrics import OWN
from gradmon.sinks import JsonlSink
from gradmon_integrations.display.words import duration, one_line
from gradmon_integrations.sinks.prometheus import PrometheusSink
from gradmon_integrations.watch import command
from gradmon_integrations.watch.command import COMMAND
from gradmon_integrations.watch.exporter import ExporterSource
from gradmon_integrations.watch.files import FileSource, Tail
from gradmon_integrations.watch.frame import frame, line
from gradmon_integrations.watch.runs import SourceError, Watched
from tests.integrations.emulator import Gate, Terminal

FIRING = Alert("ill_conditioned", "warning", "firing", 2e3, 2, None, "weight_condition is 2000.", "Slow down.", ("fc",))
NONFINITE = Alert("nonfinite", "critical", "firing", math.nan, 3, None, "The loss is not finite.", "Clip.")
NOW = 1_700_000_000.0


def probe(sink, step, **more):
    values = {"loss": 2 / step, "weight_condition": 1e3 * step, "learning_rate": 0.1, "sink_errors": 0.0, **more}
    sink.write([Reading(name, value, step) for name, value in values.items()])


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


def watch(*options):
    parser = argparse.ArgumentParser("gradmon watch")
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args([str(option) for option in options]))


def once(*options, columns=110, monkeypatch=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        return watch("--once", *options)


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


# --- exporters -----------------------------------------------------------------------------------------------------


@contextmanager
def serving(text, wanted=None):
    """A server of what `text["served"]` holds; `wanted`: the Authorization it asks for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = wanted is None or self.headers.get("Authorization") == wanted
            found = self.path == "/metrics" and allowed
            self.send_response(200 if found else 401 if not allowed else 404)
            self.end_headers()
            self.wfile.write(text["served"].encode() if found else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


SERVED = """\
# TYPE gradmon_loss gauge
gradmon_loss{{run="mlp",rank="0"}} {loss}
# TYPE gradmon_step_ratio gauge
gradmon_step_ratio{{run="mlp",rank="0"}} 2.5
# TYPE gradmon_learning_rate gauge
gradmon_learning_rate{{run="mlp",rank="0"}} 0.1
# TYPE gradmon_layer_grad_norm gauge
gradmon_layer_grad_norm{{run="mlp",rank="0",layer="fc"}} 2.5
# TYPE gradmon_alert_step_too_long gauge
gradmon_alert_step_too_long{{run="mlp",rank="0"}} {firing}
# TYPE gradmon_alerts_firing gauge
gradmon_alerts_firing{{run="mlp",rank="0"}} {firing}
# TYPE gradmon_last_step gauge
gradmon_last_step{{run="mlp",rank="0"}} {step}
# TYPE gradmon_last_probe_timestamp_seconds gauge
gradmon_last_probe_timestamp_seconds{{run="mlp",rank="0"}} 1.7e9
# TYPE gradmon_run_start_timestamp_seconds gauge
gradmon_run_start_timestamp_seconds{{run="mlp",rank="0"}} 1.699999e9
# TYPE gradmon_run_finished gauge
gradmon_run_finished{{run="mlp",rank="0"}} {finished}
# TYPE gradmon_run_info gauge
gradmon_run_info{{run="mlp",rank="0",model="Net",optimizer="Adam",device=""}} 1
# TYPE gradmon_sink_errors_total counter
gradmon_sink_errors_total{{run="mlp",rank="0"}} 3
# TYPE gradmon_probe_duration_seconds histogram
gradmon_probe_duration_seconds_bucket{{run="mlp",rank="0",le="+Inf"}} 3
gradmon_probe_duration_seconds_sum{{run="mlp",rank="0"}} 3
gradmon_probe_duration_seconds_count{{run="mlp",rank="0"}} 3
# TYPE python_info gauge
python_info{{version="3"}} 1
"""


def served(step=10, loss=0.5, firing=0, finished=0):
    return SERVED.format(step=step, loss=loss, firing=firing, finished=finished)


def test_an_exporter_look_by_look():
    text = {"served": served(firing=1)}
    with serving(text) as url:
        source = ExporterSource(url)
        (run,) = source.read()
        assert (run.label, run.step, run.began, run.newest) == ("mlp", 10, 1.699999e9, 1.7e9)
        assert run.info == {"model": "Net", "optimizer": "Adam"}
        assert set(run.history.series) == {"loss", "step_ratio", "learning_rate", "sink_errors"}
        (alert,) = run.history.active
        assert (alert.rule, alert.severity, alert.step, alert.value) == ("step_too_long", "warning", None, 2.5)
        assert "lower the learning rate from 0.1" in alert.remedy
        assert run.state(NOW + 5, 600) == ("running", True)
        source.read()
        assert len(run.history.series["loss"]) == 1
        text["served"] = served(step=20, loss="NaN")
        source.read()
        assert [reading.step for reading in run.history.series["loss"]] == [10, 20]
        assert run.history.active == []
        text["served"] = served(step=30, firing=1)
        source.read()
        assert [alert.step for alert in run.history.active] == [30]
        text["served"] = served(step=30, finished=1)
        source.read()
        assert run.state(NOW + 60, 600) == ("finished", True)
        text["served"] = ""
        source.read()
        assert run.lost == "no longer served"
        text["served"] = served(step=1).replace("1.699999e9", "1.7e9")
        (run,) = source.read()
        assert [reading.step for reading in run.history.series["loss"]] == [1]
        assert run.lost == ""
    (run,) = source.read()
    assert run.state(NOW, 600) == ("out of reach: [Errno 111] Connection refused", False)


def test_the_exporter_of_the_sink(capsys):
    sink = PrometheusSink(0, linger=0)
    try:
        sink.bind("mlp", 0)
        for step in (1, 2):
            probe(sink, step, step_ratio=1.5, probe_seconds=0.1)
        sink.alert(Alert("step_too_long", "warning", "firing", 1.5, 2, None, "step_ratio is 1.5.", "Lower."))
        assert once(sink.url) == 0
        assert once(sink.url.removesuffix("/metrics")) == 0
        sink.alert(NONFINITE)
        assert once(sink.url) == 3
    finally:
        sink.close()
    text = capsys.readouterr().out
    assert re.search(r"^mlp +running +2 ", text, re.MULTILINE)
    assert re.search(r"^  loss +low +1 ", text, re.MULTILINE)
    assert "! step_too_long step_ratio now 1.5." in " ".join(text.split())
    shown = {row.split()[0] for row in text.splitlines() if row.startswith("  ")}
    assert shown & OWN.keys() == {"learning_rate"}


def test_a_password_in_the_address(capsys):
    wanted = f"Basic {base64.b64encode(b'me:secret').decode()}"
    with serving({"served": served()}, wanted) as url:
        assert once(url.replace("//", "//me:secret@")) == 0
        assert "secret" not in "".join(capsys.readouterr())
        with pytest.raises(GradmonError, match="cannot be read: Unauthorized"):
            once(url)


@pytest.mark.parametrize("text", ["<html>", 'a{b="c"', ""])
def test_something_else_is_served(text):
    with serving({"served": text}) as url, pytest.raises(SourceError, match=r"serves no run|cannot be read"):
        ExporterSource(url).read()


def test_nobody_answers():
    with serving({"served": ""}) as url:
        pass
    with pytest.raises(GradmonError, match=r"http://127.0.0.1:\d+/metrics cannot be read: .*refused"):
        once(url)


@pytest.mark.parametrize("url", ["ftp://host/x", "http://", "://"])
def test_addresses_that_are_none(url):
    with pytest.raises(ArgumentError, match="`SOURCE` must be a file, a directory or an address such as http://"):
        once(url)


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


def stub(**fields):
    return Watched("mlp", 0, **fields)


@pytest.mark.parametrize(
    ("fields", "state", "good"),
    [
        ({}, "waiting for the first look", True),
        ({"step": 1, "newest": NOW - 5}, "running", True),
        ({"step": 1, "newest": NOW - 601}, "stalled or killed, silent for 10 min 1 s", False),
        ({"newest": NOW - 7200}, "stalled or killed, silent for 2 h", False),
        ({"succeeded": True, "ended": NOW - 86400}, "finished", True),
        ({"succeeded": True}, "finished", True),
        ({"succeeded": False, "ended": NOW - 3, "newest": NOW - 3}, "ended by an error", False),
        ({"lost": "refused", "step": 1}, "out of reach: refused", False),
    ],
)
def test_states(fields, state, good):
    assert stub(**fields).state(NOW, 600) == (state, good)


def picture(runs, width=100, rows=None):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(frame(runs, "title", console, silence=600, rows=rows, now=NOW))
    return console.file.getvalue()


def full(name, rank=0, newest=NOW, metrics=("loss", "step_ratio", "noise_ratio", "grad_norm", "gradient_rank")):
    run = Watched(name, rank, newest=newest, began=NOW - 100)
    for step in range(1, 30):
        run.take([Reading(metric, step / 10, step) for metric in metrics])
    return run


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_picture_fits(width, count):
    runs = [full(f"run-{n}", rank=n) for n in range(count)]
    runs[0].take([], [FIRING, NONFINITE])
    text = picture(runs, width)
    assert max(map(len, text.splitlines())) <= width
    shown = min(count, max(1, (width - 39) // 20))
    more = f"{count - shown} more, for which the terminal is too narrow; --run NAME shows one."
    assert (more in " ".join(text.split())) is (count > shown)
    assert text.count("29 ") >= count


@pytest.mark.parametrize("width", [40, 50])
def test_a_narrow_picture_keeps_the_state(width):
    run = full("ill-conditioned")
    run.succeeded, run.ended = True, NOW
    text = picture([run], width)
    assert max(map(len, text.splitlines())) <= width
    assert re.search(r"^run +state +step +newest( +began)? *$", text, re.MULTILINE)
    assert re.search(r"^ill\S* +finished +29 +0 s ago", text, re.MULTILINE)


@pytest.mark.parametrize("rows", [8, 14, 24, 40])
def test_a_low_terminal_shows_the_alerts_first(rows):
    run = full("mlp", metrics=[f"metric_{n}" for n in range(30)] + ["loss", "step_ratio"])
    run.take([], [FIRING._replace(rule=f"rule_{n}", remedy="Slow down. " * 20) for n in range(4)])
    text = picture([run], rows=rows)
    assert [f"! rule_{n}" in " ".join(text.split()) for n in range(4)] == [True] * 4
    assert text.count("Slow down.") >= 4
    assert ("since step 2" in text) is (rows == 40)
    assert re.search("^ *loss ", text, re.MULTILINE)
    assert len(text.splitlines()) <= max(rows, 14)


def test_the_newest_runs_get_the_columns():
    runs = [full("old", newest=NOW - 500), full("new"), full("done")]
    runs[2].succeeded = True
    head = next(row for row in picture(runs, 80).splitlines() if row.startswith("metric"))
    assert re.search(r"old +new$", head.rstrip())


def test_a_run_without_numbers():
    text = picture([stub(newest=NOW)])
    assert "waiting for the first look" in text
    assert "metric" not in text


def test_names_cannot_steer_the_terminal():
    run = full("[red]\x1b[2Jrun\n", metrics=("loss", "odd\x1b[31m"))
    run.info = {"model": "\x07"}
    run.lost = "\x1b]0;x\x07"
    run.take([], [FIRING._replace(remedy="[bold]\x1b[1m")])
    text = picture([run]) + line(run, NOW, 600)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "[red]?[2Jrun" in text
    assert "[bold]?[1m" in text


def test_words():
    assert duration(3700, units=1) == "1 h"
    assert [duration(seconds) for seconds in (-3, 0.4, 59.6, 3600, 86399, 1e6)] == [
        "0 s", "0 s", "1 min", "1 h", "23 h 59 min", "11 d 13 h",
    ]  # fmt: skip
    assert one_line(" a\u2028b\u202ec\t") == "a b?c"


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
