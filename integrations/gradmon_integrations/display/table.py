"""The table of all metrics: one row each, one column a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import ConsoleOptions
from rich.table import Table
from rich.text import Text

from gradmon.metrics import OWN
from gradmon.options import known_metrics
from gradmon_integrations.display.history import History
from gradmon_integrations.display.sparkline import ASCII, BLOCKS, sparkline
from gradmon_integrations.display.states import State, limits, state_of, written
from gradmon_integrations.display.words import one_line

STYLES: dict[State, str] = {
    "firing": "bold red",
    "noted": "bold yellow",
    "beyond": "yellow",
    "fine": "green",
    "free": "",
    "missing": "dim",
}
# Beside the colours, for those who do not see them, and for terminals without.
MARKS: dict[State, str] = {"firing": "!", "noted": "!", "beyond": "~"}
_NAME, _GOOD, _ALERT, _NUMBER, _GAP = 21, 6, 8, 8, 2
_LEAST, _MOST = 4, 30
_MONITOR, _OTHERS = "monitor", "others"


def metrics_table(
    histories: Mapping[str, History], metrics: Sequence[str], options: ConsoleOptions, *, rows: int | None = None
) -> Table:
    """The newest number and the course of each metric.

    Args:
        histories: What each run has said, by the run's name.
        metrics: The readings to show; one that is no metric known here comes last, in a group of its own.
        options: What the terminal can do, and its width.
        rows: How many rows there is room for; None for all. Metrics without an alert rule are left out first.

    Returns:
        The table, one section for each group of metrics.
    """
    known = known_metrics()
    kept = _kept(metrics, rows)
    groups: dict[str, list[str]] = {}
    for name in sorted(kept, key=lambda name: (name not in known, name not in OWN)):
        groups.setdefault(_group(name), []).append(name)
    titled = rows is None or len(kept) == len(metrics)
    levels = ASCII if options.ascii_only else BLOCKS
    room = (options.max_width - _NAME - _GOOD - _ALERT - 2 * _GAP) // max(1, len(histories)) - _GAP
    trend = max(_LEAST, min(_MOST, room - _NUMBER - 3))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    table.add_column("metric", no_wrap=True, width=_NAME)
    table.add_column("good", style="dim", no_wrap=True, width=_GOOD)
    table.add_column("alert if", style="dim", no_wrap=True, width=_ALERT)
    for name in histories:
        table.add_column(Text(f" {one_line(name)}"), no_wrap=True, width=_NUMBER + trend + 3)
    for group, names in groups.items():
        if titled:
            table.add_row(Text(group, style="bold"))
        for name in names:
            good = known[name].better if name in known and known[name].better != "none" else ""
            limit = " ".join(f"{'>' if one.above else '<'} {written(name, one.value)}" for one in limits(name)[:1])
            cells = [_cell(history, name, trend, levels) for history in histories.values()]
            shown = one_line(name)
            table.add_row(Text(f"  {shown}" if titled else shown), good, limit, *cells)
    hidden = len(metrics) - len(kept)
    table.caption_justify = "left"
    table.caption = f"{hidden} more, for which the terminal is too low" if hidden else "! alert  ~ past the limit"
    return table


def _cell(history: History, name: str, trend: int, levels: str) -> Text:
    reading = history.newest(name)
    if reading is None:
        return Text("")
    state = state_of(name, reading.value, history.active)
    mark = MARKS.get(state, " ")
    if state == "missing":
        return Text(f"{mark}{'-':>{_NUMBER}}  {one_line(reading.reason or '')[:trend]}", style=STYLES[state])
    course = sparkline([old.value for old in history.series[name][-trend:]], trend, levels)
    cell = Text(f"{mark}{written(name, reading.value):>{_NUMBER}}", style=STYLES[state])
    return cell.append(f"  {course}", style="not bold")


def _kept(metrics: Sequence[str], rows: int | None) -> list[str]:
    if rows is None or len(metrics) + len(_groups(metrics)) <= rows:
        return list(metrics)
    ranked = sorted(metrics, key=lambda name: (name != "loss", not limits(name)))
    kept = set(ranked[: max(1, rows - 1)])
    return [name for name in metrics if name in kept]


def _groups(metrics: Iterable[str]) -> set[str]:
    return {_group(name) for name in metrics}


def _group(name: str) -> str:
    known = known_metrics()
    if name in known:
        return known[name].group
    return _MONITOR if name in OWN else _OTHERS
