import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gradmon import _plugins
from gradmon._errors import ArgumentError, GradmonError, PluginError
from gradmon._reading import Alert, Reading
from gradmon.sinks import JsonlSink, LogSink, MemorySink, RunAware, Sink, make_sink, read_jsonl

READINGS = [
    Reading("weight_condition", 3.25, 10, scale=1e-3, resolution=2e-5),
    Reading("weight_condition", 0.1 + 0.2, 10, layer="blocks.0.fc"),
    Reading("loss", math.nan, 10, reason="non-finite gradient"),
    Reading("noise_scale", math.inf, 10, reason="no signal above the noise"),
    Reading("signed", -math.inf),
    Reading("tiny", 5e-324, 11, scale=math.nan, resolution=math.inf),
]
FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")
RESOLVED = Alert("nonfinite", "critical", "resolved", math.nan, None, None, "Gone\u2028again.", "")


def same(left, right):
    """Equal, NaN included."""
    return repr(left) == repr(right)


# Every sink


@pytest.mark.parametrize("spec", ["memory", "log", "log:debug", "jsonl:{tmp}/x.jsonl"])
def test_sinks_follow_the_protocol(spec, tmp_path):
    sink = make_sink(spec.format(tmp=tmp_path))
    assert isinstance(sink, Sink)
    if isinstance(sink, RunAware):
        sink.bind("mlp-1", 0)
    sink.write(READINGS)
    sink.write([])
    sink.alert(FIRING)
    sink.close()
    sink.close()


@pytest.mark.parametrize(("kind", "aware"), [(MemorySink, False), (LogSink, True), (JsonlSink, True)])
def test_run_aware(kind, aware):
    assert issubclass(kind, RunAware) is aware


# Memory


def test_memory_keeps_everything_in_order():
    sink = MemorySink()
    sink.write(READINGS[:2])
    sink.write(READINGS[2:])
    sink.alert(FIRING)
    sink.alert(RESOLVED)
    sink.close()
    assert sink.readings == READINGS
    assert sink.alerts == [FIRING, RESOLVED]


def test_memory_series_tells_model_and_layers_apart():
    sink = MemorySink()
    for step in (1, 2):
        sink.write([Reading("g", step / 2, step), Reading("g", 9.0, step, layer="fc"), Reading("other", 1.0, step)])
    assert sink.series("g") == [(1, 0.5), (2, 1.0)]
    assert sink.series("g", "fc") == [(1, 9.0), (2, 9.0)]
    assert sink.series("absent") == []


def test_memory_takes_no_argument():
    with pytest.raises(ArgumentError, match=r"`sinks` must say 'memory' and nothing after it\. Got 'memory:x'\."):
        make_sink("memory:x")


# JSON lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def test_jsonl_round_trip(path):
    sink = JsonlSink(path)
    sink.bind("mlp-1", 0)
    sink.write(READINGS)
    sink.alert(FIRING)
    sink.alert(RESOLVED)
    sink.close()
    readings, alerts = read_jsonl(path)
    assert same(readings, READINGS)
    assert same(alerts, [FIRING, RESOLVED])


def test_jsonl_is_strict_json_with_documented_fields(path):
    before = time.time()
    sink = JsonlSink(path)
    sink.bind("mlp-1", 3)
    sink.write([READINGS[0], READINGS[2], READINGS[3], READINGS[4]])
    sink.alert(FIRING)
    sink.close()

    def refuse(constant):
        pytest.fail(f"not strict JSON: {constant}")

    run, *lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert before <= run.pop("time") <= time.time()
    assert run == {"kind": "run", "run": "mlp-1", "rank": 3, "version": 1}
    assert lines == [
        {"kind": "reading", "name": "weight_condition", "value": 3.25, "step": 10, "scale": 1e-3, "resolution": 2e-5},
        {"kind": "reading", "name": "loss", "value": None, "step": 10, "reason": "non-finite gradient"},
        {"kind": "reading", "name": "noise_scale", "value": "inf", "step": 10, "reason": "no signal above the noise"},
        {"kind": "reading", "name": "signed", "value": "-inf"},
        {"kind": "alert", **{name: value for name, value in FIRING._asdict().items() if value != ()}},
    ]


@pytest.mark.parametrize("bound", [True, False])
def test_jsonl_has_one_run_line_and_it_comes_first(path, bound):
    sink = JsonlSink(path)
    if bound:
        sink.bind("mlp-1", 0)
    sink.write(READINGS)
    sink.write(READINGS)
    sink.close()
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["run"] + ["reading"] * 12


def test_jsonl_appends_and_creates_directories(tmp_path):
    path = tmp_path / "deep" / "down" / "run.jsonl"
    for step in (1, 2):
        sink = JsonlSink(str(path))
        sink.write([Reading("g", 1.0, step)])
        sink.close()
    assert [reading.step for reading in read_jsonl(path).readings] == [1, 2]


def test_jsonl_is_flushed_at_every_write(path):
    sink = JsonlSink(path)
    sink.write([READINGS[0]])
    assert read_jsonl(path).readings == [READINGS[0]]
    sink.alert(FIRING)
    assert read_jsonl(path).alerts == [FIRING]
    sink.close()


def test_jsonl_survives_kill_9(path):
    program = f"""
        import time
        from gradmon._reading import Reading
        from gradmon.sinks.jsonl import JsonlSink
        sink = JsonlSink({str(path)!r})
        for step in range(1, 101):
            sink.write([Reading("g", 0.5, step)])
        print("written", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [reading.step for reading in read_jsonl(path).readings] == list(range(1, 101))


def write_torn(path):
    sink = JsonlSink(path)
    sink.write([Reading("g", 1.0, 1), Reading("g", 2.0, 2)])
    sink.close()
    path.write_bytes(path.read_bytes()[:-10])


def test_jsonl_torn_last_line_is_skipped(path):
    write_torn(path)
    assert read_jsonl(path).readings == [Reading("g", 1.0, 1)]


def test_jsonl_run_after_a_torn_line_stays_readable(path):
    write_torn(path)
    sink = JsonlSink(path)
    sink.write([Reading("g", 3.0, 3)])
    sink.close()
    assert read_jsonl(path).readings == [Reading("g", 1.0, 1), Reading("g", 3.0, 3)]


def test_jsonl_complete_last_line_without_newline_counts(path):
    path.write_text('{"kind":"reading","name":"g","value":1.0}')
    assert read_jsonl(path).readings == [Reading("g", 1.0)]


def test_jsonl_unknown_kinds_and_fields_are_skipped(path):
    path.write_text('{"kind":"note"}\n{"kind":"reading","name":"g","value":1.0,"colour":"red"}\n')
    assert read_jsonl(path).readings == [Reading("g", 1.0)]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"kind":"reading","name":"g"}',
        '{"kind":"reading","name":"g","value":"many"}',
        '{"kind":"alert","rule":"x"}',
        '{"kind":"run"}',
        '{"kind":"run","version":"new"}',
    ],
)
def test_jsonl_foreign_line(path, line):
    path.write_text(f'{{"kind":"note"}}\n{line}\n{{"kind":"note"}}\n')
    with pytest.raises(ArgumentError, match=r"`path` must hold lines that a `JsonlSink` wrote\. Got line 2 of .*jsonl"):
        read_jsonl(path)


def test_jsonl_newer_version(path):
    path.write_text('{"kind":"run","version":2}\n')
    with pytest.raises(ArgumentError, match=r"`path` must be written in version 1 .* Got version 2 in"):
        read_jsonl(path)


def test_jsonl_unreadable(tmp_path):
    with pytest.raises(ArgumentError, match=r"`path` must be a file that can be read \(No such file or directory\)"):
        read_jsonl(tmp_path / "absent")


@pytest.mark.parametrize("path", ["", None, 3])
@pytest.mark.parametrize("use", [JsonlSink, read_jsonl])
def test_jsonl_path_is_no_path(use, path):
    with pytest.raises(ArgumentError, match=r"`path` must be the path of a file\. Got (''|None|3)\."):
        use(path)


def test_jsonl_unwritable(tmp_path):
    with pytest.raises(ArgumentError, match=r"`path` must be a file that can be written \(Is a directory\)\. Got "):
        JsonlSink(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="`path` must be a file that can be written"):
        JsonlSink(tmp_path / "file" / "run.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_jsonl_on_a_full_disk():
    sink = JsonlSink("/dev/full")
    with pytest.raises(
        ArgumentError, match=r"`path` must be a file that can be written \(No space left on device\)\. Got "
    ):
        sink.bind("x", 0)
    with pytest.raises(OSError, match="No space left"):  # what is buffered
        sink.close()


@pytest.mark.parametrize(
    "use",
    [lambda s: s.write(READINGS), lambda s: s.alert(FIRING), lambda s: s.bind("x", 0)],
    ids=["write", "alert", "bind"],
)
def test_jsonl_closed(path, use):
    sink = JsonlSink(path)
    sink.close()
    with pytest.raises(GradmonError, match=r"The sink of .*run\.jsonl is closed\."):
        use(sink)


# Log


def lines(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_log_one_line_a_write(caplog):
    sink = LogSink()
    with caplog.at_level(logging.INFO, logger="gradmon"):
        sink.write(READINGS[:4])
        sink.write([Reading("tau", 1.0)])
        sink.write([])
    assert lines(caplog) == [
        (
            "INFO",
            "step 10: weight_condition 3.25, loss nan (non-finite gradient), "
            "noise_scale inf (no signal above the noise), 1 of layers",
        ),
        ("INFO", "tau 1"),
    ]


@pytest.mark.parametrize(("severity", "level"), [("info", "INFO"), ("warning", "WARNING"), ("critical", "CRITICAL")])
def test_log_alert_at_the_level_of_its_severity(caplog, severity, level):
    with caplog.at_level(logging.DEBUG, logger="gradmon"):
        LogSink().alert(FIRING._replace(severity=severity))
    message = "step 10: ill_conditioned firing in fc: 12.5 is above 10. Remedy: Lower the learning rate."
    assert lines(caplog) == [(level, message)]


def test_log_resolved_alert_is_information(caplog):
    with caplog.at_level(logging.DEBUG, logger="gradmon"):
        LogSink().alert(FIRING._replace(state="resolved", severity="critical", layer=None))
    assert lines(caplog) == [("INFO", "step 10: ill_conditioned resolved: 12.5 is above 10.")]


@pytest.mark.parametrize(("rank", "prefix"), [(0, "mlp-1: "), (2, "mlp-1 rank 2: ")])
def test_log_names_the_run(caplog, rank, prefix):
    sink = LogSink()
    sink.bind("mlp-1", rank)
    with caplog.at_level(logging.INFO, logger="gradmon"):
        sink.write([Reading("g", 1.0, 1)])
        sink.alert(FIRING)
    assert [message.startswith(prefix + "step ") for _, message in lines(caplog)] == [True, True]


@pytest.mark.parametrize("level", [logging.DEBUG, "debug", "DEBUG"])
def test_log_level_and_logger(caplog, level):
    sink = LogSink(logging.getLogger("mine"), level)
    with caplog.at_level(logging.DEBUG, logger="mine"):
        sink.write([Reading("g", 1.0, 1)])
    assert [(record.name, record.levelno) for record in caplog.records] == [("mine", logging.DEBUG)]


@pytest.mark.parametrize("level", ["loud", None, True, 1.5])
def test_log_unknown_level(level):
    with pytest.raises(
        ArgumentError, match=r"`level` must be a number or one of CRITICAL, .*\. Got ('loud'|None|True|1.5)"
    ):
        LogSink(level=level)


def test_log_no_logger():
    with pytest.raises(ArgumentError, match=r"`logger` must be a logging\.Logger or None\. Got 'gradmon'\."):
        LogSink("gradmon")


# Strings


def test_make_sink_returns_sinks_as_they_are():
    sink = MemorySink()
    assert make_sink(sink) is sink


def test_make_sink_splits_at_the_first_colon(tmp_path):
    sink = make_sink(f"jsonl:{tmp_path}/a:b.jsonl")
    assert sink.path == tmp_path / "a:b.jsonl"
    sink.close()


@pytest.mark.parametrize("spec", [None, 3, MemorySink, object()])
def test_make_sink_of_something_else(spec):
    with pytest.raises(ArgumentError, match=r"`sinks` must be sinks \(with write, alert and close\) or strings\. Got "):
        make_sink(spec)


@pytest.mark.parametrize("spec", ["csv:run.csv", "", ":x"])
def test_make_sink_of_an_unknown_name(spec):
    must = r"`sinks` must begin with the name of an installed sink \(.*jsonl.*, memory.*\)\. "
    with pytest.raises(ArgumentError, match=must + f"Got '{spec}'"):
        make_sink(spec)


def test_make_sink_with_nothing_installed(monkeypatch):
    monkeypatch.setattr(_plugins, "entry_points", lambda group: [])
    with pytest.raises(ArgumentError, match=r"`sinks` must .* \(none is installed\)\. Got 'log'\."):
        make_sink("log")


def test_make_sink_passes_on_what_the_class_says():
    with pytest.raises(ArgumentError, match=r"`path` must be the path of a file\. Got ''\."):
        make_sink("jsonl")
    with pytest.raises(ArgumentError, match=r"`level` must be .*\. Got 'loud'\."):
        make_sink("log:loud")


class NoSink:
    @classmethod
    def from_spec(cls, argument):
        return cls()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json:loads", r"json:loads, installed in `gradmon\.sinks` as 'x', must be a class with a class method `from_"),
        (f"{__name__}:NoSink", r"NoSink\.from_spec must return a sink\. Got <"),
        ("no_such_module:Sink", r"cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_make_sink_of_a_faulty_plugin(monkeypatch, value, message):
    monkeypatch.setattr(_plugins, "entry_points", lambda group: [EntryPoint("x", value, group)])
    with pytest.raises(PluginError, match=message):
        make_sink("x")
