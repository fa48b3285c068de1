"""The rules that a monitor has unless it is given others."""

from __future__ import annotations

from gradmon.alerts import remedies
from gradmon.alerts._rule import Rule
from gradmon.alerts.course import DeadLayer, Rising, Stalled
from gradmon.alerts.drift import Drift
from gradmon.alerts.limits import Above, Below, NonFinite, Outside


def default_rules() -> list[Rule]:
    """New rules: what deserves to wake somebody up, with limits that a healthy run keeps."""
    return [
        NonFinite(),
        Drift("grad_norm", 20.0, direction="up", name="exploding", severity="critical", remedy=remedies.clipped),
        Below(
            "grad_norm",
            1e-7,
            name="vanishing",
            after=2,
            clear_after=2,
            remedy="Change the initialisation, add normalisation or residual connections, and look for dead units.",
        ),
        Above(
            "weight_condition",
            1e3,
            name="ill_conditioned",
            after=2,
            clear_after=2,
            remedy=remedies.better_conditioned,
        ),
        Above("step_ratio", 1.0, name="step_too_long", after=2, clear_after=2, remedy=remedies.shorter_step),
        Above(
            "noise_ratio",
            10.0,
            name="batch_too_noisy",
            severity="info",
            after=3,
            clear_after=3,
            remedy=remedies.larger_batch,
        ),
        Above(
            "gradient_confusion",
            0.9,
            name="confused",
            after=3,
            clear_after=3,
            remedy="Raise the batch size; look at labels, and at groups of examples that contradict each other.",
        ),
        Outside("update_ratio", 1e-8, 0.1, after=2, clear_after=2, remedy=remedies.smaller_update),
        DeadLayer(),
        Stalled(
            "loss",
            remedy="Lower the learning rate or raise the batch size, whichever source of variance is the larger; "
            "or the training is done.",
        ),
        Above(
            "monitor_overhead",
            0.25,
            name="overhead_high",
            severity="info",
            after=3,
            clear_after=3,
            remedy="Look less often: `schedule=budget(0.03)` keeps to a part of the training's time.",
        ),
        Rising(
            ("sink_errors", "sink_dropped"),
            "Errors of sinks, and readings that were dropped",
            name="sink_errors",
            remedy="The log says which sink failed, and why: disk full, server away, port closed.",
        ),
    ]
