"""The panel in a terminal: each scene runs in a forked process on a pseudo-terminal, an emulator shows what is seen."""

import io
import math
import re
import sys
import time

import pytest
import tqdm

from gradmon import Alert, Reading
from gradmon._errors import ArgumentError, GradmonError
from gradmon.sinks.base import RunAware, Sink
from gradmon_integrations.sinks import _terminal_displays as displays
from gradmon_integrations.sinks._terminal_screen import Unfinished
from gradmon_integrations.sinks.terminal import TerminalSink
from tests.integrations.emulator import Gate, Terminal
from tests.integrations.terminals import FIRING, REMEDY, RESOLVED, opened, panel_is_last, probe, titles, told


def test_it_is_a_sink_that_is_called_in_the_training():
    assert isinstance(TerminalSink(), Sink)
    assert isinstance(TerminalSink(), RunAware)
    assert TerminalSink.immediate is True


def test_prints_appear_above_the_panel():
    gate = Gate()

    def scene():
        sink = opened()
        sink.describe({"model": "Sequential", "optimizer": "SGD", "seed": 0})
        for step in range(1, 31):
            probe(sink, step)
            if step % 10 == 0:
                print("epoch", step // 10)
                print("to stderr", step // 10, file=sys.stderr)
        gate.wait()
        sink.finish(True)
        sink.close()
        print("after")

    terminal = Terminal(80, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert seen.splitlines()[:6] == [f"{word} {n}" for n in (1, 2, 3) for word in ("epoch", "to stderr")]
    assert len(titles(seen)) == 1
    assert titles(seen)[0].startswith("── gradmon mlp-1 step 30  Sequential SGD ───")
    assert panel_is_last(seen)
    assert re.search(r"  loss +0.513 [▁-█]+ +step_ratio +0.02 [▁-█]+$", seen, re.MULTILINE)
    assert re.search(r"overhead +3.1 % ", seen)
    assert seen.endswith("  no alert")
    assert terminal.end() == 0
    assert "finished ──" in titles(terminal.text)[0]
    assert terminal.lines[-1] == "after"


@pytest.mark.parametrize("columns", [20, 40, 79, 80, 120, 200])
def test_the_panel_fits_any_width(columns):
    gate = Gate()

    def scene():
        sink = opened()
        sink.alert(FIRING)
        for step in range(1, 60):
            probe(sink, step, 2e3)
        gate.wait()
        sink.close()

    terminal = Terminal(columns, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert len(titles(seen)) == 1
    assert max(map(len, seen.splitlines())) < columns
    panel = seen[seen.index("── gradmon") :].splitlines()
    assert len(panel) <= 10
    assert sum("weight_con" in line for line in panel if "since" not in line) >= 1
    assert sum(line.startswith("  loss") for line in panel) == 1
    assert any(line.startswith("! ill_cond") for line in panel)
    assert terminal.end() == 0
    assert " ".join(terminal.text.split()).endswith("or add normalisation.")
    assert len(titles(terminal.text)) == 1


def test_many_alerts_share_the_rows_and_are_all_told_in_the_end():
    gate = Gate()

    def scene():
        sink = opened()
        probe(sink, 1)
        for number in range(8):
            sink.alert(FIRING._replace(rule=f"rule_{number}", severity="critical" if number == 7 else "info"))
        gate.wait()
        sink.close()

    terminal = Terminal(100, 60)
    terminal.start(scene)
    panel = gate.look(terminal).split("── gradmon")[1].splitlines()
    assert len(panel) == 10
    assert panel[4].startswith("! rule_7: Lower the learning rate;")
    assert [line[:8] for line in panel[4:9]] == ["! rule_7", *(f"! rule_{n}" for n in range(4))]
    assert panel[9] == "  and 3 more alerts"
    assert terminal.end() == 0
    last = " ".join(terminal.text.split("── gradmon")[1].split())
    assert [f"! rule_{n} since step 5, mostly in 0, 2. {REMEDY}" in last for n in range(8)] == [True] * 8


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_the_panel_fits_a_low_terminal(rows):
    gate = Gate()

    def scene():
        sink = opened()
        for step in range(1, 20):
            probe(sink, step)
        gate.wait()
        sink.close()

    terminal = Terminal(60, rows)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert len(titles(seen)) == 1
    assert len(seen.splitlines()) < rows
    assert terminal.end() == 0


def test_an_alert_is_told_once_and_stays_with_its_remedy():
    gate = Gate()

    def scene():
        sink = opened()
        probe(sink, 5, 2e3)
        sink.alert(FIRING)
        for layer in range(12):
            sink.alert(Alert("dead_layer", "warning", "firing", 0.0, 6, f"conv{layer}", "grad_norm is 0.", "Look."))
        probe(sink, 7, 2e3)
        gate.wait()
        sink.alert(RESOLVED)
        sink.close()

    terminal = Terminal(110, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    flat = " ".join(seen.split())
    assert (
        f"gradmon mlp-1 step 5 warning ill_conditioned: weight_condition is 2000, above 1000. {REMEDY} gradmon" in flat
    )
    assert f"! ill_conditioned since step 5, weight_condition now 2000, mostly in 0, 2. {REMEDY}" in flat
    assert flat.count("warning dead_layer") == 1
    assert "! dead_layer since step 6, in conv0, conv1, conv2 and 9 more. Look." in flat
    assert terminal.end() == 0
    assert "step 9  ill_conditioned resolved: weight_condition is 20, not above 1000." in terminal.text
    assert "! ill_conditioned" not in terminal.text


def test_other_ranks_print_alerts_only():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.bind("mlp-1", 3)
    probe(sink, 1)
    sink.alert(FIRING)
    probe(sink, 2)
    sink.close()
    (line,) = file.getvalue().splitlines()
    assert line.startswith("gradmon mlp-1 rank 3 step 5  warning ill_conditioned: ")


def test_names_and_messages_cannot_steer_the_terminal():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.bind("[red]run[/red]\x1b[2J\n", 0)
    sink.describe({"model": "a\rb", "optimizer": "\x07"})
    sink.write([Reading("loss", 1.0, 1), Reading("gradient_rank\x1b[31m", 1.0, 1)])
    sink.alert(FIRING._replace(message="[bold]bad\x1b]0;title\x07", layer="a\nb", remedy=":smile:"))
    sink.close()
    text = file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "gradmon [red]run[/red]?[2J step 1  loss 1" in text
    assert "in a b: [bold]bad?]0;title? :smile:" in text


def test_nan_and_unknown_numbers():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.write([Reading("loss", math.nan, None, reason="non-finite gradient"), Reading("step_ratio", math.inf, None)])
    sink.write([])
    sink.close()
    assert file.getvalue().splitlines() == ["gradmon  loss nan  step_ratio inf  no alert"] * 2


def test_a_run_without_a_word_leaves_no_trace():
    sink, file = told()
    sink.close()
    sink.close()
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    "use", [lambda sink: sink.write([]), lambda sink: sink.alert(FIRING), lambda sink: sink.bind("a", 0)]
)
def test_closed_is_closed(use):
    sink, _ = told()
    sink.close()
    with pytest.raises(GradmonError, match=r"The terminal sink is closed\."):
        use(sink)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "fancy"}, r"`style` must be one of auto, lines\. Got 'fancy'\."),
        ({"refresh": -1}, r"`refresh` must be a number of seconds, 0 or more\. Got -1\."),
        ({"pause": math.nan}, r"`pause` must be a number of seconds, 0 or more\. Got nan\."),
        ({"pause": True}, r"`pause` must be a number of seconds, 0 or more\. Got True\."),
        ({"pause": "1"}, r"`pause` must be a number of seconds, 0 or more\. Got '1'\."),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        TerminalSink(**options)


def test_specs():
    assert isinstance(TerminalSink.from_spec(""), TerminalSink)
    assert isinstance(TerminalSink.from_spec("lines"), TerminalSink)
    with pytest.raises(ArgumentError, match=r"`sinks` must be 'terminal' or 'terminal:lines'\. Got 'terminal:panel'\."):
        TerminalSink.from_spec("panel")


def test_without_rich(monkeypatch):
    monkeypatch.delitem(sys.modules, "gradmon_integrations.sinks._terminal_writer")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(GradmonError, match=r'needs rich .* pip install "gradmon\[terminal\]"'):
        TerminalSink()


def test_a_standard_output_that_is_closed_is_no_obstacle_before_the_first_line(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    sink = TerminalSink()
    sink.bind("mlp-1", 0)
    with pytest.raises(ValueError, match="closed file"):
        probe(sink, 1)


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(GradmonError, match="needs a standard output"):
        TerminalSink()


def test_bars_that_are_no_bars_in_a_terminal(monkeypatch):
    assert not displays.busy()
    with tqdm.tqdm(total=3, file=io.StringIO()):
        assert not displays.busy()
    with tqdm.tqdm(total=3, disable=True):
        assert not displays.busy()
    assert not displays.print_above("nothing")
    monkeypatch.delitem(sys.modules, "tqdm.std")
    assert not displays.busy()


@pytest.mark.parametrize(
    ("texts", "is_open"),
    [
        (["a\n"], False), (["a"], True), (["a", "b\n"], False), (["\r50%"], True), (["50%\r"], True),
        (["\r50%", "\r   \r"], False), (["a\n\x1b[?25h"], False), (["\x1b[31mred\x1b[0m"], True), ([""], False),
        (["a\n", "\x1b[1A"], False), (["\x1b]0;title\x07"], False), (["  "], True),
        (["a\n", "    "], True), (["   \r"], False),
    ],
)  # fmt: skip
def test_unfinished_lines(texts, is_open):
    line = Unfinished()
    for text in texts:
        line.follow(text)
    assert line.open is is_open


def test_it_is_cheap():
    """What is not drawn costs microseconds; a panel that is drawn at most four times a second, about a millisecond."""
    sink, _ = told(pause=1000.0)
    for step in range(50):
        probe(sink, step)
    began = time.process_time()
    for step in range(1000):
        probe(sink, step)
    assert (time.process_time() - began) / 1000 < 500e-6
    sink.close()
