import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmon import METRICS
from gradmon._errors import ArgumentError
from gradmon.cli import main
from gradmon.sinks.jsonl import read_jsonl
from gradmon_integrations.demo import command, report
from gradmon_integrations.demo.data import batches, digits
from gradmon_integrations.demo.runs import RECIPES, looks, loss_of, network, one_thread
from tests.integrations.histories import NAMES, demo_options


def run_demo(*options):
    return main(["demo", *map(str, options)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One short demo of everything, whose output and files several tests look at."""
    logdir = tmp_path_factory.mktemp("demo") / "logs"
    printed = io.StringIO()
    seen = {}
    original = command.train

    def train(runs, batches, steps, done):
        original(runs, batches, steps, done)
        url = re.search(r"http://\S+/metrics", printed.getvalue())
        assert url is not None
        with urllib.request.urlopen(url[0], timeout=10) as response:
            seen["metrics"] = response.read().decode()

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train", train)
        patch.setattr(sys, "stdout", printed)
        status = run_demo("--steps", 6, "--every", 2, "--logdir", logdir, "--prometheus-port", 0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    return SimpleNamespace(status=status, logdir=logdir, text=printed.getvalue(), metrics=seen["metrics"])


def test_it_ends_well(demo):
    assert demo.status == 0


@pytest.mark.parametrize("name", NAMES)
def test_json_lines_hold_every_metric(demo, name):
    recording = read_jsonl(demo.logdir / f"{name}.jsonl")
    wanted = {metric.name for metric in METRICS.values() if not metric.on_demand}
    assert wanted <= {reading.name for reading in recording.readings}
    assert {reading.step for reading in recording.readings if reading.name == "loss"} == {1, 2, 3, 4, 6}


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_has_a_number(demo, name):
    readings = read_jsonl(demo.logdir / f"{name}.jsonl").readings
    missing = [(reading.name, reading.reason) for reading in readings if math.isnan(reading.value)]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_tensorboard_shows_the_run(demo, name):
    events = EventAccumulator(str(demo.logdir / name))
    events.Reload()
    assert "health/loss" in events.Tags()["scalars"]
    assert "step-consistency/weight_condition" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("health/loss")] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("name", NAMES)
def test_prometheus_shows_the_run(demo, name):
    assert re.search(rf'gradmon_weight_condition\{{[^}}]*run="{name}"[^}}]*\}} [0-9]', demo.metrics)


@pytest.mark.parametrize("name", NAMES)
def test_plain_lines_one_for_each_look(demo, name):
    lines = [line for line in demo.text.splitlines() if re.match(rf"step +\d+ +{name} +loss ", line)]
    assert [int(line.split()[1]) for line in lines] == [1, 2, 3, 4, 6]
    assert all("weight_condition " in line and "alerts " in line for line in lines)


def test_plain_output_is_plain(demo):
    assert demo.text.isascii()
    assert "\x1b" not in demo.text


def test_that_it_takes_time_is_no_news(demo):
    assert "monitor_overhead" in {reading.name for reading in read_jsonl(demo.logdir / "healthy.jsonl").readings}
    assert "overhead_high" not in demo.text


def test_alerts_and_verdict_are_told(demo):
    assert re.search(
        r"ill-conditioned +warning ill_conditioned firing: .* lower the learning rate from 0.05", demo.text
    )
    assert "ill-conditioned is in trouble" in demo.text
    assert re.search("What to change: .* lower the learning rate from 0.05 to about", demo.text)
    assert "healthy is in trouble" not in demo.text
    assert report.tensorboard_command(demo.logdir) in demo.text
    assert f"in a terminal    gradmon watch {demo.logdir}" in demo.text


def test_both_runs_start_at_a_guess_and_see_the_same_batches(demo):
    readings = [read_jsonl(demo.logdir / f"{name}.jsonl").readings for name in NAMES]
    first = [next(reading for reading in run if reading.name == "loss") for run in readings]
    assert [reading.step for reading in first] == [1, 1]
    assert [reading.value for reading in first] == pytest.approx([math.log(10)] * 2, rel=0.1)


def test_an_earlier_demo_is_not_mixed_with_a_new_one(demo, capsys):
    assert run_demo("--logdir", demo.logdir) == 1
    assert re.search(r"`--logdir` must be a directory that holds no demo yet\. Got .*logs\.", capsys.readouterr().err)


def test_a_log_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_demo("--logdir", tmp_path / "file" / "logs") == 1
    assert "`--logdir` must be a directory that can be written" in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path, capsys):
    with command._opened(demo_options(tmp_path / "a"), tmp_path / "a", ["loss"]) as (_, url):
        port = url.split(":")[2].split("/")[0]
        assert run_demo("--prometheus-port", port, "--logdir", tmp_path / "b") == 1
    assert f"`--prometheus-port` {port} cannot be had: " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_everything_is_closed_when_a_run_cannot_be_prepared(tmp_path):
    with (
        pytest.raises(ArgumentError, match="`metrics` must be"),
        command._opened(demo_options(tmp_path), tmp_path, ["no_such_metric"]),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"healthy", "healthy.jsonl", "ill-conditioned"}


@pytest.mark.parametrize(
    ("option", "value", "must"),
    [
        ("--steps", "0", "must be a whole number from 1. Got '0'."),
        ("--steps", "many", "must be a whole number from 1. Got 'many'."),
        ("--every", "-1", "must be a whole number from 1. Got '-1'."),
        ("--batch-size", "1", "must be a whole number from 2 to 1797. Got '1'."),
        ("--batch-size", "1798", "must be a whole number from 2 to 1797. Got '1798'."),
        ("--mask", "0", "must be in (0, 1]. Got '0'."),
        ("--mask", "nan", "must be in (0, 1]. Got 'nan'."),
        ("--mask", "half", "must be in (0, 1]. Got 'half'."),
        ("--seed", "-1", "must be a whole number from 0 to 2147483647. Got '-1'."),
        ("--prometheus-port", "65536", "must be a whole number from 0 to 65535, or none. Got '65536'."),
        ("--prometheus-port", "http", "must be a whole number from 0 to 65535, or none. Got 'http'."),
        ("--metrics", "loss,fun", "must be names that `gradmon metrics` lists, with commas. Got 'fun'."),
        ("--metrics", ",", "must be names that `gradmon metrics` lists, with commas. Got ','."),
    ],
)
def test_a_wrong_option_is_named(option, value, must, capsys):
    with pytest.raises(SystemExit) as ended:
        run_demo(f"{option}={value}")
    assert ended.value.code == 2
    assert f"argument {option}: {must}" in capsys.readouterr().err


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        run_demo("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Ctrl-C" in text
    assert "runs/demo-DATE-TIME" in text


@pytest.mark.parametrize(("module", "name"), [("sklearn", "scikit-learn"), ("rich", "rich")])
def test_a_missing_package_is_named(module, name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert run_demo("--logdir", tmp_path / "logs") == 1
    error = capsys.readouterr().err
    assert f"The demo needs {name} " in error
    assert 'pip install "gradmon[demo]"' in error
    assert not (tmp_path / "logs").exists()


def test_monitors_that_are_switched_off(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    assert run_demo("--logdir", tmp_path) == 1
    assert "GRADMON_DISABLED=1 switches every monitor off" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["none", "-1"])
def test_few_metrics_and_no_server(port, tmp_path, capsys):
    options = ["--steps", 3, "--logdir", tmp_path, f"--prometheus-port={port}"]
    assert run_demo(*options, "--metrics", "step_ratio, noise_scale") == 0
    text = capsys.readouterr().out
    assert "http" not in text
    assert re.search(r"step 1  healthy +loss \S+  step_ratio \S+  noise_scale \S+  alerts none", text)
    shown = {reading.name for reading in read_jsonl(tmp_path / "healthy.jsonl").readings}
    assert {"loss", "step_ratio", "noise_scale"} <= shown
    assert "weight_condition" not in shown


def test_interrupted_it_flushes_closes_and_judges(monkeypatch, tmp_path, capsys):
    def interrupting(every, steps):
        def schedule(step):
            if step == 5:  # asked at the end of step 4, when its readings are written
                raise KeyboardInterrupt
            return True

        return schedule

    closed = []
    leave = command.Run.__init__.__globals__["Monitor"].__exit__
    monkeypatch.setattr(
        "gradmon.monitor.Monitor.__exit__", lambda self, *why: (closed.append(self.run), leave(self, *why))[1]
    )
    monkeypatch.setattr(command, "looks", interrupting)
    assert run_demo("--metrics", "grad_norm,step_ratio", "--logdir", tmp_path) == 130
    assert set(closed) == set(NAMES)
    text = capsys.readouterr().out
    assert "Stopped after 3 of 300 steps. The verdict so far:" in text
    assert "ill-conditioned is in trouble" in text
    lines = (tmp_path / "healthy.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines][:3] == ["run", "info", "reading"]
    assert json.loads(lines[-1])["kind"] == "end"
    events = EventAccumulator(str(tmp_path / "healthy"))
    events.Reload()
    assert [event.step for event in events.Scalars("health/loss")] == [1, 2, 3, 4]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a single process")
def test_a_real_interrupt(tmp_path):
    program = "import sys; from gradmon.cli import main; sys.exit(main())"
    options = ["demo", "--metrics", "grad_norm", "--steps", "100000", "--prometheus-port", "none", "--logdir", "logs"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while "step " not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert "The verdict so far:" in printed
    assert read_jsonl(tmp_path / "logs" / "healthy.jsonl").readings


def test_batches_are_whole_shuffled_and_repeatable():
    images, labels = digits()
    assert images.shape == (1797, 64)
    assert float(images.std()) == pytest.approx(1, rel=1e-3)
    first, again = batches((images, labels), 500, seed=1), batches((images, labels), 500, seed=1)
    drawn = [next(first) for _ in range(4)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(drawn, (next(again) for _ in range(4)), strict=True))
    assert {len(batch[1]) for batch in drawn} == {500}
    assert not torch.equal(drawn[0][0], drawn[3][0])


def test_networks_are_repeatable_and_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    for recipe in RECIPES:
        one, two = network(recipe, 3), network(recipe, 3)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert loss_of(one, (torch.zeros(2, 64), torch.tensor([0, 1]))).ndim == 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert torch.get_num_threads() == before


def test_the_schedule_begins_dense_and_ends_with_the_last_step():
    assert [step for step in range(1, 26) if looks(10, 25)(step)] == [1, 2, 3, 10, 20, 25]


@pytest.mark.parametrize(
    ("on_path", "beside", "command_line"),
    [
        (True, True, "tensorboard --logdir 'my runs'"),
        (False, True, "{bin}/tensorboard --logdir 'my runs'"),
        (False, False, "{bin}/python -m tensorboard.main --logdir 'my runs'"),
    ],
)
def test_how_to_open_the_dashboard(on_path, beside, command_line, monkeypatch, tmp_path):
    if beside:
        (tmp_path / "tensorboard").write_text("")
    monkeypatch.setattr(report.shutil, "which", lambda name: name if on_path else None)
    monkeypatch.setattr(report.sys, "executable", str(tmp_path / "python"))
    assert report.tensorboard_command(Path("my runs")) == command_line.format(bin=tmp_path)
