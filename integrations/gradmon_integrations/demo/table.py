"""The table of all metrics: one row each, one column a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import ConsoleOptions
from rich.table import Table
from rich.text import Text

from gradmon.options import known_metrics
from gradmon_integrations.demo.history import History
from gradmon_integrations.demo.runs import Run
from gradmon_integrations.demo.sparkline import ASCII, BLOCKS, sparkline
from gradmon_integrations.demo.states import State, limits, number, state_of

_STYLES: dict[State, str] = {
    "firing": "bold red",
    "noted": "bold yellow",
    "beyond": "yellow",
    "fine": "green",
    "free": "",
    "missing": "dim",
}
# Beside the colours, for those who do not see them, and for terminals without.
_MARKS: dict[State, str] = {"firing": "!", "noted": "!", "beyond": "~"}
_NAME, _GOOD, _ALERT, _NUMBER, _GAP = 21, 6, 8, 8, 2
_LEAST, _MOST = 4, 30


def metrics_table(runs: Sequence[Run], metrics: Sequence[str], options: ConsoleOptions, *, rows: int | None) -> Table:
    """The newest number and the course of each metric.

    Args:
        runs: The runs.
        metrics: The metrics.
        options: What the terminal can do, and its width.
        rows: How many rows there is room for; None for all. Metrics without an alert rule are left out first.

    Returns:
        The table, one section for each group of metrics.
    """
    known = known_metrics()
    kept = _kept(metrics, rows)
    groups: dict[str, list[str]] = {}
    for name in kept:
        groups.setdefault(known[name].group, []).append(name)
    titled = rows is None or len(kept) == len(metrics)
    levels = ASCII if options.ascii_only else BLOCKS
    room = (options.max_width - _NAME - _GOOD - _ALERT - 2 * _GAP) // len(runs) - _GAP
    trend = max(_LEAST, min(_MOST, room - _NUMBER - 3))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    table.add_column("metric", no_wrap=True, width=_NAME)
    table.add_column("good", style="dim", no_wrap=True, width=_GOOD)
    table.add_column("alert if", style="dim", no_wrap=True, width=_ALERT)
    for run in runs:
        table.add_column(f" {run.name}", no_wrap=True, width=_NUMBER + trend + 3)
    for group, names in groups.items():
        if titled:
            table.add_row(Text(group, style="bold"))
        for name in names:
            good = "" if known[name].better == "none" else known[name].better
            limit = ", ".join(map(str, limits(name)[:1]))
            cells = [_cell(run.history, name, trend, levels) for run in runs]
            table.add_row(f"  {name}" if titled else name, good, limit, *cells)
    hidden = len(metrics) - len(kept)
    table.caption_justify = "left"
    table.caption = f"{hidden} more, for which the terminal is too low" if hidden else "! alert  ~ past the limit"
    return table


def _cell(history: History, name: str, trend: int, levels: str) -> Text:
    reading = history.newest(name)
    if reading is None:
        return Text("")
    state = state_of(name, reading.value, history.active)
    mark = _MARKS.get(state, " ")
    if state == "missing":
        return Text(f"{mark}{'-':>{_NUMBER}}  {(reading.reason or '')[:trend]}", style=_STYLES[state])
    course = sparkline([old.value for old in history.series[name][-trend:]], trend, levels)
    cell = Text(f"{mark}{number(reading.value):>{_NUMBER}}", style=_STYLES[state])
    return cell.append(f"  {course}", style="not bold")


def _kept(metrics: Sequence[str], rows: int | None) -> list[str]:
    groups = {known_metrics()[name].group for name in metrics}
    if rows is None or len(metrics) + len(groups) <= rows:
        return list(metrics)
    ranked = sorted(metrics, key=lambda name: (name != "loss", not limits(name)))
    kept = set(ranked[: max(1, rows - 1)])
    return [name for name in metrics if name in kept]
