"""The command: takes model, optimizer, loss and batches from a script, and says whether they will train."""

from __future__ import annotations

import argparse
import json

from gradmon._errors import ArgumentError
from gradmon.cli import Command
from gradmon.preflight.verdict import Preflight, preflight
from gradmon_integrations.preflight.target import load

_DESCRIPTION = """\
Calls a function of a script (or of a module that can be imported), which returns the model, its optimizer, the loss as
loss(model, batch), and one batch or an iterable of batches. Nothing is trained."""
_EPILOG = """\
Exit status: 0, or 1 for an error; with --strict 2 where the run will probably fail."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what `--help` says around them."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("target", metavar="SCRIPT.py:FUNCTION", help="what returns (model, optimizer, loss, batches)")
    parser.add_argument("--budget", type=int, default=40, metavar="N", help="passes that it may take (40)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 2 where the run will probably fail")


def run(arguments: argparse.Namespace) -> int:
    """Check, and print the verdict.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The exit status.

    Raises:
        ArgumentError: The function cannot be found or called, or does not return what it must.
    """
    made = load(arguments.target)()
    if not isinstance(made, tuple) or len(made) != 4:
        got = f"{len(made)} things" if isinstance(made, tuple) else type(made).__name__
        raise ArgumentError("target", "return (model, optimizer, loss, batches)", got)
    found = preflight(*made, budget=arguments.budget)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return _status(found, strict=arguments.strict)


COMMAND = Command("preflight", "say before the first step whether a run will train", add_arguments, run)


def _status(found: Preflight, *, strict: bool) -> int:
    return 2 if strict and found.flagged else 0
