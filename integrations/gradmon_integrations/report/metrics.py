"""The figure of one metric: all runs on the same axes, the healthy band, and what is missing and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradmon.alerts import default_rules
from gradmon.metrics import OWN
from gradmon.options import known_metrics
from gradmon_integrations.display.states import limits, number, state_of
from gradmon_integrations.report.content import Entry, Figure, in_words, overview, steps_table
from gradmon_integrations.report.lines import Line, line_chart
from gradmon_integrations.report.rundata import RunData
from gradmon_integrations.report.scale import is_logarithmic
from gradmon_integrations.report.series import Series, drawn

SHARES = ("step_share", "batch_share")
"""They are drawn together, as areas."""
SETTINGS = ("learning_rate", "batch_size")
COSTS = ("monitor_overhead", "probe_seconds", "monitor_failures", "sink_errors", "sink_dropped")
_BETTER = {"low": "Low is good.", "high": "High is good.", "middle": "Neither very low nor very high is good."}


def groups(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """The metrics that the runs have, by the question that they help to answer, in the order of `gradmon metrics`."""
    known = known_metrics()
    present = dict.fromkeys(name for run in runs for name in run.series)
    ordered = [*(name for name in known if name in present), *(name for name in present if name not in known)]
    found: dict[str, list[str]] = {}
    for name in ordered:
        if name not in SHARES and name not in COSTS:
            group = "settings" if name in SETTINGS else known[name].group if name in known else "other"
            found.setdefault(group, []).append(name)
    return found


def metric_figure(key: str, name: str, runs: Sequence[RunData], steps: tuple[int, int]) -> Figure:
    """Draw a metric.

    Args:
        key: The figure's id.
        name: The metric.
        runs: The runs; those without it are left out.
        steps: The first and the last step of the page.

    Returns:
        The figure.
    """
    having = [run for run in runs if name in run.series]
    lines = [Line(run.label, run.style, run.series[name], run.ends, run.episodes_about(name)) for run in having]
    band = healthy(name)
    described = f"Steps {steps[0]} to {steps[1]}. {overview(having, [name])} {band}".strip()
    values = [value for line in lines for value in line.series.finite]
    log = is_logarithmic(name, values) and any(value > 0 for value in values)
    return Figure(
        key,
        name,
        line_chart(f"{key}-chart", name, described, lines, limits(name), steps),
        steps_table(name, [(run.label, run.series[name]) for run in having]),
        meaning(name),
        band,
        [_entry(name, run) for run in having],
        [note for run in having for note in _notes(run.label if len(runs) > 1 else "", run.series[name], log)],
    )


def meaning(name: str) -> str:
    """What a metric says, and which end is good."""
    metric = known_metrics().get(name)
    if metric is None:
        return OWN.get(name, "")
    return f"{metric.meaning} {_BETTER.get(metric.better, '')}".strip()


def healthy(name: str) -> str:
    """What the default alert rules say about a metric, in words; empty where they say nothing."""
    found = limits(name)
    above = min([limit.value for limit in found if limit.above], default=None)
    below = max([limit.value for limit in found if not limit.above], default=None)
    words: list[str] = []
    if above is not None and below is not None:
        words.append(f"Healthy: from {number(below)} to {number(above)}.")
    elif above is not None:
        words.append(f"Healthy: up to {number(above)}.")
    elif below is not None:
        words.append(f"Healthy: at least {number(below)}.")
    limited = {limit.rule for limit in found}
    others = [rule.name for rule in default_rules() if getattr(rule, "metric", "") == name and rule.name not in limited]
    if others:
        words.append(f"Judged by its own past as well: {', '.join(others)}.")
    return " ".join(words)


def counted(reasons: Mapping[str, int], total: int) -> str:
    """How many of the readings are no numbers, and why.

    Example:
        >>> counted({"rounding": 17}, 200)
        '17 of 200 not available: rounding'
    """
    missing = sum(reasons.values())
    why = ", ".join(reason if count == missing else f"{reason} ({count})" for reason, count in reasons.items())
    return f"{missing} of {total} not available: {why}"


def _notes(label: str, series: Series, log: bool) -> list[str]:
    head, total, notes = f"{label}: " if label else "", len(series.points), list[str]()
    if series.missing:
        notes.append(f"{head}{counted(series.reasons, total)} (crosses at the lower edge).")
    if series.infinite:
        notes.append(f"{head}{len(series.infinite)} of {total} infinite (triangles at the edge).")
    lower = sum(value <= 0 for value in series.finite)
    if log and lower:
        notes.append(f"{head}{lower} of {total} not above 0, which a logarithmic axis shows at its lower edge.")
    shown = drawn(series)
    if shown.thinned:
        notes.append(f"{head}{shown.points} of {len(series.finite)} points drawn; the lowest and highest are kept.")
    return notes


def _entry(name: str, run: RunData) -> Entry:
    series = run.series[name]
    return Entry(run.label, run.style, in_words(series), state_of(name, series.newest, run.history.active))
