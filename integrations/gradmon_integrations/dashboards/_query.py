"""What a panel asks Prometheus."""

from __future__ import annotations

from typing import Any, NamedTuple

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


class Query(NamedTuple):
    """One query of a panel.

    Attributes:
        expr: The PromQL expression, with Grafana's variables.
        legend: The name of its series, such as ``rank {{rank}}``.
        instant: Whether only the newest values are asked for.
        table: Whether the labels become columns.
        exemplar: Whether the steps of single probes are shown as points beside the lines.
    """

    expr: str
    legend: str = ""
    instant: bool = False
    table: bool = False
    exemplar: bool = False

    def json(self, reference: str) -> Json:
        """As Grafana's Prometheus data source wants it, under a letter that is unique in the panel."""
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "exemplar": self.exemplar,
            "expr": self.expr,
            "format": "table" if self.table else "time_series",
            "instant": self.instant,
            "legendFormat": self.legend or "__auto",
            "range": not self.instant,
            "refId": reference,
        }


def targets(queries: tuple[Query, ...]) -> list[Json]:
    """The queries of one panel, lettered from A."""
    return [query.json(chr(ord("A") + number)) for number, query in enumerate(queries)]
