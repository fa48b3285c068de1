"""What a run says on a few lines: the panel, and the one line that takes its place among other programs' bars."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.containers import Lines
from rich.text import Text

from gradmon_integrations.display.alerts import Complaint, complaints, in_words
from gradmon_integrations.display.history import History
from gradmon_integrations.display.sparkline import ASCII, BLOCKS, sparkline
from gradmon_integrations.display.states import state_of, written
from gradmon_integrations.display.table import MARKS, STYLES
from gradmon_integrations.display.words import one_line

HIGHEST = 10
_PREFERRED = (
    "loss",
    "step_ratio",
    "noise_ratio",
    "weight_condition",
    "step_condition",
    "grad_norm",
    "update_ratio",
    "gradient_confusion",
)
_LAST = "monitor_overhead"
_SHOWN = 6
_LABEL, _NUMBER, _TREND, _GAP = 16, 8, 24, 2
_LEAST = 1 + _LABEL + 1 + _NUMBER + _GAP
_COLUMN = 38


def panel(title: str, state: str, history: History, console: Console, width: int, height: int) -> list[Text]:
    """The newest numbers with their course, and the active alerts with their remedies.

    Args:
        title: What is watched.
        state: What stands on the right of the title.
        history: What the monitor has said.
        console: What can be drawn.
        width: How many columns there are.
        height: How many rows there may be.

    Returns:
        At most `height` lines, none wider than `width`.
    """
    ascii_only = console.options.ascii_only
    shown = chosen(history)
    columns = max(1, min(3, width // _COLUMN, len(shown)))
    rows = -(-len(shown) // columns)
    kept = min(rows, max(1, height - 2))
    cells = [_cell(name, history, width // columns - _GAP, ASCII if ascii_only else BLOCKS) for name in shown]
    lines = [_headline(title, state, width, "-" if ascii_only else "─")]
    for row in range(kept):
        line = Text()
        for cell in cells[row * columns : (row + 1) * columns]:
            line.append_text(cell).append(" " * _GAP)
        line.rstrip()
        lines.append(line)
    lines += _alerts(history, console, width, height - len(lines))
    for line in lines:
        line.truncate(width)
    return lines[: max(1, height)]


def compact(title: str, history: History, end: str = "", width: int | None = None) -> Text:
    """The newest numbers and the names of the active alerts on one line.

    Args:
        title: What is watched.
        history: What the monitor has said.
        end: What comes last.
        width: The cells there are room for, in which as many numbers are shown as fit; None for all.
    """
    firing = complaints(history.active)
    rest = _names([one_line(one.first.rule) for one in firing], None if width is None else width // 2)
    if end:
        rest.append(f"  {end}")
    text = Text(title)
    for name in chosen(history):
        reading = history.newest(name)
        if reading is None:
            continue
        state = state_of(name, reading.value, history.active)
        part = Text(f"  {_label(name)} ").append(written(name, reading.value), style=STYLES[state])
        if width is None or text.cell_len + part.cell_len + rest.cell_len <= width:
            text.append_text(part)
    return text.append_text(rest)


def _names(rules: Sequence[str], width: int | None) -> Text:
    """The names of the alerts, as many as there is room for."""
    if not rules:
        return Text("  ").append("no alert", style="green")
    for kept in range(len(rules), 1, -1):
        text = _some(rules, kept)
        if width is None or text.cell_len <= width:
            return text
    return _some(rules, 1)


def _some(rules: Sequence[str], kept: int) -> Text:
    more = f" and {len(rules) - kept} more" if kept < len(rules) else ""
    return Text("  alerts ").append(", ".join(rules[:kept]) + more, style="bold red")


def hanging(words: Text, console: Console, width: int) -> Text:
    """A paragraph whose lines but the first are indented, and none of which is wider than `width`."""
    rows = words.wrap(console, max(1, width - 2))
    return Text("\n  ").join(rows)


def chosen(history: History) -> list[str]:
    """The readings for which there is room, those that tell most first."""
    found = [name for name in _PREFERRED if name in history.series]
    others = [name for name in history.series if name not in _PREFERRED and state_of(name, 1.0, ()) != "free"]
    last = [_LAST] if _LAST in history.series else []
    return [*dict.fromkeys([*found, *others])][: _SHOWN - len(last)] + last


def _label(name: str) -> str:
    return "overhead" if name == _LAST else one_line(name)


def _cell(name: str, history: History, width: int, levels: str) -> Text:
    reading = history.newest(name)
    label = _label(name)[:_LABEL]
    if reading is None:
        return Text(" " * width)
    state = state_of(name, reading.value, history.active)
    style = STYLES[state]
    text = Text(f"{MARKS.get(state, ' ')} ", style=style).append(f"{label:<{_LABEL}} ", style="not bold default")
    text.append(f"{written(name, reading.value):>{_NUMBER}}", style=style)
    room = min(_TREND, width - _LEAST - 2)
    if room > 0:
        course = sparkline([old.value for old in history.series[name][-room:]], room, levels)
        text.append(f" {course:<{room}}", style=f"{style} not bold")
    return text


def _headline(title: str, state: str, width: int, dash: str) -> Text:
    text = Text(f"{dash * 2} {title} ", style="bold")
    room = width - cell_len(text.plain) - cell_len(state) - 4
    if room > 0:
        text.append(dash * room, style="not bold dim").append(f" {state} {dash * 2}", style="not bold dim")
    return text


def _alerts(history: History, console: Console, width: int, room: int) -> list[Text]:
    if room <= 0:
        return []
    found = complaints(history.active)
    if not found:
        return [Text("  no alert", style="green")]
    if len(found) > room:
        more = Text(f"  and {len(found) - room + 1} more alerts", style="red")
        return [*_told(found[: room - 1], history, console, width, room - 1), more]
    return _told(found, history, console, width, room)


def _told(found: Sequence[Complaint], history: History, console: Console, width: int, room: int) -> list[Text]:
    """Each alert in the rows that it gets, in turn, of those that there are: in full where they suffice."""
    width = max(1, width - 4)
    full = [in_words(complaint, history).wrap(console, width) for complaint in found]
    rows = [1] * len(found)
    left = room - len(found)
    while left > 0 and any(got < len(lines) for got, lines in zip(rows, full, strict=True)):
        for place, lines in enumerate(full):
            if left > 0 and rows[place] < len(lines):
                rows[place], left = rows[place] + 1, left - 1
    told: list[Text] = []
    for complaint, lines, got in zip(found, full, rows, strict=True):
        if got < len(lines):
            lines = _cut(in_words(complaint, history, brief=True).wrap(console, width), got, width)
        told += [Text.assemble("  " if place else "! ", line) for place, line in enumerate(lines)]
    return told


def _cut(lines: Lines, rows: int, width: int) -> Sequence[Text]:
    """The first rows of a paragraph, the last of them with an ellipsis if there were more."""
    if len(lines) <= rows:
        return list(lines)
    for line in lines:
        line.rstrip()
    rest = Text(" ").join(lines[rows - 1 :])
    rest.truncate(width, overflow="ellipsis")
    return [*lines[: rows - 1], rest]


def clock() -> str:
    """The time of day, by which a panel that no longer moves can be told from one that does."""
    return time.strftime("%H:%M:%S")
