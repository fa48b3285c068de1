"""The parts that a page is made of, ready for the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from gradmon_integrations.display.states import number
from gradmon_integrations.report.rundata import RunData
from gradmon_integrations.report.series import Series

NONE = "-"
"""Where there is nothing to say."""
MOST_ROWS = 40
"""A table of more steps than that is not read; the file holds them all."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it holds.
        head: The names of the columns.
        rows: The cells; the first one of each row is its name.
        marked: The places of the rows that stand out; their names say why.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Entry:
    """What a legend says about a run.

    Attributes:
        label: The run.
        style: The class of its colour and kind of line.
        text: Its numbers, in words.
        state: ``fine``, ``beyond``, ``noted``, ``firing``, ``free`` or ``missing``, as `state_of` says.
    """

    label: str
    style: str
    text: str
    state: str = "free"


@dataclass(frozen=True)
class Figure:
    """A drawing with all that belongs to it.

    Attributes:
        key: Its id on the page.
        heading: Its name.
        svg: The drawing.
        about: What it shows.
        band: What is healthy; empty where nothing says so.
        legend: The runs in it.
        notes: What the drawing does not show, or not as it is.
        table: The numbers.
    """

    key: str
    heading: str
    svg: Markup
    table: Table
    about: str = ""
    band: str = ""
    legend: Sequence[Entry] = ()
    notes: Sequence[str] = ()


def in_words(series: Series) -> str:
    """A series in one line."""
    last = series.last
    if last is None:
        return "no number"
    words = f"last {number(last.value)}"
    if math.isnan(series.newest):
        words += f" at step {last.step}"
    # Infinite numbers count: a noise scale is infinite where no signal stands out.
    values = [point.value for point in series.points if not math.isnan(point.value)]
    if (low := min(values)) < (high := max(values)):
        words += f", median {number(median(values))}, from {number(low)} to {number(high)}"
    return words


def chosen(steps: Sequence[int], most: int = MOST_ROWS) -> list[int]:
    """Steps for a table: all, or so many at equal distances, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def steps_table(name: str, columns: Sequence[tuple[str, Series]]) -> Table:
    """The numbers behind a drawing.

    Args:
        name: What they are.
        columns: The series, each with the name of its column.

    Returns:
        One row a step.
    """
    held = [{point.step: point.value for point in series.points} for _, series in columns]
    steps = sorted({step for one in held for step in one})
    rows = [[str(step), *(_cell(one[step]) if step in one else NONE for one in held)] for step in chosen(steps)]
    counted = f"{len(rows)} of {len(steps)} steps" if len(rows) < len(steps) else "all steps"
    return Table(f"{name}, {counted}", ["step", *(label for label, _ in columns)], rows)


def overview(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """What a description says of the runs: one sentence each."""
    return " ".join(
        f"{run.label}: {in_words(run.series[name])}." for run in runs for name in names if name in run.series
    )


def _cell(value: float) -> str:
    return "not available" if math.isnan(value) else number(value)
