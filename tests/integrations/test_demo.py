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
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmon import METRICS, Alert, Reading
from gradmon._errors import ArgumentError
from gradmon.alerts import default_rules
from gradmon.cli import main
from gradmon.sinks.jsonl import read_jsonl
from gradmon_integrations.demo import command, report
from gradmon_integrations.demo.data import batches, digits
from gradmon_integrations.demo.live import LiveView
from gradmon_integrations.demo.options import chosen_metrics
from gradmon_integrations.demo.plain import PlainView
from gradmon_integrations.demo.runs import RECIPES, looks, loss_of, network, one_thread
from gradmon_integrations.display.history import History
from gradmon_integrations.display.sparkline import sparkline
from gradmon_integrations.display.states import limits, metric_of, number, state_of
from gradmon_integrations.display.verdict import differences, judge

NAMES = [recipe.name for recipe in RECIPES]
HEALTHY = {"weight_condition": 20.0, "step_ratio": 0.02, "noise_ratio": 1.5, "step_share": 1e-3, "update_ratio": 1e-3}
ILL = {"weight_condition": 2e3, "step_ratio": 1.4, "noise_ratio": math.inf, "step_share": 0.9, "update_ratio": 1e-3}


def told(numbers, losses=(2.3, 2.2, 2.1, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)):
    """What a monitor with the default rules makes of a loss that goes this way while the other numbers stay."""
    history, rules = History(), default_rules()
    for step, loss in enumerate(losses, start=1):
        readings = [Reading(name, value, step) for name, value in {"loss": loss, **numbers}.items()]
        history.write(readings)
        for alert in [rule(reading) for reading in readings for rule in rules]:
            if alert is not None:
                history.alert(alert)
    return history


def stub(name, history):
    return SimpleNamespace(name=name, history=history, monitor=SimpleNamespace(failures={}))


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
    with command._opened(_options(tmp_path / "a"), tmp_path / "a", ["loss"]) as (_, url):
        port = url.split(":")[2].split("/")[0]
        assert run_demo("--prometheus-port", port, "--logdir", tmp_path / "b") == 1
    assert f"`--prometheus-port` {port} cannot be had: " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def _options(logdir, **changed):
    options = {"prometheus_port": 0, "seed": 0, "mask": 0.05, "every": 1, "steps": 1, "batch_size": 8, "plain": True}
    return SimpleNamespace(logdir=logdir, **{**options, **changed})


def test_everything_is_closed_when_a_run_cannot_be_prepared(tmp_path):
    with (
        pytest.raises(ArgumentError, match="`metrics` must be"),
        command._opened(_options(tmp_path), tmp_path, ["no_such_metric"]),
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


def test_a_healthy_run_is_called_healthy():
    verdict = judge("anything", told(HEALTHY))
    assert verdict.level == "good"
    assert verdict.title == "anything is in good order: its gradient can be trusted."
    assert verdict.reasons[0] == "The loss falls: 2.1 at first, 0.5 in the end."
    assert "weight_condition 20 (alert if > 1000)" in verdict.reasons[1]
    assert "the batch size is the lever" in verdict.reasons[2]
    assert verdict.change == ""


def test_a_bad_run_is_called_bad_whatever_its_name():
    history = told(ILL, losses=[2.3] * 12)
    remedies = {alert.rule: alert.remedy for alert in history.active}
    verdict = judge("healthy", history)
    assert verdict.level == "bad"
    assert verdict.title == "healthy is in trouble: its gradient cannot be trusted."
    assert verdict.reasons[0] == "The loss does not fall: 2.3 at first, 2.3 in the end."
    text = " ".join(verdict.reasons)
    assert "ill_conditioned (since step 2): weight_condition is 2000 (alert if > 1000). The relative change" in text
    assert "step_too_long (since step 2): step_ratio is 1.4 (alert if > 1)." in text
    assert "batch_too_noisy (since step 3): noise_ratio is inf (alert if > 10)." in text
    assert "the learning rate is the lever" in text
    assert remedies["ill_conditioned"] in verdict.change
    assert verdict.change.lower().count("lower the learning rate") == 1  # two rules ask for it
    assert "Raise the batch size" in verdict.change


def test_an_alert_of_severity_info_is_a_note():
    verdict = judge("run", told({**HEALTHY, "noise_ratio": 40.0}))
    assert verdict.level == "note"
    assert verdict.change.startswith("Raise the batch size")


def test_a_loss_that_does_not_fall_is_a_note():
    verdict = judge("run", told(HEALTHY, losses=[2.3, 2.29] * 6))
    assert verdict.level == "note"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(2.0, 1.0, "falls"), (2.0, 1.5, "falls slowly"), (2.0, 1.9, "hardly falls"), (2.0, 2.0, "does not fall"),
     (-1.0, -0.9, "does not fall"), (-1.0, -0.5, "does not fall"), (-1.0, -1.05, "hardly falls"),
     (-1.0, -1.3, "falls slowly"), (-1.0, -2.0, "falls"), (0.5, -2.0, "falls"), (0.0, 0.0, "does not fall"),
     (0.0, -1.0, "falls"), (-1.0, 0.5, "does not fall")],
)  # fmt: skip
def test_where_a_loss_goes_whatever_its_sign(before, after, words):
    verdict = judge("run", told(HEALTHY, losses=[before] * 6 + [after] * 6))
    assert verdict.reasons[0].startswith(f"The loss {words}: ")
    assert verdict.level == ("good" if words.startswith("falls") else "note")


def test_without_numbers_that_have_a_limit_there_is_no_praise():
    assert judge("run", told({"gradient_snr": 0.1})).level == "note"


def test_without_numbers_there_is_no_verdict():
    history = History()
    assert judge("run", history) is None
    history.write([Reading("loss", math.nan, 1, reason="RuntimeError: no")])
    assert judge("run", history) is None


def test_a_loss_that_is_lost():
    history = told(HEALTHY)
    history.write([Reading("loss", math.nan, 13, reason="non-finite gradient")])
    history.alert(Alert("nonfinite", "critical", "firing", math.nan, 13, None, "It is not finite.", "Clip."))
    verdict = judge("run", history)
    assert verdict.level == "bad"
    assert verdict.reasons[:2] == (
        "The loss or its gradient is no longer finite.",
        "nonfinite (since step 13): It is not finite.",
    )
    assert verdict.change == "Clip."


def test_alerts_that_came_and_went_are_told():
    history = told(HEALTHY)
    history.alert(Alert("exploding", "critical", "firing", 9.0, 5, None, "", ""))
    history.alert(Alert("exploding", "critical", "resolved", 1.0, 6, None, "", ""))
    verdict = judge("run", history)
    assert verdict.level == "good"
    assert "Came and went: exploding." in verdict.reasons


def test_differences_are_ordered_by_their_ratio():
    found = differences(told(HEALTHY), told({**ILL, "noise_ratio": 3.0}))
    assert found == [
        "weight_condition 20 against 2000 (low is good)",
        "step_ratio 0.02 against 1.4 (low is good)",
        "noise_ratio 1.5 against 3 (low is good)",
    ]


def test_states_follow_the_rules():
    assert [str(limit) for limit in limits("weight_condition")] == ["> 1000"]
    assert metric_of("step_too_long") == "step_ratio"
    assert metric_of("nonfinite") is None
    assert metric_of("unknown") is None
    firing = Alert("ill_conditioned", "warning", "firing", 2e3, 1, None, "", "")
    assert state_of("weight_condition", 20.0, []) == "fine"
    assert state_of("weight_condition", 2e3, []) == "beyond"
    assert state_of("weight_condition", 2e3, [firing]) == "firing"
    assert state_of("weight_condition", 2e3, [firing._replace(severity="info")]) == "noted"
    assert state_of("step_ratio", 0.1, [firing]) == "fine"
    assert state_of("weight_condition", math.nan, []) == "missing"
    assert state_of("weight_condition", None, []) == "missing"
    assert state_of("loss", 1.0, []) == "free"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.01234, "0.0123"), (-0.5, "-0.5"), (999.4, "999"), (999.7, "1000"),
     (1234.5, "1234"), (123456, "1.2e5"), (99999.7, "1e5"), (1e-7, "1e-7"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([1, 2, 3, 8], "__-#"), ([1, 10, 100, 1000], "_-=#"), ([5, 5], "--"), ([1, math.nan, 4], "_ #"),
     ([1, math.inf, -math.inf, 4], "_#_#"), ([math.inf], "#"), ([], ""), ([9, 9, 9, 1, 2, 3, 4], "_-=#"),
     ([0.0, 0.0], "--"), ([-1.0, 1.0], "_#")],
)  # fmt: skip
def test_sparkline(values, drawn):
    assert sparkline(values, 4, levels="_-=#") == drawn


def screen(width=100, height=60, encoding="utf-8"):
    raw = io.BytesIO()
    return Console(
        file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), force_terminal=True, width=width,
        height=height, color_system=None, legacy_windows=False,
    ), lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode(encoding))  # fmt: skip


def show(console, metrics):
    runs = [stub("healthy", told(HEALTHY)), stub("ill-conditioned", told(ILL, losses=[2.3] * 12))]
    view = LiveView(runs, metrics, 20, console)
    with view:
        view.step(12)
    return view


def test_the_live_table_shows_every_metric_and_the_remedies():
    console, text = screen()
    show(console, chosen_metrics(None))
    final = text()[text().rindex("metric  ") :]
    for name in chosen_metrics(None):
        assert f" {name} " in final
    assert re.search(r"weight_condition +low +> 1000 +20  \S+ +! +2000  \S+", final)
    assert re.search("healthy +no alert", final)
    flat = " ".join(final.split())
    (remedy,) = [one.remedy for one in told(ILL).active if one.rule == "step_too_long"]
    assert f"! step_too_long since step 2, step_ratio now 1.4. {remedy}" in flat
    assert "12/20" in final


def test_the_live_table_fits_a_low_terminal_and_is_whole_in_the_end():
    console, text = screen(height=24)
    show(console, chosen_metrics(None))
    first, final = text()[: text().rindex("metric  ")], text()[text().rindex("metric  ") :]
    assert "more, for which the terminal is too low" in first
    assert "weight_condition" in first
    assert "gradient_snr" not in first
    assert "gradient_snr" in final


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_live_table_is_not_wider_than_the_terminal(width):
    console, text = screen(width=width)
    show(console, chosen_metrics(None))
    assert max(map(len, text().splitlines())) <= width
    assert "…" not in text()


def test_the_live_table_without_block_characters():
    console, text = screen(encoding="ascii")
    show(console, chosen_metrics(None))
    assert text().isascii()


def test_paragraphs_hang_and_commands_are_not_broken():
    console, text = screen(width=40)
    view = show(console, ["loss"])
    before = len(text())
    view.say("  - " + "word " * 12)
    view.say("  " + "x" * 60, "command")
    view.say("")
    said = [line.rstrip() for line in text()[before:].splitlines()]
    assert said[:2] == ["  - word word word word word word word", "    word word word word word"]
    assert said[2:] == ["  " + "x" * 60, ""]


def test_plain_lines_say_what_changed(capsys):
    history = told(ILL)
    view = PlainView([stub("a", history)], ["loss", "step_ratio"], 12)
    with view:
        view.step(11)
        view.step(12)
    lines = capsys.readouterr().out.splitlines()
    (alert,) = [one for one in history.active if one.rule == "ill_conditioned"]
    assert lines[0].startswith("step 11  a  warning ill_conditioned firing: weight_condition is 2000, above 1000.")
    assert lines[0].endswith(alert.remedy)
    assert lines[-1].startswith("step 12  a  loss 0.3  step_ratio 1.4  alerts ill_conditioned,step_too_long")


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


def test_a_terminal_gets_the_live_view(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    runs = [stub(name, History()) for name in NAMES]
    assert isinstance(command._view(_options(tmp_path, plain=False), runs, ["loss"]), LiveView)
    assert isinstance(command._view(_options(tmp_path, plain=True), runs, ["loss"]), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(command._view(_options(tmp_path, plain=False), runs, ["loss"]), PlainView)
