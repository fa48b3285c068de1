"""The kinds of panels that the dashboards are made of, as Grafana's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmon_integrations.dashboards._limits import Limit, thresholds
from gradmon_integrations.dashboards._query import DATASOURCE, Json, Query, targets

WIDTH = 24
"""Of Grafana's grid, in columns."""


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "none",
    log: bool = False,
    limit: Limit | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    stacked: bool = False,
    width: int = 8,
    overrides: Sequence[Json] = (),
) -> Json:
    """A time series, with a dashed line at the alert's limit.

    Args:
        title: What is shown.
        description: What it means and what is healthy.
        queries: What is asked.
        unit: Grafana's name of the unit.
        log: Whether the axis is logarithmic.
        limit: Where the alert begins.
        bounds: Least and largest value of the axis; None for what the data need.
        stacked: Whether the series are stacked.
        width: In columns of the grid.
        overrides: Exceptions for single series.

    Returns:
        The panel.
    """
    custom: Json = {
        "drawStyle": "line",
        "fillOpacity": 60 if stacked else 5,
        "lineWidth": 1,
        "showPoints": "auto",
        "spanNulls": False,
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if limit else "off"},
    }
    # Colours tell the series apart: where the limit is, the dashed line says.
    colors: Json = {"color": {"mode": "palette-classic"}, "thresholds": thresholds(limit)}
    defaults: Json = {"custom": custom, "unit": unit, **colors, **_bounded(bounds)}
    options = {
        "legend": {"calcs": ["lastNotNull"], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, description, queries, defaults, options, width, 8, overrides)


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str = "none",
    limit: Limit | None = None,
    decimals: int | None = None,
    width: int = 3,
) -> Json:
    """The newest value, in the colour of the alert past its limit.

    Args:
        title: What is shown.
        description: What it means and what is healthy.
        query: What is asked.
        unit: Grafana's name of the unit.
        limit: Where the alert begins.
        decimals: How many digits after the point; None for what Grafana finds fit.
        width: In columns of the grid.

    Returns:
        The panel.
    """
    defaults: Json = {"unit": unit, **thresholds_of(limit)}
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "showPercentChange": False,
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    }
    return _panel("stat", title, description, (query,), defaults, options, width, 4)


def heatmap(title: str, description: str, query: Query, *, unit: str = "none", width: int = 12) -> Json:
    """One row a series, its value as a colour.

    Args:
        title: What is shown.
        description: What it means and what is healthy.
        query: What is asked; its legend is the name of the row.
        unit: Grafana's name of the unit.
        width: In columns of the grid.

    Returns:
        The panel.
    """
    options = {
        "calculate": False,
        "cellGap": 0,
        "color": {
            "mode": "scheme",
            "scheme": "Viridis",
            "steps": 64,
            "reverse": False,
            "scale": "exponential",
            "exponent": 0.5,
            "fill": "dark-orange",
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto", "value": title},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
        "yAxis": {"axisPlacement": "left", "reverse": True},
        "cellValues": {"unit": unit, "decimals": 2},
    }
    return _panel("heatmap", title, description, (query,), {"unit": unit}, options, width, 10)


def timeline(
    title: str, description: str, query: Query, *, rename: tuple[str, str], states: Mapping[str, Json], width: int = 24
) -> Json:
    """One row a series, its value as a state.

    Args:
        title: What is shown.
        description: What it means and what is healthy.
        query: What is asked.
        rename: A pattern of series names, and what takes its place.
        states: Grafana's mappings, by value or range.
        width: In columns of the grid.

    Returns:
        The panel.
    """
    mappings = [
        {"type": "value", "options": {"0": states["0"]}},
        {"type": "range", "options": {"from": 1, "to": None, "result": states["1"]}},
    ]
    defaults: Json = {"custom": {"fillOpacity": 80, "lineWidth": 0}, "mappings": mappings, "unit": "none"}
    defaults |= thresholds_of(None)
    options = {
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "never",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    panel = _panel("state-timeline", title, description, (query,), defaults, options, width, 9)
    pattern, replacement = rename
    panel["transformations"] = [
        {"id": "renameByRegex", "options": {"regex": pattern, "renamePattern": replacement}},
    ]
    return panel


def table(
    title: str,
    description: str,
    *queries: Query,
    columns: Mapping[str, str],
    hidden: Sequence[str] = (),
    overrides: Sequence[Json] = (),
    width: int = 24,
    height: int = 8,
) -> Json:
    """One row for each set of labels, one column for each label and query.

    Args:
        title: What is shown.
        description: What it means and what is healthy.
        queries: What is asked.
        columns: The columns' titles, in their order, by label or ``Value #A``.
        hidden: Columns that are left out.
        overrides: Exceptions for single columns, by their titles.
        width: In columns of the grid.
        height: In rows of the grid.

    Returns:
        The panel.
    """
    defaults: Json = {"custom": {"align": "auto", "filterable": True}, "unit": "none", **thresholds_of(None)}
    options = {"cellHeight": "sm", "frameIndex": 0, "showHeader": True}
    panel = _panel("table", title, description, queries, defaults, options, width, height, overrides)
    organize = {
        "excludeByName": dict.fromkeys(hidden, True),
        "indexByName": {name: place for place, name in enumerate(columns)},
        "renameByName": dict(columns),
    }
    panel["transformations"] = [{"id": "merge", "options": {}}, {"id": "organize", "options": organize}]
    return panel


def override(name: str, **properties: Any) -> Json:
    """An exception for the series or the column of one name: its unit, thresholds, ..., dots written as ``__``."""
    held = [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()]
    return {"matcher": {"id": "byName", "options": name}, "properties": held}


def thresholds_of(limit: Limit | None) -> Json:
    """The colours of a panel or of a column."""
    mode = "palette-classic" if limit is None else "thresholds"
    return {"color": {"mode": mode}, "thresholds": thresholds(limit)}


def _bounded(bounds: tuple[float | None, float | None]) -> Json:
    return {name: bound for name, bound in zip(("min", "max"), bounds, strict=True) if bound is not None}


def _panel(
    kind: str,
    title: str,
    description: str,
    queries: tuple[Query, ...],
    defaults: Json,
    options: Json,
    width: int,
    height: int,
    overrides: Sequence[Json] = (),
) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": list(overrides)},
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        "options": options,
        "targets": targets(queries),
    }
