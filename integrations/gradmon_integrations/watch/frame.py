"""One picture of all runs: how they are getting on, their numbers, and their alerts with the remedies."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmon.metrics import OWN
from gradmon.options import known_metrics
from gradmon_integrations.display.alerts import alerts_table, complaints
from gradmon_integrations.display.states import number
from gradmon_integrations.display.table import metrics_table
from gradmon_integrations.display.words import duration, one_line
from gradmon_integrations.watch.runs import Watched

_FIXED, _COLUMN = 39, 20
_STATE, _NAME = 18, 12
_NUMBERS = 34
"""The columns of the step and of the two times, and what is between the columns."""
_HEADS = ("run", "state", "step", "newest", "began", "model")
_ALWAYS = ("learning_rate", "batch_size", "monitor_overhead")


def frame(
    runs: Sequence[Watched], title: str, console: Console, *, silence: float, rows: int | None, now: float | None = None
) -> RenderableType:
    """The picture.

    Args:
        runs: The runs; those for which there is no column are in the list only.
        title: The first line.
        console: The terminal.
        silence: After how many seconds without a word a run counts as stalled.
        rows: How many rows there are; None for as many as are needed.
        now: The time, in seconds since 1970; None for the clock's.
    """
    now = time.time() if now is None else now
    head = Text(title, style="bold")
    if not runs:
        return head
    columns = max(1, (console.width - _FIXED) // _COLUMN)
    detailed = sorted(runs, key=lambda run: (run.succeeded is None, run.newest or 0.0), reverse=True)[:columns]
    detailed = [run for run in runs if run in detailed and run.history.series]
    histories = {run.label: run.history for run in detailed}
    alerts = alerts_table(histories)
    if rows is not None and len(console.render_lines(alerts)) > rows // 3:
        alerts = alerts_table(histories, brief=True)
    above = Group(head, "", _list(runs, now, silence, console.width), "", alerts, "")
    metrics = _metrics(detailed)
    if not metrics:
        return above
    more = sum(1 for run in runs if run.history.series) - len(detailed)
    told = f"{more} more, for which the terminal is too narrow; --run NAME shows one." if more > 0 else ""
    below = Text(told, style="dim")
    # The table's head and its caption take three rows.
    room = None if rows is None else max(1, rows - len(console.render_lines(above)) - bool(told) - 3)
    table = metrics_table(histories, metrics, console.options, rows=room)
    return Group(above, table, below) if told else Group(above, table)


def _list(runs: Sequence[Watched], now: float, silence: float, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    state = min(_STATE, max(len(one_line(run.state(now, silence)[0])) for run in runs))
    # Where names are long they are cut, and not what is to be known of the run.
    room = width - state - _NUMBERS
    name = max(3, min(max(cell_len(one_line(run.label)) for run in runs), max(_NAME, room - _NAME)))
    most = {"run": name, "model": max(1, room - name)}
    # On a narrow terminal the state is what counts.
    heads = _HEADS[: len(_HEADS) - (width < 60) - (width < 48)]
    for head in heads:
        table.add_column(no_wrap=head != "state", overflow="ellipsis", max_width=most.get(head))
    table.add_row(*(Text(name, style="dim") for name in heads))
    for run in runs:
        state, good = run.state(now, silence)
        newest = "" if run.newest is None else f"{duration(now - run.newest, units=1)} ago"
        began = "" if run.began is None else f"{duration(now - run.began, units=1)} ago"
        about = " ".join(one_line(str(run.info[key])) for key in ("model", "optimizer") if run.info.get(key))
        cells = (
            Text(one_line(run.label), style="bold"),
            Text(one_line(state), style="green" if good else "bold red"),
            Text("" if run.step is None else str(run.step)),
            Text(newest),
            Text(began),
            Text(about),
        )
        table.add_row(*cells[: len(heads)])
    return table


def _metrics(runs: Sequence[Watched]) -> list[str]:
    """What at least one run has, in the order in which the metrics are defined; of the counts what is not 0."""
    found = {name for run in runs for name in run.history.series}
    own = [name for name in OWN if name in _ALWAYS or any(_nonzero(run, name) for run in runs)]
    order = [*known_metrics(), *own]
    others = sorted(found - set(known_metrics()) - set(OWN))
    return [name for name in [*order, *others] if name in found]


def _nonzero(run: Watched, name: str) -> bool:
    reading = run.history.newest(name)
    return reading is not None and reading.value != 0 and name != "probe_seconds"


def line(run: Watched, now: float, silence: float) -> str:
    """One run on one line, for logs and pipes; it changes only when there is something new."""
    loss = run.history.newest("loss")
    firing = ", ".join(complaint.first.rule for complaint in complaints(run.history.active)) or "none"
    parts = [run.label, run.condition(now, silence)[0]]
    parts += [] if run.step is None else [f"step {run.step}"]
    parts += [] if loss is None else [f"loss {number(loss.value)}"]
    return "  ".join(map(one_line, [*parts, f"alerts {firing}"]))
