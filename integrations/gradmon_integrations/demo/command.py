"""The command: sets up the runs, shows them while they train, and says what came of it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gradmon._errors import ArgumentError, GradmonError
from gradmon.cli import Command
from gradmon.perturbations.inputs import Ascent
from gradmon_integrations.demo.data import batches, digits
from gradmon_integrations.demo.options import add_arguments, chosen_metrics, default_logdir
from gradmon_integrations.demo.plain import PlainView
from gradmon_integrations.demo.report import announce, conclude
from gradmon_integrations.demo.runs import RECIPES, Run, looks, one_thread, prepare, train
from gradmon_integrations.demo.view import View

_INPUT_EXAMPLES = 8
"""The examples that `input_condition` looks at: each takes several passes."""


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        GradmonError: A package is missing, or monitors are switched off.
        ArgumentError: An option cannot be followed.
    """
    _check_packages()
    if os.environ.get("GRADMON_DISABLED") == "1":
        raise GradmonError("GRADMON_DISABLED=1 switches every monitor off: there is nothing to show.")
    logdir = arguments.logdir or default_logdir()
    metrics = chosen_metrics(arguments.metrics)
    reached, interrupted, began = 0, False, time.monotonic()
    with _opened(arguments, logdir, metrics) as (runs, url):
        view = _view(arguments, runs, metrics)
        announce(view, arguments, logdir, url)

        def done(step: int) -> None:
            nonlocal reached
            reached = step
            view.step(step)

        try:
            with one_thread(), view:
                train(runs, batches(digits(), arguments.batch_size, arguments.seed), arguments.steps, done)
        except KeyboardInterrupt:
            interrupted = True
    conclude(view, runs, logdir, reached, arguments.steps, time.monotonic() - began)
    return 130 if interrupted else 0


COMMAND = Command("demo", "train a healthy and an ill-conditioned run side by side, and watch", add_arguments, run)


def _check_packages() -> None:
    for module, name in (("sklearn", "scikit-learn"), ("rich", "rich")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f'The demo needs {name} ({error}). To install it: pip install "gradmon[demo]"'
            raise GradmonError(message) from error


@contextmanager
def _opened(
    arguments: argparse.Namespace, logdir: Path, metrics: Sequence[str]
) -> Iterator[tuple[list[Run], str | None]]:
    """The runs and the address of /metrics; in the end everything is flushed and closed."""
    from gradmon.alerts import default_rules
    from gradmon.sinks import JsonlSink, Sink
    from gradmon_integrations.sinks.prometheus import PrometheusSink
    from gradmon_integrations.sinks.tensorboard import TensorBoardSink

    with ExitStack() as stack:
        # It writes nothing itself: it keeps the server until the runs' own sinks are closed.
        server = None
        if arguments.prometheus_port is not None:
            try:
                server = PrometheusSink(arguments.prometheus_port)
            except ArgumentError as error:
                raise GradmonError(f"`--prometheus-port` {arguments.prometheus_port} cannot be had: {error}") from error
            stack.callback(server.close)
        _make(logdir)
        runs: list[Run] = []
        for recipe in RECIPES:
            sinks: list[Sink] = [TensorBoardSink(logdir / recipe.name), JsonlSink(logdir / f"{recipe.name}.jsonl")]
            if server is not None:
                sinks.append(server.sibling(recipe.name))
            for sink in sinks:
                stack.callback(sink.close)
            run = prepare(
                recipe,
                seed=arguments.seed,
                sinks=sinks,
                metrics=metrics,
                mask=arguments.mask,
                schedule=looks(arguments.every, arguments.steps),
                inputs=Ascent(examples=min(_INPUT_EXAMPLES, arguments.batch_size)),
                # It looks far more often, and at more, than a training should: that this takes time is no news.
                alerts=[rule for rule in default_rules() if rule.name != "overhead_high"],
                on_alert=None,  # the view tells them
            )
            stack.push(run.monitor)
            runs.append(run)
        yield runs, None if server is None else server.url


def _make(logdir: Path) -> None:
    """Create the log directory.

    Raises:
        ArgumentError: It cannot be created, or holds a demo already.
    """
    if any((logdir / name).exists() for recipe in RECIPES for name in (recipe.name, f"{recipe.name}.jsonl")):
        raise ArgumentError("--logdir", "be a directory that holds no demo yet", logdir)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        for recipe in RECIPES:
            (logdir / recipe.name).mkdir()
    except OSError as error:
        raise ArgumentError("--logdir", f"be a directory that can be written ({error.strerror})", logdir) from error


def _view(arguments: argparse.Namespace, runs: Sequence[Run], metrics: Sequence[str]) -> View:
    if sys.stdout.isatty() and not arguments.plain:
        from rich.console import Console

        from gradmon_integrations.demo.live import LiveView

        console = Console()
        if not console.is_dumb_terminal:
            return LiveView(runs, metrics, arguments.steps, console)
    return PlainView(runs, metrics, arguments.steps)
