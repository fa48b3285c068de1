"""Where the alerts begin, for the colours of the panels; and what is healthy, in words."""

from __future__ import annotations

from typing import Any, NamedTuple

from gradmon.metrics import METRICS

Json = dict[str, Any]

COLORS = {"info": "blue", "warning": "orange", "critical": "red"}
_GOOD = "green"


class Limit(NamedTuple):
    """Where a number begins to be bad.

    Attributes:
        severity: That of the alert.
        above: What is above is bad; None where nothing is too large.
        below: What is below is bad; None where nothing is too small.
    """

    severity: str
    above: float | None = None
    below: float | None = None


LIMITS = {
    "grad_norm": Limit("warning", below=1e-7),
    "weight_condition": Limit("warning", above=1e3),
    "step_ratio": Limit("warning", above=1.0),
    "noise_ratio": Limit("info", above=10.0),
    "gradient_confusion": Limit("warning", above=0.9),
    "update_ratio": Limit("warning", above=0.1, below=1e-8),
    "monitor_overhead": Limit("info", above=0.25),
}
"""By the name of the reading: the limits of `gradmon.alerts.default_rules()`."""

STALLED = Limit("critical", above=600.0)
"""Seconds without a measurement."""

_HEALTHY = {
    "loss": "It falls.",
    "grad_norm": "Steady; alerts at more than 20 robust deviations above its median, and below 1e-7.",
    "param_norm": "It settles, or grows slowly.",
    "update_ratio": "About 0.001; alert above 0.1 and below 1e-8.",
    "sharpness": "It depends on the model: compare a run with itself.",
    "stability": "Up to about 1 for plain SGD, around which it may hover.",
    "weight_condition": "Below 1000; alert above.",
    "weight_cosine": "Near 1.",
    "weight_diversity": "Near 1/n for n perturbations.",
    "weight_coherence": "About 1.",
    "step_condition": "It depends on the learning rate: compare a run with itself.",
    "scale_ratio": "1 to about 3.",
    "input_condition": "It depends on the data: compare a run with itself.",
    "gradient_rank": "Well below 1; it rises as training goes on.",
    "input_gradient_rank": "Well below 1.",
    "gradient_confusion": "Below 0.9; alert above.",
    "gradient_diversity": "Between 1/n and 1 for n micro-batches.",
    "gradient_coherence": "Well above 1 over the batch size.",
    "noise_scale": "No more than some times the batch size.",
    "gradient_snr": "It falls as training goes on: compare a run with itself.",
    "step_share": "Not near 1 for long.",
    "batch_share": "Not near 1 for long.",
    "step_ratio": "Well below 1; alert above 1.",
    "noise_ratio": "Below 1 is plenty of signal; alert above 10.",
}


def told(metric: str) -> str:
    """What a metric means, what is healthy, and what to do otherwise: the description of a panel."""
    known = METRICS[metric]
    return f"**{metric}**: {known.meaning} Healthy: {_HEALTHY[metric]} Otherwise: {known.remedy}"


def thresholds(limit: Limit | None) -> Json:
    """The colours of a scale: one that is good, and that of the severity past the limits."""
    bad = COLORS[limit.severity] if limit else _GOOD
    steps: list[Json] = [{"color": bad if limit and limit.below is not None else _GOOD, "value": None}]
    if limit and limit.below is not None:
        steps.append({"color": _GOOD, "value": limit.below})
    if limit and limit.above is not None:
        steps.append({"color": bad, "value": limit.above})
    return {"mode": "absolute", "steps": steps}
