"""What leaves the core: a reading is one number of one step, an alert is one rule changing its mind."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["info", "warning", "critical"]
State = Literal["firing", "resolved"]


NOT_TRAINED = "the layer is not trained any more"
"""Why a layer has no number where it had one before."""


class Reading(NamedTuple):
    """One number.

    Attributes:
        name: The metric, as in `gradmon.METRICS`.
        value: The number; NaN where it cannot be trusted, and then `reason` says why.
        step: The optimizer step it belongs to, counted from 1; None outside a training loop.
        layer: The module it belongs to; None for the whole model.
        scale: For finite differences, the relative radius ``||omega|| / ||w||`` at which it was taken.
        resolution: For finite differences, the estimated relative rounding error of `value`.
        reason: Why `value` is NaN or infinite; None otherwise.
        blame: The layers with the largest parts in it, at most three, the largest first.
    """

    name: str
    value: float
    step: int | None = None
    layer: str | None = None
    scale: float | None = None
    resolution: float | None = None
    reason: str | None = None
    blame: tuple[str, ...] = ()


class Alert(NamedTuple):
    """A rule that started or stopped to hold.

    Attributes:
        rule: Lower-case words, such as ``ill_conditioned``.
        severity: ``info``, ``warning`` or ``critical``.
        state: ``firing`` or ``resolved``.
        value: The reading that changed the state.
        step: The step of that reading.
        layer: Its layer, if it has one.
        message: What was seen, in words, with the number and the limit.
        remedy: What to change; empty where the alert has resolved.
        blame: The layers that have the largest parts in it, at most three, the largest first.
    """

    rule: str
    severity: Severity
    state: State
    value: float
    step: int | None
    layer: str | None
    message: str
    remedy: str
    blame: tuple[str, ...] = ()
