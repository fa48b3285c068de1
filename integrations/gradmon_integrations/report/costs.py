"""What watching took, and what went wrong in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from gradmon_integrations.display.states import number
from gradmon_integrations.report.content import NONE, Table
from gradmon_integrations.report.rundata import RunData


def cost_table(runs: Sequence[RunData]) -> Table:
    """One column a run.

    Args:
        runs: The runs.

    Returns:
        How often and how long the monitor looked, its time over the training's, and its failures.
    """
    rows = [
        ["steps looked at", *(str(len(run.steps)) for run in runs)],
        ["time of all looks", *(_total(run) for run in runs)],
        ["its time over the training's, median", *(_percent(run, largest=False) for run in runs)],
        ["its time over the training's, largest", *(_percent(run, largest=True) for run in runs)],
        ["failures inside the monitor", *(_count(run, "monitor_failures") for run in runs)],
        ["failures of sinks", *(_count(run, "sink_errors") for run in runs)],
        ["dropped because a sink was too slow", *(_count(run, "sink_dropped") for run in runs)],
    ]
    return Table("What the monitor cost", ["", *(run.label for run in runs)], rows)


def seconds(duration: float) -> str:
    """A duration in words.

    Example:
        >>> seconds(4000), seconds(75), seconds(1.23)
        ('1 h 6 min', '1 min 15 s', '1.23 s')
    """
    if duration >= 3600:
        return f"{int(duration // 3600)} h {int(duration % 3600 // 60)} min"
    return f"{int(duration // 60)} min {int(duration % 60)} s" if duration >= 60 else f"{number(duration)} s"


def _total(run: RunData) -> str:
    values = [value for value in run.history.values("probe_seconds") if math.isfinite(value)]
    return seconds(sum(values)) if values else NONE


def _percent(run: RunData, *, largest: bool) -> str:
    series = run.series.get("monitor_overhead")
    if not series or not series.finite:
        return NONE
    return f"{number(100 * (max(series.finite) if largest else median(series.finite)))} %"


def _count(run: RunData, name: str) -> str:
    """The count so far, which begins anew where the run was resumed without its monitor's state."""
    series = run.series.get(name)
    return f"{max(series.finite):.0f}" if series and series.finite else NONE
