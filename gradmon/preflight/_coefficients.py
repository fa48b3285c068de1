"""What benchmarks/zoo/fit.py found on the development half of the zoo. Written by it: do not edit."""

from __future__ import annotations

KNOTS: dict[str, float] = {
    "rate_too_high": 0.4,
    "rate_too_low": -0.2,
    "vanishing": -1.0,
    "exploding": 0.5,
    "chaotic": 0.7,
    "chaotic_sig": 0.8,
    "sharp": 0.0,
}
"""Where each part of the risk begins."""

RIDGE = 0.003
"""By how much the fit held large coefficients back."""

COEFFICIENTS: dict[str, dict[str, float]] = {
    "start": {
        "rate_too_high": 1.971,
        "rate_too_low": 2.0,
        "vanishing": 1.314,
        "exploding": 1.218,
        "chaotic": 0.214,
        "sharp": 0.701,
        "base": -2.06,
    },
    "early": {
        "rate_too_high": 1.55,
        "rate_too_low": 1.837,
        "vanishing": 1.311,
        "exploding": 0.375,
        "chaotic": 0.193,
        "sharp": 0.671,
        "loss": 2.432,
        "base": -1.96,
    },
}
"""What each part adds to the log of the odds, before the first step and after some."""

LIMIT = 0.6
"""The risk from which on a run is flagged."""
