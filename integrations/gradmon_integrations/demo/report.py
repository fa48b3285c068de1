"""What the demo says before and after the training."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gradmon_integrations.demo.runs import RECIPES, Run
from gradmon_integrations.demo.view import View
from gradmon_integrations.display.verdict import differences, judge


def announce(view: View, arguments: argparse.Namespace, logdir: Path, url: str | None) -> None:
    """Say what will be trained, and where to watch."""
    first = f"{arguments.steps} steps on scikit-learn's digits, batches of {arguments.batch_size}"
    view.say(f"gradmon demo: {first}, a look every {arguments.every} steps.", "title")
    width = max(len(recipe.name) for recipe in RECIPES)
    for recipe in RECIPES:
        view.say(f"  {recipe.name:<{width}}  {recipe}")
    if url is not None:
        view.say(f"  {'Prometheus':<{width}}  {url} (until the demo ends)")
    view.say(f"  {'TensorBoard':<{width}}  {tensorboard_command(logdir)}", "command")
    view.say(f"  {'in a terminal':<{width}}  {shlex.join(['gradmon', 'watch', str(logdir)])}", "command")
    view.say("")


def conclude(view: View, runs: Sequence[Run], logdir: Path, reached: int, steps: int, seconds: float) -> None:
    """Give the verdict on each run, compare them, and say where everything was written."""
    view.say("")
    if reached < steps:
        view.say(f"Stopped after {reached} of {steps} steps. The verdict so far:", "title")
    for run in runs:
        verdict = judge(run.name, run.history)
        if verdict is None:
            view.say(f"{run.name} has no numbers, so there is no verdict.", "title")
        else:
            view.say(verdict.title, verdict.level)
            for reason in verdict.reasons:
                view.say(f"  - {reason}")
            if verdict.change:
                view.say(f"  What to change: {verdict.change}", "title")
        if run.monitor.failures:
            view.say(f"  The monitor failed: {dict(run.monitor.failures)}", "bad")
        view.say("")
    apart = differences(runs[0].history, runs[1].history)
    if apart:
        view.say(f"Furthest apart, {runs[0].name} against {runs[1].name}, medians over the run:", "title")
        for line in apart:
            view.say(f"  - {line}")
        view.say("")
    view.say(
        f"Finished after {seconds:.0f} s. To open the dashboard, and the files with all readings and alerts:", "title"
    )
    view.say(f"  {tensorboard_command(logdir)}", "command")
    for run in runs:
        view.say(f"  {logdir / f'{run.name}.jsonl'}", "command")


def tensorboard_command(logdir: Path) -> str:
    """What to type to look at a log directory."""
    beside = Path(sys.executable).with_name("tensorboard")
    if shutil.which("tensorboard"):
        program = ["tensorboard"]
    elif beside.exists():
        program = [str(beside)]
    else:
        program = [sys.executable, "-m", "tensorboard.main"]
    return shlex.join([*program, "--logdir", str(logdir)])
