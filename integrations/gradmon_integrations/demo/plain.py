"""Plain lines, for logs and pipes: one for each look at each run, one for each alert. ASCII, and no control codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from gradmon_integrations.demo.runs import Run
from gradmon_integrations.demo.view import Tone
from gradmon_integrations.display.history import History
from gradmon_integrations.display.states import limits, number

_MOST = 8


class PlainView:
    """Prints a line for each look at each run.

    Args:
        runs: The runs.
        metrics: What is measured. Of more than eight, those are shown that have an alert rule.
        steps: How many steps there will be.
    """

    def __init__(self, runs: Sequence[Run], metrics: Sequence[str], steps: int) -> None:
        self._runs = runs
        shown = metrics if len(metrics) <= _MOST else [m for m in metrics if m == "loss" or limits(m)]
        self._metrics = shown[:_MOST]
        self._step_width = len(str(steps))
        self._name_width = max(len(run.name) for run in runs)
        self._alerts = [0] * len(runs)

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()

    def step(self, step: int) -> None:
        """Print what is new."""
        for place, run in enumerate(self._runs):
            history, head = run.history, f"step {step:>{self._step_width}}  {run.name:<{self._name_width}}  "
            loss = history.newest("loss")
            if loss is not None and loss.step == step:
                print(head + self._numbers(history), flush=True)
            for alert in history.alerts[self._alerts[place] :]:
                remedy = f" {alert.remedy}" if alert.state == "firing" else ""
                print(f"{head}{alert.severity} {alert.rule} {alert.state}: {alert.message}{remedy}", flush=True)
            self._alerts[place] = len(history.alerts)

    def say(self, text: str, tone: Tone = "text") -> None:
        """Print a paragraph."""
        print(text, flush=True)

    def _numbers(self, history: History) -> str:
        found = [(name, history.newest(name)) for name in self._metrics]
        parts = [f"{name} {number(reading.value)}" for name, reading in found if reading is not None]
        firing = ",".join(alert.rule for alert in history.active) or "none"
        return "  ".join([*parts, f"alerts {firing}"])
