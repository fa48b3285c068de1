"""What to change, with numbers: from the reading that raised an alert, learning rate and batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradmon._reading import Reading

_KEPT = 0.4
"""The part of the gradient that a step may destroy for the suggested learning rate: well below all of it."""
_USUAL_UPDATE = 1e-2
"""The relative length of a step to come back to: ten times what is usual, a tenth of the limit."""

_SENSIBLE = 1e4
"""Batches that would have to be so many times as large are no remedy."""
_OTHERWISE = "change the initialisation or add normalisation"

Known = Mapping[str, float]


def shorter_step(reading: Reading, known: Known) -> str:
    """For `step_ratio`: the change of the gradient along a step is about proportional to the learning rate."""
    destroyed = f"The step destroys {_percent(reading.value)} of the gradient"
    return f"{destroyed}: {_lower(known, _KEPT / reading.value if reading.value > 0 else math.nan)}."


def better_conditioned(reading: Reading, known: Known) -> str:
    """For `weight_condition`: what a step really destroys says more than what one of its length could, at worst."""
    destroyed = known.get("step_ratio", math.nan)
    if destroyed > _KEPT:
        shorter = shorter_step(Reading("step_ratio", destroyed), known).rstrip(".")
        return f"{shorter}; if that does not help, {_OTHERWISE}."
    if destroyed <= _KEPT:
        short = f"Steps are short enough now: one destroys {_percent(destroyed)} of the gradient. For longer ones"
        return f"{short}, {_OTHERWISE}."
    if reading.value * known.get("update_ratio", math.nan) > 1:
        worst = "A step of this length could destroy the whole gradient, in the worst direction"
        return f"{worst}: lower the learning rate{_now(known)}; if that does not help, {_OTHERWISE}."
    return f"Lower the learning rate{_now(known)}; if that does not help, {_OTHERWISE}."


def smaller_update(reading: Reading, known: Known) -> str:
    """For `update_ratio`, on either side."""
    if reading.value > _USUAL_UPDATE:
        shorter = _lower(known, _USUAL_UPDATE / reading.value)
        return f"A step is {_percent(reading.value)} of the weights' length: {shorter}."
    return (
        "Raise the learning rate; look for a schedule that has run out, or a gradient that is clipped away"
        f"{_now(known)}."
    )


def larger_batch(reading: Reading, known: Known) -> str:
    """For `noise_ratio`: signal and noise are equally strong at B times as much."""
    size, ratio = known.get("batch_size", math.nan), reading.value
    if not (math.isfinite(size) and 1 < ratio <= _SENSIBLE):
        return "Raise the batch size, or accumulate gradients over more micro-batches."
    return (
        f"Raise the batch size from {size:.0f} towards {_round(size * ratio, 2):.0f}, where signal and noise are "
        f"equally strong, or accumulate gradients over {math.ceil(ratio):.0f} micro-batches."
    )


def clipped(reading: Reading, known: Known) -> str:
    """For a `grad_norm` far above its median."""
    usual = known.get("usual", math.nan)
    if not (math.isfinite(usual) and usual > 0):
        return "Lower the learning rate or clip the gradient."
    at = f"{_round(2 * usual):g}, twice its usual norm"
    return f"Clip the gradient at about {at}, or lower the learning rate{_now(known)}."


def _lower(known: Known, factor: float) -> str:
    rate = known.get("learning_rate", math.nan)
    if not (math.isfinite(rate) and rate > 0 and 0 < factor < 1):
        return "lower the learning rate"
    if factor > 0.9:
        return f"lower the learning rate a little{_now(known)}"
    lower = _round(rate * factor, 1 if factor < 0.6 else 2)  # one digit is too coarse for a small change
    return f"lower the learning rate from {rate:.3g} to about {lower:g}"


def _now(known: Known) -> str:
    rate = known.get("learning_rate", math.nan)
    return f" (it is {rate:.3g} now)" if math.isfinite(rate) else ""


def _round(value: float, digits: int = 1) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def _percent(value: float) -> str:
    percent = _round(100 * value, 3) if math.isfinite(value) else math.inf
    if percent >= 1e6:
        return "more than all"
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:g} %"
