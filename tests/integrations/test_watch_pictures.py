"""What `gradmon watch` shows of runs."""

import io
import re

import pytest
from rich.console import Console

from gradmon import Reading
from gradmon_integrations.display.words import duration, one_line
from gradmon_integrations.watch.frame import frame, line
from gradmon_integrations.watch.runs import Watched
from tests.integrations.watched import FIRING, NONFINITE, NOW


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
