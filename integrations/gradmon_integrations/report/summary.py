"""The head of the page: how each run stands, and what kind of run it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from gradmon.sinks import RunLog
from gradmon_integrations.display.verdict import concerns_gradient, judge
from gradmon_integrations.report.compare import said
from gradmon_integrations.report.content import Table
from gradmon_integrations.report.costs import seconds
from gradmon_integrations.report.rundata import RunData

Level = Literal["good", "note", "bad", "none"]

_WORDS: dict[Level, str] = {"good": "Healthy", "note": "To be watched", "bad": "In trouble", "none": "No verdict"}
_MARKS: dict[Level, str] = {"good": "✓", "note": "!", "bad": "✕", "none": "?"}
_OVER = "raises no serious alert any more, but has raised some."
_BROKEN = "looks in good order as far as it got, but was ended by an exception."


@dataclass(frozen=True)
class Summary:
    """How a run stands.

    Attributes:
        label: The run.
        style: The class of its colour.
        level: ``good``, ``note``, ``bad`` or ``none``.
        word: The level in words.
        mark: The level as a sign.
        title: One sentence.
        reasons: What says so.
        change: What to change; empty where nothing is wrong.
        facts: What kind of run it is.
        ranks: The ranks that are not shown; None where there are none.
    """

    label: str
    style: str
    level: Level
    word: str
    mark: str
    title: str
    reasons: Sequence[str]
    change: str
    facts: Sequence[tuple[str, str]]
    ranks: Table | None


def summarise(run: RunData) -> Summary:
    """Judge a run by all that its file holds."""
    verdict = judge(run.label, run.history)
    level: Level = "none" if verdict is None else verdict.level
    title = f"{run.label} has no numbers, so there is no verdict." if verdict is None else verdict.title
    if level == "good" and any(alert.severity != "info" and concerns_gradient(alert) for alert in run.log.alerts):
        level, title = "note", f"{run.label} {_OVER}"
    if level == "good" and run.log.succeeded is False:
        level, title = "note", f"{run.label} {_BROKEN}"
    return Summary(
        run.label,
        run.style,
        level,
        _WORDS[level],
        _MARKS[level],
        title,
        () if verdict is None else verdict.reasons,
        "" if verdict is None else verdict.change,
        _facts(run),
        _ranks(run),
    )


def ending(log: RunLog) -> str:
    """How a run ended, in words."""
    if log.succeeded is None:
        return "no end recorded (killed, or still running)"
    return "finished" if log.succeeded else "ended by an exception"


def moment(time: float) -> str:
    """A time since 1970, in words; UTC, so that the page says the same wherever it is made."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _facts(run: RunData) -> list[tuple[str, str]]:
    log = run.log
    facts = [("end", ending(log))]
    if log.time:
        facts.append(("began", moment(log.time)))
        if log.ended is not None and log.ended >= log.time:
            facts.append(("took", seconds(log.ended - log.time)))
    if run.steps:
        between = f"{run.steps[0]} to {run.steps[-1]}" if len(run.steps) > 1 else str(run.steps[0])
        facts.append(("steps", f"{between}, {len(run.steps)} of them looked at"))
    facts.append(("readings", f"{len(log.readings):,}"))
    for name in ("model", "parameters", "optimizer", "learning_rate", "device", "version"):
        if name in log.info:
            value = log.info[name]
            told = f"{value:,}" if name == "parameters" and isinstance(value, int) else said(value)
            facts.append(("gradmon" if name == "version" else name.replace("_", " "), told))
    facts.append(("file", str(run.source.path)))
    if run.source.others:
        ranks = ", ".join(str(other.rank) for other in run.source.others)
        facts.append(("rank", f"{log.rank} is shown; also recorded: {ranks}"))
    elif log.rank:
        facts.append(("rank", str(log.rank)))
    return facts


def _ranks(run: RunData) -> Table | None:
    if not run.source.others:
        return None
    rows = [[str(one.rank), f"{len(one.readings):,}", _alerts(one), ending(one)] for one in run.source.others]
    return Table(f"The other ranks of {run.label}", ["rank", "readings", "alerts that fired", "end"], rows)


def _alerts(log: RunLog) -> str:
    return ", ".join(dict.fromkeys(alert.rule for alert in log.alerts if alert.state == "firing")) or "none"
