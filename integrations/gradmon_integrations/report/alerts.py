"""The alerts of a run: when each fired, why, in which layers, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradmon_integrations.report.content import NONE, Figure, Table
from gradmon_integrations.report.episodes import Episode, Fired, by_rule
from gradmon_integrations.report.rundata import RunData
from gradmon_integrations.report.timeline import timeline

_FEW = 4
_MOST_ROWS = 100


@dataclass(frozen=True)
class Telling:
    """What there is to say about a rule.

    Attributes:
        rule: Its name.
        severity: Its severity.
        when: The steps, in words.
        message: What was seen at first.
        blame: The layers, in words; empty where there are none.
        remedy: What to change.
    """

    rule: str
    severity: str
    when: str
    message: str
    blame: str
    remedy: str


@dataclass(frozen=True)
class RunAlerts:
    """The alerts of a run.

    Attributes:
        label: The run.
        figure: The timeline; None where nothing fired.
        told: The rules, the most severe first.
    """

    label: str
    figure: Figure | None
    told: Sequence[Telling]


def alerts_of(run: RunData, steps: tuple[int, int]) -> RunAlerts:
    """Tell of a run's alerts.

    Args:
        run: The run.
        steps: The first and the last step of the page.

    Returns:
        What fired.
    """
    fired = by_rule(run.episodes)
    if not fired:
        return RunAlerts(run.label, None, ())
    told = [_told(one) for one in fired]
    described = " ".join(f"{one.rule} ({one.severity}): {one.when}." for one in told)
    key = f"alerts-{run.place}"
    drawing = timeline(f"{key}-chart", run.label, described, fired, run.ends, steps)
    return RunAlerts(run.label, Figure(key, "When they fired", drawing, _table(run)), told)


def _told(fired: Fired) -> Telling:
    first = fired.episodes[0].alert
    # The message names those of the first time.
    layers = [] if all(f"`{name}`" in first.message for name in fired.layers) else list(fired.layers)
    blame = ", ".join(layers[:_FEW]) + (f" and {len(layers) - _FEW} more" if len(layers) > _FEW else "")
    return Telling(fired.rule, fired.severity, _when(fired.episodes), first.message, blame, first.remedy)


def _when(episodes: Sequence[Episode]) -> str:
    firing = sum(not episode.over for episode in episodes)
    if len(episodes) <= _FEW:
        return "; ".join(dict.fromkeys(episode.steps for episode in episodes))
    begins = [episode.start for episode in episodes if episode.start is not None]
    words = f"{len(episodes)} times, first at step {begins[0]}" if begins else f"{len(episodes)} times"
    return f"{words}; {firing} still firing at the end" if firing else f"{words}; none still firing at the end"


def _table(run: RunData) -> Table:
    rows = [
        [
            one.alert.rule,
            one.alert.severity,
            NONE if one.start is None else str(one.start),
            ("unknown" if one.end is None else str(one.end)) if one.over else "still firing at the end",
            one.alert.layer or NONE,
            one.alert.message,
        ]
        for one in run.episodes[:_MOST_ROWS]
    ]
    counted = f", the first {_MOST_ROWS} of {len(run.episodes)}" if len(run.episodes) > _MOST_ROWS else ""
    head = ["alert", "severity", "fired at step", "resolved at step", "layer", "what was seen"]
    return Table(f"Alerts of {run.label}{counted}", head, rows)
