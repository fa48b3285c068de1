"""The first stage: each network of the zoo at its own learning rate, and at those of a grid."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.zoo.configurations import DEFAULTS, OWN_EXPONENTS, Configuration
from benchmarks.zoo.ensemble import range_test, start_of, train
from benchmarks.zoo.networks import build

EXPONENTS = OWN_EXPONENTS
"""The grid: log10 of the learning rate over the default; every configuration's own is among them."""


HIGH_EXPONENTS = (1.5, 2.0, 3.0)
"""Learning rates that are far too high for nearly every network, so that the risk knows these, too."""


def excessive(of: Configuration) -> dict[str, Any]:
    """What becomes of a network at learning rates far above the default.

    Returns:
        ``early`` and ``final``: the losses after 20 steps and at the end, for `HIGH_EXPONENTS`.
    """
    model = build(of)
    rates = [DEFAULTS[of.optimizer] * 10**exponent for exponent in HIGH_EXPONENTS]
    early, final = train(of, model, [start_of(model)] * len(rates), rates)
    return {"name": of.name, "early": early, "final": final}


def trained(of: Configuration) -> dict[str, Any]:
    """What becomes of a network at every learning rate of the grid, and at that of a range test.

    Returns:
        ``early`` and ``final``: the losses after 20 steps and at the end, for `EXPONENTS` and, last, the range test;
        ``range``: log10 of the range test's learning rate over the default.
    """
    model, default = build(of), DEFAULTS[of.optimizer]
    tested = range_test(of, model, default)
    rates = [*(default * 10**exponent for exponent in EXPONENTS), tested]
    early, final = train(of, model, [start_of(model)] * len(rates), rates)
    return {"name": of.name, "early": early, "final": final, "range": math.log10(tested / default)}
