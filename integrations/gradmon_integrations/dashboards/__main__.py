"""Writes the dashboards' JSON beside their builders: `python -m gradmon_integrations.dashboards`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gradmon_integrations.dashboards._query import Json
from gradmon_integrations.dashboards.fleet import fleet_dashboard
from gradmon_integrations.dashboards.run import run_dashboard

DASHBOARDS: dict[str, Callable[[], Json]] = {
    "gradmon-fleet.json": fleet_dashboard,
    "gradmon-run.json": run_dashboard,
}
"""What is built, by the name of its file."""

FOLDER = Path(__file__).parent / "files" / "grafana" / "dashboards"


def text(build: Callable[[], Json]) -> str:
    """The text of the file that a builder's dashboard is kept in."""
    return json.dumps(build(), indent=2) + "\n"


if __name__ == "__main__":
    for name, build in DASHBOARDS.items():
        (FOLDER / name).write_text(text(build), encoding="utf-8")
