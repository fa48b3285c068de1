"""The verdict on a run, in words: from its readings and alerts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from gradmon._reading import Alert
from gradmon.metrics import OWN
from gradmon.options import known_metrics
from gradmon_integrations.display.history import History
from gradmon_integrations.display.states import limits, metric_of, number, state_of

Level = Literal["good", "note", "bad"]

_TITLES: dict[Level, str] = {
    "good": "is in good order: its gradient can be trusted.",
    "note": "raises no serious alert, but see below.",
    "bad": "is in trouble: its gradient cannot be trusted.",
}
_SEVERITIES = ("critical", "warning", "info")
_OF_THE_MONITOR = frozenset({"overhead_high", "sink_errors"})
"""Rules that say nothing about the gradient."""
_FEW = 5


@dataclass(frozen=True)
class Verdict:
    """What is to be said about a run.

    Attributes:
        level: ``bad`` with a warning or critical alert on the gradient; ``good`` without any, where numbers keep their
            limits and the loss falls; ``note`` in between.
        title: One line.
        reasons: What says so.
        change: What to change; empty where nothing is wrong.
    """

    level: Level
    title: str
    reasons: tuple[str, ...]
    change: str


def judge(name: str, history: History) -> Verdict | None:
    """The verdict on a run; None where there is no number yet."""
    if not _lost(history) and not history.active and not any(map(history.values, known_metrics())):
        return None
    kept = _within(history)
    loss, falls = _loss(history)
    about_it = list(filter(concerns_gradient, history.active))
    if any(alert.severity != "info" for alert in about_it) or _lost(history):
        level: Level = "bad"
    else:
        level = "good" if kept and falls and not about_it else "note"
    sure = kept if level != "bad" else []
    reasons = [loss, *_firing(history), *_past(history), *sure, *_sources(history)]
    return Verdict(level, f"{name} {_TITLES[level]}", tuple(reasons), " ".join(_remedies(history.active)))


def concerns_gradient(alert: Alert) -> bool:
    """Whether an alert says something about the gradient, rather than about the monitor."""
    return alert.rule not in _OF_THE_MONITOR


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
    return loss is not None and (math.isinf(loss.value) or loss.reason == "non-finite gradient")


def _loss(history: History) -> tuple[str, bool]:
    """Where the loss goes, and whether that is where it should."""
    if _lost(history):
        return "The loss or its gradient is no longer finite.", False
    values = history.values("loss")
    if len(values) < 2 * _FEW:
        return "There are too few readings to say where the loss goes.", True
    before, after = median(values[:_FEW]), median(values[-_FEW:])
    fall, size = before - after, abs(before)  # a loss may be negative
    falls = fall > 0 and fall >= 0.15 * size
    if falls:
        verb = "falls" if fall > 0.4 * size else "falls slowly"
    else:
        verb = "hardly falls" if fall > 0 else "does not fall"
    return f"The loss {verb}: {number(before)} at first, {number(after)} in the end.", falls


def _firing(history: History) -> list[str]:
    lines: list[str] = []
    rules: dict[str, list[Alert]] = {}
    for alert in sorted(history.active, key=_rank):
        rules.setdefault(alert.rule, []).append(alert)
    for alert, *others in rules.values():
        metric = metric_of(alert.rule)
        reading = history.newest(metric or "") if alert.layer is None else None
        found = alert.message
        if metric is not None and reading is not None:
            own = [one for one in limits(metric) if one.rule == alert.rule]
            kept = not math.isnan(reading.value) and not any(one.passed_by(reading.value) for one in own)
            back = ", but only just back within limits" if kept else ""
            limit = "; ".join(f"alert if {one}" for one in own)
            now = f"{metric} is {number(reading.value)}{back} ({limit})." if own else alert.message
            known = known_metrics().get(metric)
            found = f"{now} {OWN.get(metric, '') if known is None else known.meaning}".rstrip()
        more = f" And {len(others)} other{'s' if len(others) > 1 else ''} of this kind." if others else ""
        lines.append(f"{alert.rule} (since step {alert.step}): {found}{more}")
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
    ordered = sorted(alerts, key=_rank)
    found = list(dict.fromkeys(alert.remedy for alert in ordered if alert.remedy))
    return [one for one in found if not any(other != one and other.startswith(one.rstrip(".")) for other in found)]


def _rank(alert: Alert) -> int:
    # A file of a newer version may know a severity that is not known here.
    return _SEVERITIES.index(alert.severity) if alert.severity in _SEVERITIES else len(_SEVERITIES)
