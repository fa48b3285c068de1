"""The page: what is shown of the runs, in which order, and the template that it is poured into."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradmon_integrations.display.verdict import differences
from gradmon_integrations.report.alerts import alerts_of
from gradmon_integrations.report.compare import results_table, settings_table
from gradmon_integrations.report.content import Figure, in_words, steps_table
from gradmon_integrations.report.costs import cost_table
from gradmon_integrations.report.layers import layers_of
from gradmon_integrations.report.metrics import SHARES, counted, groups, meaning, metric_figure
from gradmon_integrations.report.palette import DARK, LIGHT, variables
from gradmon_integrations.report.rundata import RunData, span_of
from gradmon_integrations.report.runs import Source
from gradmon_integrations.report.shares import share_chart
from gradmon_integrations.report.summary import moment, summarise

GENERATOR = "gradmon report"
"""What the page says it was made by."""
_TITLES = {
    "variance-sources": "Variance sources",
    "step-consistency": "Step-consistency: does the gradient survive the step?",
    "batch-dissonance": "Batch-dissonance: do the examples agree?",
    "health": "Health",
    "settings": "Learning rate and batch size",
    "other": "Other numbers",
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Group:
    """Figures that belong together.

    Attributes:
        key: Its id on the page.
        title: Its heading.
        figures: The figures.
    """

    key: str
    title: str
    figures: Sequence[Figure]


def render(sources: Sequence[Source], title: str) -> str:
    """Make the page.

    Args:
        sources: The runs; at least one.
        title: Its heading.

    Returns:
        HTML that needs no other file.
    """
    runs = [RunData(source, place) for place, source in enumerate(sources)]
    environment = Environment(
        loader=PackageLoader("gradmon_integrations.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    # Characters that HTML does not allow may be in any name or message that a file holds.
    return _UNPRINTABLE.sub("\ufffd", template.render(_content(runs, title)))


def _content(runs: Sequence[RunData], title: str) -> dict[str, Any]:
    steps = span_of(runs)
    found = groups(runs)
    sources = found.pop("variance-sources", [])
    settings = found.pop("settings", [])
    if settings:
        found["settings"] = settings
    several = len(runs) > 1
    cost_figures = [
        metric_figure(f"cost-{place}", name, runs, steps)
        for place, name in enumerate(("monitor_overhead", "probe_seconds"))
        if any(name in run.series for run in runs)
    ]
    return {
        "title": title,
        "generator": GENERATOR,
        "made": moment(time.time()),
        "light": Markup(variables(LIGHT)),
        "dark": Markup(variables(DARK)),
        "several": several,
        "steps": steps,
        "summaries": [summarise(run) for run in runs],
        "settings": settings_table(runs),
        "results": results_table(runs) if several else None,
        "apart": differences(runs[0].history, runs[1].history) if len(runs) == 2 else [],
        "alerts": [alerts_of(run, steps) for run in runs],
        "shares": [_shares(run, steps) for run in runs if SHARES[0] in run.series],
        "sources": _group("variance-sources", sources, runs, steps),
        "groups": [_group(name, names, runs, steps) for name, names in found.items()],
        "layers": layers_of(runs, steps),
        "costs": cost_table(runs),
        "cost_figures": cost_figures,
    }


def _group(name: str, names: Sequence[str], runs: Sequence[RunData], steps: tuple[int, int]) -> Group:
    key = re.sub("[^a-z-]", "-", name)
    figures = [metric_figure(f"{key}-{place}", metric, runs, steps) for place, metric in enumerate(names)]
    return Group(key, _TITLES.get(name, name), figures)


def _shares(run: RunData, steps: tuple[int, int]) -> Figure:
    """The two shares of a run, as areas."""
    series = run.series[SHARES[0]]
    columns = [(name, run.series[name]) for name in SHARES if name in run.series]
    described = " ".join(f"{name}: {in_words(held)}." for name, held in columns)
    notes = [f"{counted(series.reasons, len(series.points))} (gaps)."] if series.missing else []
    key = f"shares-{run.place}"
    chart = share_chart(f"{key}-chart", run.label, described, series, steps)
    about = f"{meaning(SHARES[0])} Below the line the step's part, above it the next batch's. {described}"
    return Figure(key, run.label, chart, steps_table(f"Shares of {run.label}", columns), about, notes=notes)
