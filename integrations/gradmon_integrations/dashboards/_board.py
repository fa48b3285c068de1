"""A whole dashboard: rows of panels, laid out from left to right; variables, annotations, links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gradmon_integrations.dashboards._panels import WIDTH
from gradmon_integrations.dashboards._query import DATASOURCE, Json


class Row(NamedTuple):
    """Panels under a heading that can be folded.

    Attributes:
        title: The heading.
        panels: In reading order; one that does not fit beside the others begins a new line.
    """

    title: str
    panels: Sequence[Json]


def board(uid: str, title: str, description: str, *, variables: Sequence[Json], rows: Sequence[Row]) -> Json:
    """The dashboard.

    Args:
        uid: By which links find it.
        title: Its name.
        description: What it answers.
        variables: What can be chosen at its top.
        rows: What it shows.

    Returns:
        Grafana's JSON.
    """
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["gradmon"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "fiscalYearStartMonth": 0,
        "weekStart": "",
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timepicker": {},
        "links": [_other_boards()],
        "annotations": {"list": [_alerts(), _own_alerts()]},
        "templating": {"list": [_datasource(), *variables]},
        "panels": _laid_out(rows),
    }


def variable(name: str, label: str, source: str, *, multi: bool) -> Json:
    """A variable whose values are asked for.

    Args:
        name: Its name in expressions.
        label: What is written beside it.
        source: Such as ``label_values(gradmon_last_step, run)``.
        multi: Whether several values, and all of them, can be chosen.

    Returns:
        The variable.
    """
    held: Json = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": source, "refId": f"variable-{name}"},
        "hide": 0,
        "includeAll": multi,
        "multi": multi,
        "options": [],
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 3,
    }
    if multi:
        held["allValue"] = ".*"
        held["current"] = {"selected": True, "text": ["All"], "value": ["$__all"]}
    return held


def _datasource() -> Json:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }


def _alerts() -> Json:
    return _annotation("Firing in Prometheus", "red", 'ALERTS{alertstate="firing", run=~"$run"}', "{{alertname}}", True)


def _own_alerts() -> Json:
    """Off at first: what the process finds out, Prometheus repeats a little later."""
    firing = '{__name__=~"gradmon_alert_.+", run=~"$run"} > 0'
    expr = f'label_replace({firing}, "rule", "$1", "__name__", "gradmon_alert_(.+)")'
    return _annotation("Firing in the process", "orange", expr, "{{rule}}", False)


def _annotation(name: str, color: str, expr: str, title: str, enable: bool) -> Json:
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": enable,
        "hide": False,
        "iconColor": color,
        "target": {"expr": expr, "interval": "30s", "refId": "Anno"},
        "tagKeys": "run,rank",
        "textFormat": "run {{run}}, rank {{rank}}",
        "titleFormat": title,
        "useValueForTime": False,
    }


def _other_boards() -> Json:
    return {
        "asDropdown": False,
        "icon": "external link",
        "includeVars": False,
        "keepTime": True,
        "tags": ["gradmon"],
        "targetBlank": False,
        "title": "gradmon",
        "tooltip": "",
        "type": "dashboards",
        "url": "",
    }


def _laid_out(rows: Sequence[Row]) -> list[Json]:
    """The panels of all rows with their places and numbers."""
    placed: list[Json] = []
    top = 0
    for row in rows:
        heading = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        placed.append({**heading, "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}})
        top, left, tallest = top + 1, 0, 0
        for panel in row.panels:
            size = panel["gridPos"]
            if left + size["w"] > WIDTH:
                top, left, tallest = top + tallest, 0, 0
            placed.append({**panel, "gridPos": {**size, "x": left, "y": top}})
            left, tallest = left + size["w"], max(tallest, size["h"])
        top += tallest
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]
