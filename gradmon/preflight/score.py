"""The risk: a sum of a few parts that anybody can read, as the log of the odds that a run fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gradmon.preflight._coefficients import COEFFICIENTS, KNOTS


@dataclass(frozen=True)
class Signs:
    """What the risk is made of, without units; None for what is not known, which then adds nothing.

    Attributes:
        offset: ``u = log10(lr / lr*)``; minus infinity for a learning rate of 0.
        out_sd: The outputs' standard deviation between examples, in their own unit.
        sig: The share of the last hidden layer's energy that lies between examples.
        relg: ``||g|| / ||w||`` of the first weight matrix over that of the last.
        sharpness: ``log10(lr_default / lr_half)``: by how much steps must be shorter than usual.
    """

    offset: float | None
    out_sd: float | None
    sig: float | None
    relg: float | None
    sharpness: float | None


def hinges(signs: Signs, knots: Mapping[str, float] = KNOTS) -> dict[str, float]:
    """By how much each sign is beyond its knot, in decades.

    Args:
        signs: The signs.
        knots: Where each part begins.

    Returns:
        For each part a number in [0, 3].
    """
    found = dict.fromkeys(("rate_too_high", "rate_too_low", "vanishing", "exploding", "chaotic", "sharp"), 0.0)
    if signs.offset is not None:
        found["rate_too_high"] = signs.offset - knots["rate_too_high"]
        found["rate_too_low"] = knots["rate_too_low"] - signs.offset
    if signs.out_sd is not None:
        out = math.log10(max(signs.out_sd, 1e-30))
        found["vanishing"], found["exploding"] = knots["vanishing"] - out, out - knots["exploding"]
    if signs.sharpness is not None:
        found["sharp"] = signs.sharpness - knots["sharp"]
    if signs.sig is not None and signs.relg is not None and signs.sig > knots["chaotic_sig"]:
        found["chaotic"] = math.log10(max(signs.relg, 1e-30)) - knots["chaotic"]
    return {name: min(max(value, 0.0), CAP) for name, value in found.items()}


CAP = 3.0
"""More decades beyond a knot than these change nothing any more."""


def parts(signs: Signs, *, progress: float | None = None) -> dict[str, float]:
    """The parts of the log of the odds.

    Args:
        signs: What was seen before the first step.
        progress: The loss after some steps over the loss at chance, where it is known by then.

    Returns:
        One number for each hinge, ``loss`` where `progress` is given, and ``base``.
    """
    weights = COEFFICIENTS["start" if progress is None else "early"]
    found = {name: weights[name] * value for name, value in hinges(signs).items()}
    if progress is not None:
        found["loss"] = weights["loss"] * early(progress)
    return {**found, "base": weights["base"]}


def early(progress: float) -> float:
    """``log10`` of the loss over that at chance, in [-1, 1]; 1 where it is not finite."""
    if not math.isfinite(progress):
        return 1.0
    return min(max(math.log10(max(progress, 1e-30)), -1.0), 1.0)


def probability(log_odds: float) -> float:
    """The probability that belongs to the log of some odds."""
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0
