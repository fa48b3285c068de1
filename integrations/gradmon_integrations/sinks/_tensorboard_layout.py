"""The charts of TensorBoard's custom-scalars tab."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradmon._reading import Reading
from gradmon_integrations.sinks._catalogue import metric_group
from gradmon_integrations.sinks._tensorboard_tags import LAYER, LOG10, whole_tag

Layout = dict[str, dict[str, list[object]]]
"""Category to chart to kind and expressions of tags, as `torch.utils.tensorboard.summary.custom_scalars` takes it."""

_OTHER = "others"
_LAYERS = "layers"
_REWRITES = 5

# TensorBoard merges the layouts of all runs chart by chart, and shows two charts of one title where they differ. So a
# chart has the same series in every run, those that were not measured included; only whole charts are left out.
_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "health": {
        "loss": ("loss",),
        "grad_norm: length of the gradient": ("grad_norm",),
        "update_ratio: length of a step over the weights'": ("update_ratio",),
        "param_norm: length of the weights": ("param_norm",),
        "learning_rate": ("learning_rate",),
        "batch_size": ("batch_size",),
        "sharpness, log10": (LOG10 + "sharpness",),
        "stability: above 1 is past SGD's edge": ("stability",),
        "monitor_overhead: part of the time": ("monitor_overhead",),
    },
    "two sources": {
        "step_share, batch_share: what moves the gradient": ("step_share", "batch_share"),
        "step_ratio: above 1 the step is too long": ("step_ratio",),
        "noise_ratio: above 1 the batch is too small": ("noise_ratio",),
    },
    "step-consistency": {
        "weight_condition, log10: at worst": (LOG10 + "weight_condition",),
        "step_condition, log10: along the step": (LOG10 + "step_condition",),
        "weight_cosine, weight_coherence: 1 is best": ("weight_cosine", "weight_coherence"),
        "weight_diversity": ("weight_diversity",),
        "scale_ratio: 1 is smooth, 3 is kinked": ("scale_ratio",),
    },
    "batch-dissonance": {
        "noise_scale, log10: critical batch size": (LOG10 + "noise_scale",),
        "gradient_confusion: 1 is contradiction": ("gradient_confusion",),
        "gradient_coherence: 1 is agreement": ("gradient_coherence",),
        "gradient_rank, input_gradient_rank: 1 is noise": ("gradient_rank", "input_gradient_rank"),
        "gradient_diversity: 1 is orthogonal": ("gradient_diversity",),
        "gradient_snr: signal over noise": ("gradient_snr",),
        "input_condition, log10: at worst": (LOG10 + "input_condition",),
    },
}


class Charts:
    """Knows for which readings there are charts, and whether the layout is behind."""

    def __init__(self) -> None:
        self._names: set[tuple[str, bool]] = set()
        self._behind = False
        self._writes_left = _REWRITES

    def see(self, readings: Iterable[Reading]) -> None:
        """Take note of what there is."""
        names = {(reading.name, reading.layer is not None) for reading in readings}
        if not names <= self._names:
            self._names |= names
            self._behind = True

    def due(self) -> Layout | None:
        """The layout where it has changed: the last one in a run is shown, so it is written whole."""
        if not self._behind or not self._writes_left:
            return None
        self._behind = False
        self._writes_left -= 1
        return layout(self._names)


def layout(names: Iterable[tuple[str, bool]]) -> Layout:
    """The charts for readings that there are.

    Args:
        names: The names of readings, and whether they are of layers.

    Returns:
        The categories that have charts. Names that the core does not know, such as the caller's own metrics, have one
        chart each.
    """
    names = set(names)
    whole = {name for name, layered in names if not layered}
    categories: Layout = {}
    for category, charts in _CHARTS.items():
        present = {
            title: _lines(f"^{re.escape(whole_tag(name))}$" for name in series)
            for title, series in charts.items()
            if whole & {name.removeprefix(LOG10) for name in series}
        }
        if present:
            categories[category] = present
    layered = sorted(name for name, of_layer in names if of_layer)
    if layered:
        categories[_LAYERS] = {f"{name} of each layer": _lines([f"^{re.escape(LAYER + name)}/"]) for name in layered}
    others = sorted(name for name in whole if metric_group(name) == "gradmon")
    if others:
        categories[_OTHER] = {name: _lines([f"^{re.escape(whole_tag(name))}$"]) for name in others}
    return categories


def _lines(expressions: Iterable[str]) -> list[object]:
    return ["Multiline", list(expressions)]
