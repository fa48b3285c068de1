"""What could be done about a run before it (or at its step 20), and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.zoo.table import Network, Run
from gradmon.preflight._coefficients import LIMIT
from gradmon.preflight.causes import NOTABLE
from gradmon.preflight.score import parts, probability

STUCK = 0.89
"""The loss after 20 steps, over that at chance, above which a run counts as stuck."""


class Policy(NamedTuple):
    """A way to configure a run anew.

    Attributes:
        name: What is done.
        passes: What it costs, in words.
        final: The final loss that comes of it.
    """

    name: str
    passes: str
    final: Callable[[Run], float]


def risk(run: Run, *, with_loss: bool = False) -> float:
    """The risk of a run, before the first step or with the loss after 20 steps."""
    return probability(sum(parts(run.signs, progress=run.progress if with_loss else None).values()))


def cause(run: Run) -> str | None:
    """The weightiest cause; None where there is none."""
    found = {name: part for name, part in parts(run.signs).items() if name != "base" and part >= NOTABLE}
    return max(found, key=lambda name: found[name]) if found else None


def flagged(run: Run) -> bool:
    """Whether the check says that the run will probably fail."""
    return risk(run) >= LIMIT


def stuck(run: Run) -> bool:
    """Whether the loss after 20 steps is still that of a guess."""
    return not run.progress <= STUCK


def best_of(losses: Mapping[float, float]) -> float:
    """The exponent with the smallest loss."""
    return min(losses, key=lambda exponent: math.inf if math.isnan(losses[exponent]) else losses[exponent])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _gated(run: Run) -> float:
    return _number(run.network.anew_best) if flagged(run) or stuck(run) else run.final


def _gated_before(run: Run) -> float:
    return _number(run.network.anew_best) if flagged(run) else run.final


def _gated_rate(run: Run) -> float:
    if not (flagged(run) or stuck(run)):
        return run.final
    rate = flagged(run) and (cause(run) or "").startswith("rate")
    return _number(run.network.best if rate else run.network.anew_best)


def any_rate(network: Network) -> float:
    """The best final loss at any learning rate that was tried, initialised as configured."""
    tried = [loss for loss in (*network.grid.values(), network.ranged, _number(network.best)) if math.isfinite(loss)]
    return min(tried, default=math.nan)


GATED = Policy("flagged before the first step, or stuck at step 20: initialise anew, lr\\*", "10 to 40", _gated)
POLICIES = (
    Policy("the default learning rate", "0", lambda run: run.network.grid[0.0]),
    Policy("learning-rate range test, minimum / 10", "100", lambda run: run.network.ranged),
    Policy(
        "best of six learning rates after 20 steps", "120", lambda run: run.network.grid[best_of(run.network.early)]
    ),
    Policy("lr\\* always", "12", lambda run: _number(run.network.best)),
    Policy("initialise anew and lr\\*, always", "13", lambda run: _number(run.network.anew_best)),
    Policy("flagged before the first step: initialise anew, lr\\*", "10 to 20", _gated_before),
    GATED,
    Policy("the same, but lr\\* alone where the cause is the learning rate", "10 to 40", _gated_rate),
    Policy("the best learning rate that was tried, initialisation kept", "-", lambda run: any_rate(run.network)),
)
"""The baselines, the advice, and what a learning rate alone could reach."""
