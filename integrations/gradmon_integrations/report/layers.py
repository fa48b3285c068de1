"""The layers of a run: a heat map of each number that they have, and a table of the newest ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradmon_integrations.display.states import number
from gradmon_integrations.report.content import NONE, Figure, Table, chosen
from gradmon_integrations.report.heatmap import MOST_LAYERS, heat_map, shade_scale
from gradmon_integrations.report.rundata import RunData
from gradmon_integrations.report.series import Series

_FIRST = ("grad_norm", "update_ratio", "step_share", "batch_share")
_OWN_NUMBERS = ("grad_norm", "update_ratio")
"""Those that are a number of the layer; the others are the layer's part of the whole model's."""
_MOST_STEPS = 8
_MOST_ROWS = 200


@dataclass(frozen=True)
class RunLayers:
    """What there is to see of a run's layers.

    Attributes:
        label: The run.
        maps: The heat maps.
        newest: The newest numbers.
    """

    label: str
    maps: Sequence[Figure]
    newest: Table


def layers_of(runs: Sequence[RunData], steps: tuple[int, int]) -> list[RunLayers]:
    """The runs that have readings of layers; their shades mean the same in all of them."""
    return [RunLayers(run.label, _maps(run, runs, steps), _newest(run)) for run in runs if run.layers]


def _ordered(names: Mapping[str, object]) -> list[str]:
    return [*(name for name in _FIRST if name in names), *(name for name in names if name not in _FIRST)]


def _maps(run: RunData, runs: Sequence[RunData], steps: tuple[int, int]) -> list[Figure]:
    names = _ordered(run.layers)
    return [_figure(f"layers-{run.place}-{place}", name, run, runs, steps) for place, name in enumerate(names)]


def _figure(key: str, name: str, run: RunData, runs: Sequence[RunData], steps: tuple[int, int]) -> Figure:
    layers = run.layers[name]
    shown = _largest(layers)
    values = [value for one in runs for series in one.layers.get(name, {}).values() for value in series.finite]
    log = name in _OWN_NUMBERS
    what = f"{name} of each layer" if log else f"Each layer's part of {name}"
    sizes = sorted(shown, key=lambda layer: -_size(shown[layer]))
    described = f"{what} of {run.label}, steps {steps[0]} to {steps[1]}, {len(shown)} layers. Largest in {sizes[0]}."
    notes: list[str] = []
    if len(shown) < len(layers):
        notes.append(f"{len(shown)} of {len(layers)} layers are shown: those with the largest numbers.")
    if any(value == 0 for series in shown.values() for value in series.finite):
        notes.append("Cells with an outline only: exactly 0.")
    missing = sum(series.missing for series in shown.values())
    if missing:
        total = sum(len(series.points) for series in shown.values())
        notes.append(f"{missing} of {total} not available (empty cells).")
    return Figure(
        key,
        what,
        heat_map(f"{key}-map", f"{what} of {run.label}", described, shown, steps, shade_scale(values, log=log)),
        _table(what, shown),
        notes=notes,
    )


def _largest(layers: Mapping[str, Series]) -> dict[str, Series]:
    """The layers to show, in the model's order."""
    ranked = sorted(layers, key=lambda layer: -_size(layers[layer]))
    kept = set(ranked[:MOST_LAYERS])
    return {layer: series for layer, series in layers.items() if layer in kept}


def _size(series: Series) -> float:
    return max(series.finite, default=-math.inf)


def _table(what: str, layers: Mapping[str, Series]) -> Table:
    held = {layer: {point.step: point.value for point in series.points} for layer, series in layers.items()}
    steps = sorted({step for one in held.values() for step in one})
    columns = chosen(steps, _MOST_STEPS)
    rows = [[layer, *(_cell(one.get(step)) for step in columns)] for layer, one in held.items()]
    counted = f"{len(columns)} of {len(steps)} steps" if len(columns) < len(steps) else "all steps"
    return Table(f"{what}, {counted}", ["layer", *(f"step {step}" for step in columns)], rows)


def _newest(run: RunData) -> Table:
    names = _ordered(run.layers)
    layers = list(dict.fromkeys(layer for name in names for layer in run.layers[name]))
    rows = [
        [layer, *(_cell(run.layers[name][layer].newest if layer in run.layers[name] else None) for name in names)]
        for layer in layers[:_MOST_ROWS]
    ]
    counted = f", the first {_MOST_ROWS} of {len(layers)}" if len(layers) > _MOST_ROWS else ""
    return Table(f"Newest numbers of the layers of {run.label}{counted}", ["layer", *names], rows)


def _cell(value: float | None) -> str:
    if value is None:
        return NONE
    return "not available" if math.isnan(value) else number(value)
