"""Active alerts in words: the most severe first, and one for all layers of which a rule complains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from gradmon._reading import Alert, Severity
from gradmon_integrations.display.history import History
from gradmon_integrations.display.states import metric_of, written
from gradmon_integrations.display.words import one_line

SEVERITIES: dict[Severity, str] = {"critical": "bold red", "warning": "red", "info": "yellow"}
"""How each severity is drawn, the most severe first."""

_NAMED = 3


class Complaint(NamedTuple):
    """All alerts of one rule.

    Attributes:
        first: The oldest of them.
        places: The layers they are about; those that are blamed where it is the whole model.
    """

    first: Alert
    places: tuple[str, ...]


def complaints(active: Sequence[Alert]) -> list[Complaint]:
    """The active alerts, by rule, the most severe first."""
    order: dict[str, int] = {severity: place for place, severity in enumerate(SEVERITIES)}
    # A file of a newer version, or a rule of the user's own, may know others.
    ranked = sorted(active, key=lambda alert: (order.get(alert.severity, len(order)), alert.rule))
    found: list[Complaint] = []
    for _, same in groupby(ranked, key=lambda alert: alert.rule):
        alerts = sorted(same, key=lambda alert: alert.step or 0)
        layers = [alert.layer for alert in alerts if alert.layer is not None]
        found.append(Complaint(alerts[0], tuple(layers) or alerts[0].blame))
    return found


def in_words(complaint: Complaint, history: History, *, brief: bool = False) -> Text:
    """The rule and the remedy; unless it is to be brief also since when, where, and the number now."""
    alert, parts = complaint.first, []
    if brief:
        text = Text(one_line(alert.rule), style=SEVERITIES.get(alert.severity, "red"))
        return text.append(f": {one_line(alert.remedy)}", style="not bold default") if alert.remedy else text
    if alert.step is not None:
        parts.append(f"since step {alert.step}")
    metric = metric_of(alert.rule)
    reading = history.newest(metric) if metric is not None and alert.layer is None else None
    if metric is not None and reading is not None:
        parts.append(f"{metric} now {written(metric, reading.value)}")
    if complaint.places:
        parts.append(f"{'in' if alert.layer is not None else 'mostly in'} {names(complaint.places)}")
    text = Text(one_line(alert.rule), style=SEVERITIES.get(alert.severity, "red"))
    text.append(f" {one_line(', '.join(parts))}.", style="not bold default")
    return text.append(f" {one_line(alert.remedy)}", style="not bold default") if alert.remedy else text


def alerts_table(histories: Mapping[str, History], *, brief: bool = False) -> Table:
    """The active alerts of each run, by the run's name, with their remedies.

    Args:
        histories: What each run has said.
        brief: Whether each alert is to take one row, with as much of its remedy as there is room for.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, history in histories.items():
        first = Text(one_line(name), style="bold")
        found = complaints(history.active)
        if not found:
            table.add_row(first, "", Text("no alert", style="green"))
        for complaint in found:
            mark = Text("!", style=SEVERITIES.get(complaint.first.severity, "red"))
            words = in_words(complaint, history, brief=brief)
            # Of the text, not of the column: columns that do not wrap are made narrower together.
            words.no_wrap, words.overflow = brief, "ellipsis" if brief else "fold"
            table.add_row(first, mark, words)
            first = Text("")
    return table


def line(alert: Alert) -> Text:
    """One change of an alert, for a log."""
    where = f" in {alert.layer}" if alert.layer else ""
    text = Text()
    if alert.state == "resolved":
        text.append(one_line(f"{alert.rule} resolved{where}"), style="green")
        return text.append(f": {one_line(alert.message)}")
    text.append(one_line(f"{alert.severity} {alert.rule}{where}"), style=SEVERITIES.get(alert.severity, "red"))
    return text.append(f": {one_line(f'{alert.message} {alert.remedy}')}")


def names(found: Iterable[str]) -> str:
    """At most three names, and how many more there are."""
    all_of_them = list(found)
    more = len(all_of_them) - _NAMED
    return ", ".join(all_of_them[:_NAMED]) + (f" and {more} more" if more > 0 else "")
