"""`gradmon workload average-gradient`, from its options to the table and the files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradmon import GradmonError
from gradmon_integrations.workloads.command import COMMAND, WORKLOADS

SHORT = ["--depth", "4", "--epochs", "1", "--every", "5", "--iterations", "3"]


def run(*options: str) -> int:
    parser = argparse.ArgumentParser("gradmon workload")
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args(["average-gradient", *options]))


def test_pairs_are_trained_watched_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SHORT, "--seeds", "2", "--logdir", str(tmp_path), "--prometheus-port", "0") == 0
    output = capsys.readouterr().out
    assert "Prometheus: http://127.0.0.1:" in output
    rows = {line.split("  ")[0]: line.split()[-3:] for line in output.splitlines()}
    assert {"loss at the end", "step_ratio, median", "step_condition, median", "RD"} <= rows.keys()
    assert "±" in rows["RD"]
    for name in ("base-0", "average-0", "base-1", "average-1"):
        assert list((tmp_path / name).glob("events.*"))
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        names = {line["name"] for line in lines if line.get("kind") == "reading"}
        assert {"loss", "step_ratio", "step_condition", "update_ratio"} <= names
        assert ("relative_difference" in names) == name.startswith("average")
    with pytest.raises(GradmonError, match="`--logdir` must be a directory that holds no such runs yet"):
        run(*SHORT, "--logdir", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "argument --lr: must be a positive number. Got '0'"),
        (["--lr", "fast"], "must be a positive number. Got 'fast'"),
        (["--iterations", "1"], "argument --iterations: must be a whole number from 2. Got '1'"),
        (["--epochs", "x"], "must be a whole number from 1. Got 'x'"),
        (["--prometheus-port", "70000"], "must be a whole number from 0 to 65535"),
        (["--model", "D"], "argument --model: invalid choice: 'D'"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err


def test_what_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradmonError, match="`data_root` must be the folder that holds aclImdb"):
        run("--data", "imdb", "--logdir", str(tmp_path))
    with pytest.raises(GradmonError, match="`batch_size` must be from 1 to 1797"):
        run("--batch-size", "5000", "--logdir", str(tmp_path))
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(GradmonError, match=f"`--prometheus-port` {port} cannot be had"):
            run(*SHORT, "--logdir", str(tmp_path / "x"), "--prometheus-port", port)
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    with pytest.raises(GradmonError, match="GRADMON_DISABLED=1 switches every monitor off"):
        run("--logdir", str(tmp_path))


def test_choosing_a_workload_imports_no_other() -> None:
    program = (
        "import sys, argparse\n"
        "from gradmon_integrations.workloads.command import COMMAND\n"
        "assert not any('average_gradient' in name or 'guessers' in name for name in sys.modules)\n"
        "parser = argparse.ArgumentParser()\n"
        "COMMAND.add_arguments(parser)\n"
        "COMMAND.run(parser.parse_args(['average-gradient', '--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradmon workload average-gradient" in done.stdout
    assert "--iterations" in done.stdout
    assert set(WORKLOADS) == {"average-gradient", "guessers"}
