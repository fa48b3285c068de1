"""The command: reads its sources again and again, and shows what is new."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradmon._errors import GradmonError
from gradmon.cli import Command
from gradmon_integrations.display.words import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from gradmon_integrations.watch.runs import Source, Watched

CRITICAL = 3
"""The exit status of `--once` where a critical alert is active: not that of a wrong option, which is 2."""

_EPILOG = """\
A DIR is searched for files named *.jsonl, which come from sinks="jsonl:runs/NAME.jsonl"; a URL is what the sink
"prometheus:PORT" serves, such as http://127.0.0.1:9464. Files are followed while they grow, and what cannot be reached
is tried again. Ctrl-C ends it, with exit status 130. With --once: 0 if there is something to show, 1 if there is
nothing or it cannot be read, 3 if a critical alert is active. Where the output is no terminal, a line is printed for
each run that has something new."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what `--help` says below them."""
    parser.epilog = _EPILOG
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="a file, a directory, or the URL of an exporter")
    parser.add_argument("--once", action="store_true", help="show one picture, and end")
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="seconds between two looks (2)")
    parser.add_argument("--run", metavar="NAME", dest="only", help="only the run of this name")
    parser.add_argument(
        "--silence",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="seconds without a word after which a run counts as stalled or killed (600)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Watch.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The exit status.

    Raises:
        GradmonError: A package is missing, or with `--once` there is nothing to show.
        ArgumentError: A source is none.
    """
    try:
        importlib.import_module("rich")
    except ImportError as error:
        raise GradmonError(
            f'`gradmon watch` needs rich ({error}). To install it: pip install "gradmon[terminal]"'
        ) from error
    from rich.console import Console

    sources = [_source(text) for text in arguments.source]
    console = Console(highlight=False, markup=False, emoji=False)
    if arguments.once:
        return _once(sources, arguments, console)
    try:
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            _live(sources, arguments, console)
        else:
            _lines(sources, arguments)
    except KeyboardInterrupt:
        return 130
    return 0


COMMAND = Command("watch", "show how a run is getting on, from its files or its exporter", add_arguments, run)


def _source(text: str) -> Source:
    from gradmon_integrations.watch.files import FileSource

    if "://" not in text:
        return FileSource(Path(text))
    from gradmon_integrations.watch.exporter import ExporterSource

    return ExporterSource(text)


def _read(sources: Sequence[Source], wanted: str | None) -> tuple[list[Watched], list[str]]:
    """The runs, and why there are not more."""
    from gradmon_integrations.watch.runs import SourceError

    runs: list[Watched] = []
    problems: list[str] = []
    for source in sources:
        try:
            runs += source.read()
        except SourceError as error:
            problems.append(str(error))
    if wanted is not None:
        names = dict.fromkeys(run.run for run in runs)
        runs = [run for run in runs if run.run == wanted]
        if names and not runs:
            problems.append(f"There is no run {wanted!r}. There are: {', '.join(names)}.")
    return runs, problems


def _once(sources: Sequence[Source], arguments: argparse.Namespace, console: Console) -> int:
    from gradmon_integrations.watch.frame import frame

    runs, problems = _read(sources, arguments.only)
    if not runs:
        raise GradmonError(" ".join(problems))
    for problem in problems:
        print(f"gradmon: {problem}", file=sys.stderr)
    console.print(frame(runs, _title(arguments), console, silence=arguments.silence, rows=None))
    critical = any(alert.severity == "critical" for run in runs for alert in run.history.active)
    return CRITICAL if critical else 0


def _live(sources: Sequence[Source], arguments: argparse.Namespace, console: Console) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from gradmon_integrations.watch.frame import frame

    last = None
    try:
        # On the other screen, so that whatever was in the terminal before is there again afterwards.
        with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as live:
            while True:
                runs, problems = _read(sources, arguments.only)
                title = f"{_title(arguments)}   {time.strftime('%H:%M:%S')}   Ctrl-C ends"
                told = [Text(f"{problem} Trying again.", style="yellow") for problem in problems]
                rows = console.height - 1 - sum(len(console.render_lines(text)) for text in told)
                picture = frame(runs, title, console, silence=arguments.silence, rows=rows)
                live.update(Group(picture, *told), refresh=True)
                last = runs
                time.sleep(arguments.interval)
    finally:
        if last:
            console.print(frame(last, _title(arguments), console, silence=arguments.silence, rows=None))


def _lines(sources: Sequence[Source], arguments: argparse.Namespace) -> None:
    from gradmon_integrations.watch.frame import line

    said: dict[object, str] = {}
    with contextlib.suppress(BrokenPipeError):
        while True:
            runs, problems = _read(sources, arguments.only)
            told: dict[object, str] = {(run.run, run.rank): line(run, time.time(), arguments.silence) for run in runs}
            told.update((problem, problem) for problem in problems)
            for key, text in told.items():
                if said.get(key) != text:
                    print(text, flush=True)
            said = told
            time.sleep(arguments.interval)


def _title(arguments: argparse.Namespace) -> str:
    # Without user and password, which an address may hold.
    return "  ".join(["gradmon watch", *(one_line(re.sub("(?<=://)[^/]*@", "", text)) for text in arguments.source)])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds. Got {text!r}.")
    return seconds
