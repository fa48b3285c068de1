"""The `gradmon` command: built-in commands, and those that installed packages add."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradmon._errors import GradmonError, PluginError
from gradmon._plugins import entry_points_named, load
from gradmon.metrics import METRICS


@dataclass(frozen=True)
class Command:
    """A subcommand of `gradmon`, registered under the entry point ``gradmon.commands``.

    Attributes:
        name: What the user types.
        summary: One line of help.
        add_arguments: Adds the command's arguments to its parser.
        run: Does the work; returns the exit status.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def _list_metrics(arguments: argparse.Namespace) -> int:
    width = max(len(name) for name in METRICS)
    for group in dict.fromkeys(metric.group for metric in METRICS.values()):
        print(f"{group}:")
        for metric in METRICS.values():
            if metric.group == group:
                print(f"  {metric.name:<{width}}  {metric.meaning} [{metric.source}]")
    return 0


_METRICS = Command("metrics", "list every metric with its meaning and source", _no_arguments, _list_metrics)


def commands() -> list[Command]:
    """Every command that can be run here, by name; one that cannot be imported is named on standard error."""
    found = {_METRICS.name: _METRICS}
    for name in entry_points_named("gradmon.commands"):
        try:
            found[name] = load("gradmon.commands", name)
        except PluginError as error:
            print(f"gradmon: {error}", file=sys.stderr)
    return [found[name] for name in sorted(found)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `gradmon`; None for the process's own arguments.

    Returns:
        The exit status: 0 for success, 1 for an error that is explained on standard error, 130 after Ctrl-C, 141 where
        who reads the output has stopped to.

    Raises:
        OSError: A command raised one that is none of the output's.
    """
    parser = argparse.ArgumentParser(
        "gradmon", description="Can the gradient be trusted while a PyTorch model trains, why not, and what to change?"
    )
    commanding = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands():
        child = commanding.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(child)
        child.set_defaults(run=command.run)
    try:
        chosen = parser.parse_args(arguments)
        status = int(chosen.run(chosen))
        sys.stdout.flush()
    except GradmonError as error:
        print(f"gradmon: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _forget_output()
        return 141  # as a program that the signal ends: `gradmon metrics | head -1` is no error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _forget_output()
        print(f"gradmon: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _forget_output() -> None:
    """Drop what standard output still holds, which Python would try to write at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
