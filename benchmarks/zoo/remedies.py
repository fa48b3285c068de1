"""The third stage: the same networks with what could be advised, trained anew from the start."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.zoo.configurations import DEFAULTS, Configuration
from benchmarks.zoo.ensemble import start_of, train
from benchmarks.zoo.measuring import anew
from benchmarks.zoo.networks import build
from benchmarks.zoo.records import read

ANEW_EXPONENTS = (-0.5, 0.0)
"""The grid for networks that were initialised anew: log10 of the learning rate over the default."""


def remedied(of: Configuration) -> dict[str, Any]:
    """What becomes of a network at the suggested learning rate, as it is and initialised anew.

    Returns:
        ``early`` and ``final``: the losses after 20 steps and at the end: at lr*; initialised anew at its lr*; anew at
        `ANEW_EXPONENTS`. Where a check found no lr*, the default is taken.
    """
    seen, default = read("measured")[of.name], DEFAULTS[of.optimizer]
    rates = [
        default if seen[way]["half"] is None else math.sqrt(seen[way]["half"] * default) for way in ("look", "anew")
    ]
    rates += [default * 10**exponent for exponent in ANEW_EXPONENTS]
    model, fresh = build(of), anew(of)
    starts = [start_of(model)] + [start_of(fresh)] * (len(rates) - 1)
    early, final = train(of, model, starts, rates)
    return {"name": of.name, "early": early, "final": final}
