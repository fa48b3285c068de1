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
from gradmon_integrations.demo.view import Tone
from gradmon_integrations.display.alerts import alerts_table
from gradmon_integrations.display.table import metrics_table

_TONES: dict[Tone, str] = {"title": "bold", "good": "bold green", "note": "bold yellow", "bad": "bold red"}
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
        histories = {run.name: run.history for run in self._runs}
        alerts = alerts_table(histories)
        below = len(self._console.render_lines(alerts)) + 4
        rows = None if whole else max(1, self._console.height - _HEAD - below - 1)
        table = metrics_table(histories, self._metrics, self._console.options, rows=rows)
        self._live.update(Group(table, "", alerts, self._progress), refresh=True)
