"""The rules that a monitor has unless it is given others."""

from __future__ import annotations

from gradmon.alerts._rule import Rule
from gradmon.alerts.drift import Drift
from gradmon.alerts.limits import Above, Below, NonFinite

_SHORTER = "Lower the learning rate; if that does not help, change the initialisation or add normalisation."


def default_rules() -> list[Rule]:
    """New rules: what deserves to wake somebody up, with limits that a healthy run keeps."""
    return [
        NonFinite(),
        Drift(
            "grad_norm",
            20.0,
            direction="up",
            name="exploding",
            severity="critical",
            remedy="Lower the learning rate or clip the gradient.",
        ),
        Below(
            "grad_norm",
            1e-7,
            name="vanishing",
            after=2,
            clear_after=2,
            remedy="Change the initialisation, add normalisation or residual connections, and look for dead units.",
        ),
        Above("weight_condition", 1e3, name="ill_conditioned", after=2, clear_after=2, remedy=_SHORTER),
        Above("step_ratio", 1.0, name="step_too_long", after=2, clear_after=2, remedy="Lower the learning rate."),
        Above(
            "noise_ratio",
            10.0,
            name="batch_too_noisy",
            severity="info",
            after=3,
            clear_after=3,
            remedy="Raise the batch size, or accumulate gradients over more micro-batches.",
        ),
        Above(
            "gradient_confusion",
            0.9,
            name="confused",
            after=3,
            clear_after=3,
            remedy="Raise the batch size; look at labels, and at groups of examples that contradict each other.",
        ),
        Above("update_ratio", 0.1, name="update_too_large", after=2, clear_after=2, remedy="Lower the learning rate."),
        Below(
            "update_ratio",
            1e-8,
            name="update_too_small",
            after=3,
            clear_after=3,
            remedy="Raise the learning rate; look for a schedule that has run out, or a gradient that is clipped away.",
        ),
    ]
