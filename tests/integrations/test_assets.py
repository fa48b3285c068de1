"""`gradmon assets`: what is written, what is refused."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from gradmon._errors import ArgumentError
from gradmon_integrations.assets import ASSETS, COMMAND, RUNBOOK_URL, rendered

FOLDER = Path(str(files("gradmon_integrations.dashboards") / "files"))


def called(*arguments):
    parser = argparse.ArgumentParser(prog="gradmon assets")
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args([str(argument) for argument in arguments]))


def held(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in paths}


def checked(program, *arguments, where):
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *arguments], cwd=where, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_listed(capsys):
    assert set(ASSETS) == set(held(FOLDER))
    assert called("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ASSETS)
    assert all(len(line) <= 120 for line in lines)


def test_what_is_written_is_what_there_is(tmp_path, capsys):
    assert called("export", tmp_path / "new" / "folder") == 0
    assert held(tmp_path / "new" / "folder") == held(FOLDER)
    assert f"{len(ASSETS)} files are in {tmp_path / 'new' / 'folder'}" in capsys.readouterr().out


def test_the_commands_that_it_names_succeed(tmp_path, capsys):
    called("export", tmp_path)
    commands = re.findall(r"^  promtool (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        checked("promtool", *command.split(), where=tmp_path / "prometheus")
    checked("amtool", "check-config", "alertmanager.yml", where=tmp_path / "alertmanager")


def test_a_file_that_is_there_stays(tmp_path):
    mine = tmp_path / "prometheus" / "alert_rules.yml"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ArgumentError, match=r"`DIR` must hold none of the files yet.*alert_rules\.yml"):
        called("export", tmp_path)
    assert held(tmp_path) == {"prometheus/alert_rules.yml": "mine"}
    assert called("export", tmp_path, "--force") == 0
    assert held(tmp_path) == held(FOLDER)


def test_other_files_are_no_concern(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert called("export", tmp_path) == 0
    assert held(tmp_path) == {**held(FOLDER), "notes.txt": "mine"}


def test_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "prometheus").write_text("mine")
    with pytest.raises(ArgumentError, match="`DIR` must be a directory that can be written"):
        called("export", tmp_path)


def test_the_runbook_of_ones_own(tmp_path):
    called("export", tmp_path, "--runbook-url", "https://wiki.example.org/run_books?page=gradmon")
    texts = held(tmp_path)
    assert not any(RUNBOOK_URL in text for text in texts.values())
    assert "https://wiki.example.org/run_books?page=gradmon#nonfinite" in texts["prometheus/alert_rules.yml"]
    checked("promtool", "test", "rules", "alert_rules_test.yml", where=tmp_path / "prometheus")


@pytest.mark.parametrize("seconds", [60, 90, 180, 420, 600, 780, 3600])
def test_its_tests_follow(tmp_path, seconds):
    called("export", tmp_path, "--run-stalled-after", seconds)
    checked("promtool", "test", "rules", "run_stalled_test.yml", where=tmp_path / "prometheus")


@pytest.mark.parametrize("seconds", [60, 600, 1800, 1801, 3600, 86400])
def test_how_long_a_run_may_be_silent(tmp_path, seconds):
    called("export", tmp_path, "--run-stalled-after", seconds)
    texts = held(tmp_path)
    assert f":max > {seconds}\n" in texts["prometheus/alert_rules.yml"]
    hours = max(2, 4 * seconds / 3600)
    window = f"[{hours:.0f}h]" if hours == int(hours) else f"[{4 * seconds}s]"
    assert texts["prometheus/recording_rules.yml"].count(window) == 5
    for name in ("fleet", "run"):
        path = f"grafana/dashboards/gradmon-{name}.json"
        lines = zip(texts[path].splitlines(), held(FOLDER)[path].splitlines(), strict=True)
        changed = [new.strip() for new, old in lines if new != old]
        assert changed == ([] if seconds == 600 else [f'"value": {seconds:.1f}'])


def test_nothing_is_left_to_be_replaced():
    changed = dict(rendered("https://example.org/alerts", 12345))
    plain = dict(rendered())
    differing = {path for path in ASSETS if changed[path] != plain[path]}
    assert {path.rpartition("/")[2] for path in differing} == {
        "alert_rules.yml",
        "alert_rules_test.yml",
        "recording_rules.yml",
        "run_stalled_test.yml",
        "gradmon-fleet.json",
        "gradmon-run.json",
    }
    assert "[2h]" not in changed["prometheus/recording_rules.yml"]
    assert "600" not in changed["prometheus/alert_rules.yml"]


@pytest.mark.parametrize(
    ("option", "value", "must"),
    [
        ("--runbook-url", "alerts.md", "must be an address such as"),
        ("--runbook-url", "https://example.org/{{ x }}", "must be an address such as"),
        ("--runbook-url", "https://example.org/a b: #c", "must be an address such as"),
        ("--run-stalled-after", "59", r"must be a whole number in \[60, 86400\]"),
        ("--run-stalled-after", "86401", r"must be a whole number in \[60, 86400\]"),
        ("--run-stalled-after", "ten", r"must be a whole number in \[60, 86400\]"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, option, value, must):
    with pytest.raises(SystemExit):
        called("export", tmp_path, option, value)
    assert re.search(must, capsys.readouterr().err)
    assert held(tmp_path) == {}


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit):
        called()
    assert "ACTION" in capsys.readouterr().err
