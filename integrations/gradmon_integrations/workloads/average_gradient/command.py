"""`gradmon workload average-gradient`: RMSprop with and without the average gradient, under the monitor."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path

from gradmon._errors import ArgumentError, GradmonError
from gradmon_integrations.display.history import History
from gradmon_integrations.workloads.average_gradient.experiment import (
    Recipe,
    Run,
    loss_of,
    mean_and_sem,
    prepare,
    stream,
)
from gradmon_integrations.workloads.average_gradient.measurement import relative_difference_metric
from gradmon_integrations.workloads.data import LOADERS, Data, load
from gradmon_integrations.workloads.models import INITS, MODELS

_DESCRIPTION = """\
Trains a network twice, side by side, from the same weights and on the same batches: by RMSprop, and by RMSprop's steps
with the signs of the gradient averaged over the step. A monitor watches each. At the end a table says what the loss
came to, how much more of it an averaged step takes away (RD), and how far each step moves the gradient."""
_EPILOG = """\
The log directory holds, for each run, TensorBoard's events and all readings as JSON lines. The second optimizer takes
N - 1 more forward and backward passes a step, so compare its loss after half the epochs, too."""
_METRICS = ("loss", "grad_norm", "step_ratio", "step_condition", "update_ratio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what `--help` says around them."""
    plain = Recipe()
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--model", choices=MODELS, default=plain.model, help="A: 27 tanh layers, B: 3, C: convolutions over texts (A)"
    )
    parser.add_argument("--depth", type=_whole(0), metavar="N", help="hidden layers (the model's)")
    parser.add_argument("--width", type=_whole(1), metavar="N", help="units of each (the model's: 10)")
    parser.add_argument("--init", choices=INITS, default=plain.init, help="how the weights start (glorot)")
    parser.add_argument("--data", choices=LOADERS, default="digits", help="what to train on (digits)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the data are kept")
    parser.add_argument("--lr", type=_positive, default=plain.lr, metavar="R", help="learning rate (7.5e-4)")
    parser.add_argument("--iterations", type=_whole(2), default=2, metavar="N", help="passes of an averaged step (2)")
    parser.add_argument("--epochs", type=_whole(1), default=plain.epochs, metavar="N", help="epochs (10)")
    parser.add_argument("--batch-size", type=_whole(1), default=plain.batch_size, metavar="N", help="examples (128)")
    parser.add_argument("--seeds", type=_whole(1), default=1, metavar="N", help="pairs of runs, one after another (1)")
    parser.add_argument("--every", type=_whole(1), default=10, metavar="N", help="look every N steps (10)")
    parser.add_argument("--logdir", type=Path, metavar="DIR", help="where to write (runs/average-gradient-DATE-TIME)")
    parser.add_argument("--prometheus-port", type=_whole(0, 65535), metavar="PORT", help="port of /metrics (none)")


def run(arguments: argparse.Namespace) -> int:
    """Train all pairs, and print the table.

    Args:
        arguments: What `configure` describes.

    Returns:
        The exit status, 0.

    Raises:
        GradmonError: A package is missing, or monitors are switched off.
    """
    if os.environ.get("GRADMON_DISABLED") == "1":
        raise GradmonError("GRADMON_DISABLED=1 switches every monitor off: there is nothing to show.")
    data = load(arguments.data, data_root=arguments.data_root)
    logdir = arguments.logdir or Path("runs") / f"average-gradient-{datetime.now():%Y%m%d-%H%M%S}"
    recipe = Recipe(
        arguments.model, arguments.depth, arguments.width, arguments.init, arguments.lr, arguments.batch_size,
        arguments.epochs, 1,
    )  # fmt: skip
    averaged = replace(recipe, iterations=arguments.iterations, measure=True)
    found: dict[str, list[_Outcome]] = {"base": [], "average": []}
    with _one_thread(), _server(arguments.prometheus_port) as server:
        began = time.monotonic()
        for seed in range(arguments.seeds):
            names = [f"{name}-{seed}" for name in found]
            with _watched((recipe, averaged), names, data, seed, logdir, server, arguments.every) as runs:
                _train(runs, recipe, data, seed)
            for outcomes, (run, history) in zip(found.values(), runs, strict=True):
                outcomes.append(_Outcome(run, history))
            losses = ", ".join(f"{name} {outcomes[-1].loss:.3f}" for name, outcomes in found.items())
            print(f"seed {seed}: loss {losses} ({time.monotonic() - began:.0f} s)", flush=True)
    print()
    print(_table(found, arguments.iterations))
    print(f"\nTo look at the runs: tensorboard --logdir {logdir}")
    return 0


class _Outcome:
    """What a run came to."""

    def __init__(self, run: Run, history: History) -> None:
        steps = len(run.losses)
        self.loss = run.last_loss(max(1, steps // 10))
        self.halfway = run_loss(run.losses[: max(1, steps // 2)], max(1, steps // 10))
        self.difference = run.optimizer.relative_difference
        self.medians = {name: _median(history.values(name)) for name in _METRICS}


def run_loss(losses: Sequence[float], last: int) -> float:
    """The mean of the last losses."""
    return sum(losses[-last:]) / len(losses[-last:])


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _train(runs: Sequence[tuple[Run, History]], recipe: Recipe, data: Data, seed: int) -> None:
    for batch in stream(recipe, data, seed):
        for run, _ in runs:
            run.step(batch)


@contextmanager
def _watched(
    recipes: Sequence[Recipe],
    names: Sequence[str],
    data: Data,
    seed: int,
    logdir: Path,
    server: object,
    every: int,
) -> Iterator[list[tuple[Run, History]]]:
    """The runs of a seed, each under its monitor; in the end everything is flushed and closed."""
    from gradmon.monitor import Monitor
    from gradmon.sinks import JsonlSink, Sink
    from gradmon_integrations.sinks.prometheus import PrometheusSink
    from gradmon_integrations.sinks.tensorboard import TensorBoardSink

    taken = [logdir / name for name in names if (logdir / name).exists() or (logdir / f"{name}.jsonl").exists()]
    if taken:
        raise ArgumentError("--logdir", "be a directory that holds no such runs yet", taken[0])
    with ExitStack() as stack:
        runs: list[tuple[Run, History]] = []
        for recipe, name in zip(recipes, names, strict=True):
            run, history = prepare(recipe, data, seed), History()
            sinks: list[Sink] = [history, TensorBoardSink(logdir / name), JsonlSink(logdir / f"{name}.jsonl")]
            if isinstance(server, PrometheusSink):
                sinks.append(server.sibling(name))
            metrics = [*_METRICS, *([relative_difference_metric(run.optimizer)] if recipe.measure else [])]
            run.monitor = Monitor(
                run.model,
                run.optimizer,
                loss_of,
                metrics=metrics,
                schedule=lambda step: step % every == 0,
                mask=None,
                seed=seed,
                run=name,
                sinks=sinks,
                alerts=None,
                hparams={"lr": recipe.lr, "iterations": recipe.iterations, "init": recipe.init},
            )
            stack.push(run.monitor)
            runs.append((run, history))
        yield runs


@contextmanager
def _server(port: int | None) -> Iterator[object]:
    """The exporter that all runs share; None without a port."""
    if port is None:
        yield None
        return
    from gradmon_integrations.sinks.prometheus import PrometheusSink

    try:
        server = PrometheusSink(port)
    except ArgumentError as error:
        raise GradmonError(f"`--prometheus-port` {port} cannot be had: {error}") from error
    print(f"Prometheus: {server.url} (until the training ends)", flush=True)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    from gradmon_integrations.demo.runs import one_thread

    with one_thread():
        yield


def _table(found: dict[str, list[_Outcome]], iterations: int) -> str:
    """What the runs came to, in columns: medians over the seeds, RD with its standard error."""
    rows = [["", "RMSprop", f"average gradient, {iterations} iterations"]]

    def row(name: str, value: Callable[[_Outcome], float]) -> None:
        rows.append([name, *(f"{_median([value(o) for o in outcomes]):.4g}" for outcomes in found.values())])

    row("loss at the end", lambda outcome: outcome.loss)
    row("loss halfway", lambda outcome: outcome.halfway)
    for name in _METRICS[1:]:
        row(f"{name}, median", lambda outcome, name=name: outcome.medians[name])
    mean, error = mean_and_sem([outcome.difference for outcome in found["average"]])
    rows.append(["RD", "0", f"{mean:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")])
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
             for line in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    must = f"must be a whole number from {least}" + ("" if most is None else f" to {most}")

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{must}. Got {text!r}.")
        return number

    return convert


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number. Got {text!r}.")
    return number
