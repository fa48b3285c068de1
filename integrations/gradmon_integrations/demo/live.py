"""The live view of a terminal: the table, the active alerts with their remedies, and the progress."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradmon_integrations.demo.runs import Run
from gradmon_integrations.demo.states import metric_of, number
from gradmon_integrations.demo.table import metrics_table
from gradmon_integrations.demo.view import Tone

_TONES: dict[Tone, str] = {"title": "bold", "good": "bold green", "note": "bold yellow", "bad": "bold red"}
_SEVERITIES = {"critical": "bold red", "warning": "red", "info": "yellow"}
_HEAD = 2


class LiveView:
    """Redraws the terminal at each look.

    Args:
        runs: The runs.
        metrics: What is measured.
        steps: How many steps there will be.
        console: The terminal.
    """

    def __init__(self, runs: Sequence[Run], metrics: Sequence[str], steps: int, console: Console) -> None:
        self._runs, self._metrics, self._console = runs, metrics, console
        self._seen = -1
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=40),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=steps)
        self._live = Live(console=console, refresh_per_second=8, redirect_stdout=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        self._draw(whole=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw(whole=True)
        self._live.stop()

    def step(self, step: int) -> None:
        """Advance the progress, and draw anew if there are new readings."""
        self._progress.update(self._task, completed=step)
        seen = sum(run.history.writes for run in self._runs)
        if seen != self._seen:
            self._seen = seen
            self._draw(whole=False)

    def say(self, text: str, tone: Tone = "text") -> None:
        """Print a paragraph."""
        if tone == "command":
            self._console.print(Text(text), soft_wrap=True)
            return
        indent = len(text) - len(text.lstrip(" -"))
        body = Text(text[indent:], style=_TONES.get(tone, ""))
        if indent:
            grid = Table.grid()
            grid.add_row(text[:indent], body)
            self._console.print(grid)
        else:
            self._console.print(body)

    def _draw(self, *, whole: bool) -> None:
        """Draw; `whole`: also what does not fit on the terminal, which then scrolls."""
        alerts = self._alerts()
        below = len(self._console.render_lines(alerts)) + 4
        rows = None if whole else max(1, self._console.height - _HEAD - below - 1)
        table = metrics_table(self._runs, self._metrics, self._console.options, rows=rows)
        self._live.update(Group(table, "", alerts, self._progress), refresh=True)

    def _alerts(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for run in self._runs:
            first = Text(run.name, style="bold")
            if not run.history.active:
                table.add_row(first, Text("no alert", style="green"), "")
            for alert in run.history.active:
                reading = run.history.newest(metric_of(alert.rule) or "")
                now = "" if reading is None else f"now {number(reading.value)}. "
                name = Text(alert.rule, style=_SEVERITIES[alert.severity])
                table.add_row(first, name, f"Since step {alert.step}, {now}{alert.remedy}")
                first = Text("")
        return table
