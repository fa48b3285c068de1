"""The command: `gradmon workload NAME ...` trains a reference workload under the monitor."""

from __future__ import annotations

import argparse
import importlib

from gradmon.cli import Command

_DESCRIPTION = """\
Trains a published method beside the ordinary one, on the same data and under the monitor, and says what its numbers
make of the difference. To list a workload's own options: gradmon workload WORKLOAD --help"""

WORKLOADS: dict[str, str] = {
    "average-gradient": "gradmon_integrations.workloads.average_gradient.command",
    "guessers": "gradmon_integrations.workloads.guessers.command",
}
"""By name: the module, imported when it is chosen, with ``configure(parser)`` and ``run(arguments) -> int``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the workload's name; all that follows it is the workload's own."""
    parser.description = _DESCRIPTION
    parser.add_argument("workload", choices=WORKLOADS, metavar="WORKLOAD", help=f"one of {', '.join(WORKLOADS)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="what the workload takes")


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen workload.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The workload's exit status.
    """
    module = importlib.import_module(WORKLOADS[arguments.workload])
    parser = argparse.ArgumentParser(f"gradmon workload {arguments.workload}")
    module.configure(parser)
    return int(module.run(parser.parse_args(arguments.options)))


COMMAND = Command("workload", "train a reference workload under the monitor", add_arguments, run)
