"""Numbers that are no part of the risk, and what they would add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.zoo.fit import FOLDS, features, fold_of, logistic, surprise
from benchmarks.zoo.table import Run
from gradmon.preflight._coefficients import KNOTS, RIDGE


def _log(value: float | None, otherwise: float) -> float:
    """log10, cut to what a linear part can make something of."""
    return otherwise if value is None or value <= 0 else min(max(math.log10(value), -6.0), 6.0)


CANDIDATES: Mapping[str, Callable[[Run], float]] = {
    "gradient_confusion": lambda run: run.network.seen["confusion"] or 0.0,
    "gradient_coherence (log)": lambda run: _log(run.network.seen["coherence"], -2.0),
    "noise_scale (log)": lambda run: _log(run.network.seen["noise_scale"], 5.0),
    "noise_scale over the batch (log)": lambda run: (
        _log(run.network.seen["noise_scale"], 5.0) - math.log10(run.network.of.batch)
    ),
    "grad_norm (log)": lambda run: _log(run.network.seen["gradient_norm"], 0.0),
    "loss over chance before the first step (log)": lambda run: _log(
        run.network.seen["loss"] / run.network.seen["chance"], 0.0
    ),
    "sig (log)": lambda run: _log(run.network.seen["sig"], 0.0),
    "relg (log)": lambda run: _log(run.network.seen["relg"], 0.0),
    "weight_condition (log)": lambda run: _log(run.network.metrics.get("weight_condition"), 2.0),
    "1 - weight_cosine (log)": lambda run: _log(1 - run.network.metrics.get("weight_cosine", 0.99), -2.0),
    "gradient_rank (log)": lambda run: _log(run.network.metrics.get("gradient_rank"), -1.0),
    "gradient_diversity (log)": lambda run: _log(run.network.metrics.get("gradient_diversity"), 0.0),
    "gradient_snr (log)": lambda run: _log(run.network.metrics.get("gradient_snr"), -2.0),
}
"""Each as a linear part, of either sign: both it and its negative are offered to the fit."""


def added(found: Sequence[Run]) -> tuple[float, dict[str, float]]:
    """The log-loss of held-out folds, of the risk as it is and with one part more.

    Args:
        found: The runs of the development half.

    Returns:
        That of the risk, and by how much it falls with each candidate.
    """
    _, parts = features(found, KNOTS, with_loss=False)
    y = np.array([run.failed for run in found], dtype=float)
    folds = np.array([fold_of(run) for run in found])

    def held_out(x: np.ndarray) -> float:
        odds = np.zeros(len(found))
        for fold in range(FOLDS):
            w = logistic(x[folds != fold], y[folds != fold], RIDGE)
            odds[folds == fold] = x[folds == fold] @ w[:-1] + w[-1]
        return surprise(odds, y)

    base = held_out(parts)
    gains: dict[str, float] = {}
    for name, of in CANDIDATES.items():
        column = np.array([of(run) for run in found])
        column = column - column.mean()
        gains[name] = base - held_out(np.column_stack([parts, column, -column]))
    return base, gains
