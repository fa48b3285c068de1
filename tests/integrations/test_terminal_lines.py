"""Plain lines, where there is no terminal or none that can draw."""

import io
import re

import pytest

from gradmon_integrations.sinks.terminal import TerminalSink
from tests.integrations.emulator import Terminal
from tests.integrations.terminals import FIRING, REMEDY, RESOLVED, opened, probe, titles, told


def play_plain(environ, **options):
    terminal = Terminal(80, 24)

    def scene():
        sink = opened(pause=0.0, **options)
        for step in (1, 2):
            probe(sink, step, 2e3)
        sink.alert(FIRING)
        sink.close()

    terminal.play(scene, environ)
    return terminal


def test_a_dumb_terminal_gets_plain_lines():
    terminal = play_plain({"TERM": "dumb"})
    assert b"\x1b" not in terminal.raw
    assert terminal.lines[0].startswith("gradmon mlp-1 step 1  loss 2.19  ")


def test_no_color():
    terminal = play_plain({"NO_COLOR": "1"})
    assert re.findall(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", terminal.raw) == []
    assert titles(terminal.text)
    assert re.findall(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", play_plain({}).raw)


def test_a_terminal_without_block_characters():
    terminal = play_plain({"PYTHONIOENCODING": "ascii"})
    assert terminal.raw.isascii()
    assert "-- gradmon mlp-1 step 2 ---" in terminal.text


def test_lines_on_a_terminal():
    terminal = play_plain({}, style="lines")
    assert [line[:20] for line in terminal.lines[:2]] == ["gradmon mlp-1 step 1", "gradmon mlp-1 step 2"]
    assert titles(terminal.text) == []


def test_what_is_no_terminal_gets_plain_lines():
    sink, file = told(pause=0.0)
    probe(sink, 1, 2e3)
    sink.alert(FIRING)
    probe(sink, 2, 2e3)
    sink.finish(False)
    sink.close()
    assert file.getvalue().splitlines() == [
        "gradmon mlp-1 step 1  loss 2.19  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  no alert",
        f"gradmon mlp-1 step 5  warning ill_conditioned: weight_condition is 2000, above 1000. {REMEDY}",
        "gradmon mlp-1 step 2  loss 2.08  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  alerts ill_conditioned",
        "gradmon mlp-1 step 2  loss 2.08  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  alerts ill_conditioned  ended by an error",
    ]


def test_force_color_does_not_make_a_terminal_of_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink, file = told()
    probe(sink, 1)
    sink.close()
    assert "──" not in file.getvalue()
    assert "\x1b[J" not in file.getvalue()


def test_lines_keep_a_pause_and_alerts_do_not_repeat():
    sink, file = told(pause=1000.0)
    for step in range(1, 50):
        probe(sink, step)
        sink.alert(FIRING)
        sink.alert(RESOLVED)
    assert [re.search(r"step \d+ ( \w+ \w+)", line)[1] for line in file.getvalue().splitlines()] == [
        " loss 2", " warning ill_conditioned", " ill_conditioned resolved",
    ]  # fmt: skip
    sink.close()
    assert file.getvalue().splitlines()[-1].startswith("gradmon mlp-1 step 49  loss")


def test_drawing_keeps_a_pause():
    class Tty(io.StringIO):
        def isatty(self):
            return True

    file = Tty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        sink = TerminalSink(file=file, refresh=1000.0)
        for step in range(1, 100):
            probe(sink, step)
    assert file.getvalue().count("── gradmon") == 1
    sink.close()
    assert "step 99" in file.getvalue()
