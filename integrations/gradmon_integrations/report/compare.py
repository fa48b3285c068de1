"""Runs side by side: what was set, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from gradmon.options import known_metrics
from gradmon_integrations.display.states import number
from gradmon_integrations.report.content import NONE, Table
from gradmon_integrations.report.rundata import RunData

_LAST = 5
"""How many readings speak for the end of a run."""
_BEST = "★ "


def settings_table(runs: Sequence[RunData]) -> Table | None:
    """What describes the runs, what differs first.

    Args:
        runs: The runs.

    Returns:
        One row for each thing that is known of a run; None where nothing is.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.log.info))
    if not names:
        return None
    rows = [[name, *(said(run.log.info[name]) if name in run.log.info else NONE for run in runs)] for name in names]
    differing = [row for row in rows if _differs([run.log.info.get(row[0], NONE) for run in runs])]
    same = [row for row in rows if row not in differing]
    marked = [[f"{row[0]} (differs)", *row[1:]] for row in differing]
    title = "What was set" if len(runs) == 1 else f"What was set: {len(differing)} of {len(rows)} differ"
    return Table(title, ["setting", *(run.label for run in runs)], [*marked, *same], frozenset(range(len(marked))))


def results_table(runs: Sequence[RunData]) -> Table:
    """The metrics at the end of each run: the median of the last five numbers, the best of them with a star."""
    known = known_metrics()
    rows: list[list[str]] = []
    for name in dict.fromkeys(name for name in known for run in runs if name in run.series):
        ends = [_end(run, name) for run in runs]
        had = [end for end in ends if end is not None]
        better = known[name].better
        best = None
        if len(set(had)) > 1 and better in ("low", "high"):
            best = min(had) if better == "low" else max(had)
        rows.append([name, *(NONE if end is None else f"{_BEST if end == best else ''}{number(end)}" for end in ends)])
    return Table(
        f"At the end: the median of the last {_LAST} numbers; a star where low or high is good, for the best",
        ["metric", *(run.label for run in runs)],
        rows,
    )


def said(value: object) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not available"
    return str(value)


def _differs(values: Sequence[object]) -> bool:
    """Whether values are neither all equal, as 0 and 0.0 are, nor said alike, as NaN is."""
    return any(value != values[0] for value in values) and len(set(map(said, values))) > 1


def _end(run: RunData, name: str) -> float | None:
    values = run.history.values(name)[-_LAST:]
    return median(values) if values else None
