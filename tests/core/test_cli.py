import os
import sys

import pytest

from gradmon import METRICS, cli
from gradmon._errors import ArgumentError, PluginError


def test_metrics_lists_every_metric_with_its_source(capsys):
    assert cli.main(["metrics"]) == 0
    printed = capsys.readouterr().out
    for metric in METRICS.values():
        assert metric.name in printed
        assert f"[{metric.source}]" in printed
    assert "step-consistency:" in printed


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "metrics" in printed


def test_without_a_command_it_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def command(error):
    def run(arguments):
        raise error

    return cli.Command("fails", "fails", lambda parser: None, run)


def test_a_command_that_cannot_be_imported_does_not_take_the_others_along(monkeypatch, capsys):
    def broken(group, name):
        raise PluginError(f"{name} is broken")

    monkeypatch.setattr(cli, "entry_points_named", lambda group: {"other": None})
    monkeypatch.setattr(cli, "load", broken)
    assert cli.main(["metrics"]) == 0
    seen = capsys.readouterr()
    assert seen.err == "gradmon: other is broken\n"
    assert "weight_condition" in seen.out


def test_an_error_of_gradmon_is_one_line_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(cli, "commands", lambda: [command(ArgumentError("steps", "be a positive integer", 0))])
    assert cli.main(["fails"]) == 1
    assert capsys.readouterr().err == "gradmon: `steps` must be a positive integer. Got 0.\n"


def test_ctrl_c_gives_130(monkeypatch):
    monkeypatch.setattr(cli, "commands", lambda: [command(KeyboardInterrupt())])
    assert cli.main(["fails"]) == 130


def test_output_that_nobody_reads_any_more_is_no_error(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["metrics"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_output_that_cannot_be_written_is_one_line_on_standard_error(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["metrics"]) == 1
    assert capfd.readouterr().err == "gradmon: the output cannot be written: No space left on device\n"


def test_other_errors_of_the_system_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "commands", lambda: [command(PermissionError("not here"))])
    with pytest.raises(PermissionError, match="not here"):
        cli.main(["fails"])
