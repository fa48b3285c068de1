"""The verdict on a run, in words: from its readings and alerts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from gradmon._reading import Alert
from gradmon.measure import known_metrics
from gradmon_integrations.demo.history import History
from gradmon_integrations.demo.states import limits, metric_of, number, state_of

Level = Literal["good", "note", "bad"]

_TITLES: dict[Level, str] = {
    "good": "is in good order: its gradient can be trusted.",
    "note": "is in good order, with a note.",
    "bad": "is in trouble: its gradient cannot be trusted.",
}
_SEVERITIES = ("critical", "warning", "info")
_FEW = 5


@dataclass(frozen=True)
class Verdict:
    """What is to be said about a run.

    Attributes:
        level: ``good``, ``note`` (nothing worse than an alert of severity info) or ``bad``.
        title: One line.
        reasons: What says so.
        change: What to change; empty where nothing is wrong.
    """

    level: Level
    title: str
    reasons: tuple[str, ...]
    change: str


def judge(name: str, history: History) -> Verdict | None:
    """The verdict on a run; None before its first reading."""
    if not history.series:
        return None
    serious = any(alert.severity != "info" for alert in history.active)
    level: Level = "bad" if serious or _lost(history) else "note" if history.active else "good"
    kept = _within(history) if level != "bad" else []
    reasons = [_loss(history), *_firing(history), *_past(history), *kept, *_sources(history)]
    return Verdict(level, f"{name} {_TITLES[level]}", tuple(reasons), " ".join(_remedies(history.active)))


def differences(first: History, second: History, most: int = 5) -> list[str]:
    """The metrics in which two runs are furthest apart, by the ratio of their medians, furthest first.

    Only metrics are compared of which low or high is good, which are positive and finite in both runs, and which do not
    depend on the units of loss and weights.
    """
    apart: list[tuple[float, str]] = []
    for name, metric in known_metrics().items():
        pair = [median(values) if (values := history.values(name)) else 0.0 for history in (first, second)]
        if (
            metric.better in ("low", "high")
            and metric.group != "health"
            and all(0 < value < math.inf for value in pair)
        ):
            text = f"{name} {number(pair[0])} against {number(pair[1])} ({metric.better} is good)"
            apart.append((abs(math.log(pair[0] / pair[1])), text))
    return [text for _, text in sorted(apart, reverse=True)[:most]]


def _lost(history: History) -> bool:
    loss = history.newest("loss")
    return loss is not None and not math.isfinite(loss.value)


def _loss(history: History) -> str:
    if _lost(history):
        return "The loss is no longer a finite number."
    values = history.values("loss")
    if len(values) < 2 * _FEW:
        return "There are too few readings to say where the loss goes."
    before, after = median(values[:_FEW]), median(values[-_FEW:])
    verb = "falls" if after < 0.6 * before else "falls slowly" if after < 0.85 * before else "hardly falls"
    if after > before:
        verb = "does not fall"
    return f"The loss {verb}: {number(before)} at first, {number(after)} in the end."


def _firing(history: History) -> list[str]:
    lines: list[str] = []
    for alert in sorted(history.active, key=lambda one: _SEVERITIES.index(one.severity)):
        metric = metric_of(alert.rule)
        reading = history.newest(metric or "")
        if metric is None or reading is None:
            lines.append(f"{alert.rule} (since step {alert.step}): {alert.message}")
            continue
        limit = "; ".join(f"alert if {one}" for one in limits(metric) if one.rule == alert.rule)
        meaning = known_metrics()[metric].meaning
        lines.append(
            f"{alert.rule} (since step {alert.step}): {metric} is {number(reading.value)} ({limit}). {meaning}"
        )
    return lines


def _past(history: History) -> list[str]:
    active = {(alert.rule, alert.layer) for alert in history.active}
    gone = dict.fromkeys(one.rule for one in history.alerts if (one.rule, one.layer) not in active)
    return [f"Came and went: {', '.join(gone)}."] if gone else []


def _within(history: History) -> list[str]:
    """The numbers that have an upper limit and keep it."""
    kept = [
        f"{name} {number(reading.value)} (alert if {limits(name)[0]})"
        for name in history.series
        if (reading := history.newest(name))
        and limits(name)[:1]
        and limits(name)[0].above
        and state_of(name, reading.value, history.active) == "fine"
    ]
    return [f"Within limits: {', '.join(kept)}."] if kept else []


def _sources(history: History) -> list[str]:
    shares = history.values("step_share")
    if not shares:
        return []
    share = median(shares)
    if share > 2 / 3:
        words = "mostly the step, so the learning rate is the lever"
    elif share < 1 / 3:
        words = "mostly the next batch, so the batch size is the lever"
    else:
        words = "the step about as much as the next batch"
    return [f"What changes the gradient from one step to the next: {words} (median step_share {number(share)})."]


def _remedies(alerts: Sequence[Alert]) -> list[str]:
    """Each remedy once, the most severe first, without those that another one begins with."""
    ordered = sorted(alerts, key=lambda one: _SEVERITIES.index(one.severity))
    found = list(dict.fromkeys(alert.remedy for alert in ordered if alert.remedy))
    return [one for one in found if not any(other != one and other.startswith(one.rstrip(".")) for other in found)]
