"""Whatever a file holds, the report is a whole page, or says what is wrong; and where it puts the page."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Reading
from gradmon_integrations.report.lines import BOTTOM, LEFT, RIGHT, TOP
from tests.integrations.report_files import course, firing, page_of, report, write
from tests.integrations.report_pages import check_accessible, check_self_contained, read_page

# Files as they come


def test_only_missing_numbers(tmp_path: Path) -> None:
    readings = [
        r for name in ("loss", "step_ratio") for r in course(name, [math.nan] * 3, reason="non-finite gradient")
    ]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings))
    assert "The loss or its gradient is no longer finite." in page.by_id("verdict").text
    assert "3 of 3 not available: non-finite gradient" in page.figure("step_ratio").text
    assert "no finite number" in page.figure("step_ratio").text


def test_a_run_without_readings(tmp_path: Path) -> None:
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", []))
    assert "mine has no numbers, so there is no verdict." in page.by_id("verdict").text
    assert "No alert fired." in page.by_id("alerts").text


def test_a_single_reading(tmp_path: Path) -> None:
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("loss", [0.5])))
    (dot,) = page.figure("loss").all("circle", "dot")
    assert LEFT < float(dot.attributes["cx"]) < RIGHT
    assert TOP < float(dot.attributes["cy"]) < BOTTOM
    assert page.table("loss, all steps") == [["step", "mine"], ["1", "0.5"]]


def test_readings_without_steps_are_numbered(tmp_path: Path) -> None:
    readings = [Reading("loss", value) for value in (3.0, 2.0, 1.0)]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings))
    assert page.table("loss, all steps")[1:] == [["1", "3"], ["2", "2"], ["3", "1"]]


@pytest.mark.parametrize(
    ("ended", "words"),
    [(True, "finished"), (False, "ended by an exception"), (None, "no end recorded (killed, or still running)")],
)
def test_how_a_run_ended(tmp_path: Path, ended: bool | None, words: str) -> None:
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("loss", [2.0, 1.0]), ended=ended))
    assert f"end {words}" in page.by_id("verdict").text


def test_a_killed_run_with_a_torn_last_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [3.0, 2.0, 1.0]), ended=None)
    path.write_bytes(path.read_bytes()[:-12])
    page = page_of(tmp_path, path)
    assert page.table("loss, all steps")[1:] == [["1", "3"], ["2", "2"]]
    assert "no end recorded (killed, or still running)" in page.by_id("verdict").text


def test_of_repeated_steps_the_newer_reading_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [4.0, 3.0, 9.0]), ended=None)
    write(path, [Reading("loss", 2.0, 3), Reading("loss", 1.0, 4)])
    page = page_of(tmp_path, path)
    assert [row[1] for row in page.table("loss, all steps")[1:]] == ["4", "3", "2", "1"]
    assert len(page.all("article")) == 1


def test_rank_0_is_shown_and_the_others_are_listed(tmp_path: Path) -> None:
    for rank, value in ((1, 7.0), (0, 5.0), (2, 9.0)):
        alerts = [firing("step_too_long", 1)] if rank == 2 else []
        write(tmp_path / f"rank{rank}.jsonl", course("loss", [value]), alerts, rank=rank)
    page = page_of(tmp_path, tmp_path)
    assert len(page.all("article")) == 1
    assert page.table("loss, all steps") == [["step", "mine"], ["1", "5"]]
    assert page.table("The other ranks of mine")[1:] == [
        ["1", "1", "none", "finished"],
        ["2", "1", "step_too_long", "finished"],
    ]
    assert "rank 0 is shown; also recorded: 1, 2" in page.by_id("verdict").text


def test_ranks_are_found_whatever_their_files_are_called(tmp_path: Path) -> None:
    for name, rank in (("run.1.jsonl", 1), ("run.jsonl", 0)):
        write(tmp_path / name, course("loss", [rank + 1.0]), rank=rank)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.1.jsonl", "run.jsonl"]
    page = page_of(tmp_path, tmp_path)
    assert page.table("loss, all steps")[1:] == [["1", "1"]]
    assert f"file {tmp_path / 'run.jsonl'} rank 0 is shown; also recorded: 1" in page.by_id("verdict").text


def test_a_run_of_which_only_another_rank_is_there(tmp_path: Path) -> None:
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("loss", [1.0]), rank=3))
    assert "rank 3" in page.by_id("verdict").text


def test_runs_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", course("loss", [1.0]))
    page = page_of(tmp_path, tmp_path)
    assert [one.all("h3")[0].text for one in page.all("article")] == ["mine (a)", "mine (b)"]


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [1.0]))
    assert len(page_of(tmp_path, path, tmp_path).all("article")) == 1


def test_more_runs_than_colours(tmp_path: Path) -> None:
    for place in range(11):
        write(tmp_path / f"{place:02}.jsonl", course("loss", [place + 1.0, 1.0]), run=f"run-{place}")
    page = page_of(tmp_path, tmp_path)
    entries = [one.text for one in page.figure("loss").all("li")]
    assert [entry.split(":")[0] for entry in entries] == [f"run-{place}" for place in range(11)]


HOSTILE = "<script>alert(1)</script>\"' onload=x & \x00\x1b[31m\ud800 ]]> --> </svg></style>"


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    layered = [
        Reading(name, value, step, layer)
        for name in ("grad_norm", HOSTILE)
        for step, value in ((1, 1.0), (2, 2.0))
        for layer in (HOSTILE, "plain")
    ]
    readings = [
        *course("loss", [1.0, math.nan], reason=HOSTILE),
        *course(HOSTILE, [1.0, 2.0]),
        *course("step_share", [0.5, math.nan], reason=HOSTILE),
        *layered,
    ]
    alerts = [
        firing(HOSTILE, 1, layer=HOSTILE, severity=HOSTILE, message=HOSTILE, remedy=HOSTILE, blame=(HOSTILE,)),
        firing("step_too_long", 1, message=HOSTILE),
    ]
    path = tmp_path / "a.jsonl"
    write(path, readings, alerts, run=HOSTILE, info={HOSTILE: HOSTILE})
    write(tmp_path / "b.jsonl", readings, alerts, run="second " + HOSTILE, info={HOSTILE: "else"})
    output = tmp_path / "report.html"
    assert report(tmp_path, "-o", output, "--title", HOSTILE) == 0
    page = read_page(output.read_bytes().decode("utf-8"))
    check_accessible(page)
    check_self_contained(page)
    assert "<script" not in page.source
    assert not re.search("[\x00-\x08\x0b-\x1f]", page.source)
    assert "<script>alert(1)</script>\"' onload=x & " in page.all("h1")[0].text
    assert page.source.count("Content-Security-Policy") == 1


# The command


def test_it_prints_the_path_and_replaces_an_older_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", course("loss", [1.0]))
    assert report("a.jsonl", "--title", "First") == 0
    assert report("a.jsonl", "--title", "Second") == 0
    assert capsys.readouterr().out == "report.html\nreport.html\n"
    page = read_page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0].text == "Second"
    assert page.all("title")[0].text == "Second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "report.html"]


def test_the_title_names_the_runs(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write(tmp_path / f"{name}.jsonl", course("loss", [1.0]), run=name)
    assert page_of(tmp_path, tmp_path).all("h1")[0].text == "Gradient report: x and y"
    assert page_of(tmp_path, tmp_path / "x.jsonl").all("h1")[0].text == "Gradient report: x"


def test_another_file_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [1.0]))
    other = tmp_path / "thesis.html"
    other.write_text("<p>years of work</p>")
    with pytest.raises(ArgumentError, match="`--output` must be a new file or an older report; --force replaces"):
        report(path, "-o", other)
    assert other.read_text() == "<p>years of work</p>"
    assert report(path, "-o", other, "--force") == 0
    assert "years of work" not in other.read_text()


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [1.0]))
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="`--output` must be another file than those that are read"):
        report(path, "-o", path, "--force")
    other = write(tmp_path / "b.jsonl", course("loss", [1.0]), rank=1)
    with pytest.raises(ArgumentError, match="`--output` must be another file than those that are read"):
        report(tmp_path, "-o", other, "--force")
    with pytest.raises(ArgumentError, match=r"`--output` must be a file\. Got the directory"):
        report(path, "-o", tmp_path)
    assert path.read_bytes() == before


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [1.0]))
    with pytest.raises(ArgumentError, match="`--output` must be a file that can be written"):
        report(path, "-o", path / "below" / "report.html")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "`RUN` must be a JSONL file, or a directory that holds some"),
        (lambda path: path.write_text(""), "`RUN` must be a file that holds a run. Got .*, which is empty"),
        (lambda path: path.write_text("\n"), "`RUN` must be a file that holds a run. Got .*, which holds none"),
        (lambda path: path.write_text('{"kind": "reading"}\n'), "hold lines that a `JsonlSink` wrote. Got line 1"),
        (lambda path: path.write_text('{"kind": "reading", "name": 5, "value": 1}\n'), "hold lines that a `JsonlSink`"),
        (lambda path: path.mkdir(), "`RUN` must be a directory with JSONL files that hold runs"),
    ],
    ids=["missing", "empty", "blank", "foreign", "typeless", "directory"],
)
def test_what_holds_no_run_is_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "a.jsonl")
    with pytest.raises(ArgumentError, match=message):
        report(tmp_path / "a.jsonl", "-o", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_foreign_files_in_a_directory_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "a.jsonl", course("loss", [1.0]))
    (tmp_path / "data.jsonl").write_text(json.dumps({"kind": "reading", "text": "not ours"}) + "\n")
    assert len(page_of(tmp_path, tmp_path).all("article")) == 1
    assert "left out: " in (error := capsys.readouterr().err)
    assert "data.jsonl" in error


def test_without_jinja2_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", course("loss", [1.0]))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(GradmonError, match="To install it: pip install jinja2"):
        report(path, "-o", tmp_path / "report.html")


def test_the_command_is_there_without_jinja2_being_loaded() -> None:
    program = "import sys, gradmon_integrations.report.command; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
