"""The command: finds the runs, makes the page, and puts it where it was asked for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gradmon._errors import ArgumentError, GradmonError
from gradmon.cli import Command
from gradmon_integrations.report.runs import Source, find_runs

_DESCRIPTION = """\
Makes one page of HTML from the files that the sink "jsonl" wrote: how each run stands, which alerts fired when and what
to change, where the gradient's variance comes from, every metric with its healthy band, the layers, and what watching
cost. Several runs are drawn on the same axes."""
_EPILOG = """\
The page needs no other file, no network and no script. An older report at the same place is replaced; any other file
is left alone, unless --force says otherwise."""
_MARK = '<meta name="generator" content="gradmon report">'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what `--help` says around them."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a JSONL file, or a directory with such files in it"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)"
    )
    parser.add_argument("--title", metavar="TEXT", help="its heading (the names of the runs)")
    parser.add_argument("--force", action="store_true", help="replace FILE even if it is no report")


def run(arguments: argparse.Namespace) -> int:
    """Make the report, and print where it is.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The exit status, 0.

    Raises:
        GradmonError: jinja2 is missing.
        ArgumentError: An option cannot be followed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        message = f"The report needs jinja2 ({error}). To install it: pip install jinja2"
        raise GradmonError(message) from error
    from gradmon_integrations.report.page import render

    sources = find_runs(arguments.runs)
    _check_output(arguments.output, sources, force=arguments.force)
    _write(arguments.output, render(sources, arguments.title or _title(sources)))
    print(arguments.output)
    return 0


COMMAND = Command("report", "make a page of HTML from the files of finished runs", add_arguments, run)


def _title(sources: list[Source]) -> str:
    names = [source.label for source in sources]
    if len(names) == 1:
        return f"Gradient report: {names[0]}"
    if len(names) <= 3:
        return f"Gradient report: {', '.join(names[:-1])} and {names[-1]}"
    return f"Gradient report: {len(names)} runs"


def _check_output(output: Path, sources: list[Source], *, force: bool) -> None:
    """Check that nothing is lost by writing there.

    Raises:
        ArgumentError: The output is a run's own file, a directory, or a file that is no report.
    """
    if output.is_dir():
        raise ArgumentError("--output", "be a file", f"the directory {output}")
    if not output.exists():
        return
    if any(output.samefile(path) for source in sources for path, _ in source.files):
        raise ArgumentError("--output", "be another file than those that are read", output)
    try:
        with output.open("rb") as file:
            known = _MARK.encode() in file.read(4096)
    except OSError as error:
        raise ArgumentError("--output", f"be a file that can be read ({error.strerror})", output) from error
    if not known and not force:
        raise ArgumentError("--output", "be a new file or an older report; --force replaces others as well", output)


def _write(output: Path, page: str) -> None:
    """Write the page in one go: a reader sees the old one or the new one, never a part.

    Raises:
        ArgumentError: The file cannot be written.
    """
    fresh = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(page, encoding="utf-8", newline="\n")
            os.replace(fresh, output)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise ArgumentError("--output", f"be a file that can be written ({error.strerror})", output) from error
