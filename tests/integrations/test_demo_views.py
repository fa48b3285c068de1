"""How the demo shows itself: live, and in plain lines."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from gradmon_integrations.demo import command
from gradmon_integrations.demo.live import LiveView
from gradmon_integrations.demo.options import chosen_metrics
from gradmon_integrations.demo.plain import PlainView
from gradmon_integrations.display.history import History
from tests.integrations.histories import HEALTHY, ILL, NAMES, demo_options, told


def stub(name, history):
    return SimpleNamespace(name=name, history=history, monitor=SimpleNamespace(failures={}))


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


def test_a_terminal_gets_the_live_view(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    runs = [stub(name, History()) for name in NAMES]
    assert isinstance(command._view(demo_options(tmp_path, plain=False), runs, ["loss"]), LiveView)
    assert isinstance(command._view(demo_options(tmp_path, plain=True), runs, ["loss"]), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(command._view(demo_options(tmp_path, plain=False), runs, ["loss"]), PlainView)
