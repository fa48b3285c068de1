"""Fits the risk to the development half of the zoo, and writes gradmon/preflight/_coefficients.py.

Every network counts at each learning rate of the grid, and at some that are far too high; the runs of one network are
always in the same fold. The risk is a logistic regression on hinges, with weights that cannot be negative. Where each
hinge begins, and how much the weights are held back, is what does best in five-fold cross-validation; the limit of the
flag is the lowest at which nine of ten flagged runs of the held-out folds fail, the mean over the families, the far too
high rates left out. Usage, from the root of the repository:

    python -m benchmarks.zoo.fit [--write]
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from benchmarks.zoo.table import Run, networks
from gradmon.preflight.score import early, hinges

Array = NDArray[np.float64]
FILE = Path(__file__).parents[2] / "gradmon" / "preflight" / "_coefficients.py"
GRIDS: Mapping[str, Sequence[float]] = {
    "rate_too_high": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "rate_too_low": (-0.2, -0.4, -0.6, -0.8, -1.0, -1.2, -1.4),
    "vanishing": (-2.5, -2.0, -1.5, -1.0, -0.7),
    "exploding": (-0.2, 0.0, 0.25, 0.5, 0.75, 1.0),
    "chaotic": (0.0, 0.15, 0.3, 0.5, 0.7),
    "chaotic_sig": (0.6, 0.7, 0.8, 0.9),
    "sharp": (0.0, 0.5, 1.0, 1.5, 2.0),
}
"""Where a hinge may begin."""
RIDGES = (0.003, 0.01, 0.03, 0.1)
FOLDS = 5
PRECISION = 0.9


def features(found: Sequence[Run], knots: Mapping[str, float], *, with_loss: bool) -> tuple[list[str], Array]:
    """The names and the values of the parts, (N, K)."""
    rows: list[dict[str, float]] = []
    for run in found:
        row = hinges(run.signs, knots)
        rows.append({**row, "loss": early(run.progress)} if with_loss else row)
    names = list(rows[0])
    return names, np.array([[row[name] for name in names] for row in rows])


def logistic(x: Array, y: Array, ridge: float) -> Array:
    """The weights, the base last; those of the parts are at least 0.

    Args:
        x: The parts, (N, K).
        y: Whether each run fails, (N,).
        ridge: By how much large weights are held back.

    Returns:
        (K + 1,).
    """

    def cost(w: Array) -> tuple[float, Array]:
        z = x @ w[:-1] + w[-1]
        p = 1 / (1 + np.exp(-np.clip(z, -500, 500)))
        value = np.mean(np.logaddexp(0, z) - y * z) + ridge * np.sum(w[:-1] ** 2)
        slope = (p - y) / len(y)
        return float(value), np.append(slope @ x + 2 * ridge * w[:-1], slope.sum())

    start = np.append(np.ones(x.shape[1]), -1.0)
    bounds = [(0.0, None)] * x.shape[1] + [(None, None)]
    return np.asarray(minimize(cost, start, jac=True, bounds=bounds, method="L-BFGS-B").x)


def fold_of(run: Run) -> int:
    """The fold of a run, by a hash of its network's name."""
    return hashlib.sha256(f"fold {run.network.of.name}".encode()).digest()[0] % FOLDS


def held_out(found: Sequence[Run], knots: Mapping[str, float], ridge: float, *, with_loss: bool) -> Array:
    """The log of the odds of each run, from the networks of the other folds, (N,)."""
    _, x = features(found, knots, with_loss=with_loss)
    y = np.array([run.failed for run in found], dtype=float)
    folds = np.array([fold_of(run) for run in found])
    odds = np.zeros(len(found))
    for fold in range(FOLDS):
        w = logistic(x[folds != fold], y[folds != fold], ridge)
        odds[folds == fold] = x[folds == fold] @ w[:-1] + w[-1]
    return odds


def surprise(odds: Array, y: Array) -> float:
    """The mean log-loss."""
    return float(np.mean(np.logaddexp(0, odds) - y * odds))


def choose(found: Sequence[Run]) -> tuple[dict[str, float], float]:
    """Where each hinge begins, and the ridge: one after the other, until nothing gets better."""
    y = np.array([run.failed for run in found], dtype=float)
    knots, ridge = {name: grid[len(grid) // 2] for name, grid in GRIDS.items()}, 0.01
    best = math.inf
    for _ in range(4):
        before = best
        for name, grid in GRIDS.items():
            for value in grid:
                tried = {**knots, name: value}
                now = surprise(held_out(found, tried, ridge, with_loss=False), y)
                if now < best - 1e-9:
                    best, knots = now, tried
        for value in RIDGES:
            now = surprise(held_out(found, knots, value, with_loss=False), y)
            if now < best - 1e-9:
                best, ridge = now, value
        if best >= before - 1e-6:
            break
    return knots, ridge


def limit_for(odds: Array, y: Array, families: Sequence[str], precision: float) -> float:
    """The lowest risk above which this part of the runs fails, the mean over the families, to two digits.

    Args:
        odds: The log of the odds of each run, (N,).
        y: Whether each run fails, (N,).
        families: The family of each run.
        precision: The part.

    Returns:
        The risk; 1 where there is none.
    """
    names = np.array(families)
    best = 1.0
    for hundredth in range(100, 0, -1):
        flagged = 1 / (1 + np.exp(-odds)) >= hundredth / 100
        shares = [y[flagged & (names == name)].mean() for name in set(families) if (flagged & (names == name)).any()]
        if shares and np.mean(shares) >= precision:
            best = hundredth / 100
    return best


def fitted(found: Sequence[Run], knots: Mapping[str, float], ridge: float) -> tuple[dict[str, dict[str, float]], float]:
    """Coefficients and the limit, from the runs of the development half."""
    y = np.array([run.failed for run in found], dtype=float)
    coefficients: dict[str, dict[str, float]] = {}
    for stage, with_loss in (("start", False), ("early", True)):
        names, x = features(found, knots, with_loss=with_loss)
        w = logistic(x, y, ridge)
        coefficients[stage] = {name: round(float(value), 3) for name, value in zip([*names, "base"], w, strict=True)}
    usual = np.array([run.exponent in run.network.grid for run in found])
    odds = held_out(found, knots, ridge, with_loss=False)
    families = [run.network.of.family for run in found if run.exponent in run.network.grid]
    return coefficients, limit_for(odds[usual], y[usual], families, PRECISION)


def text_of(
    knots: Mapping[str, float], ridge: float, coefficients: Mapping[str, Mapping[str, float]], limit: float
) -> str:
    """The module that holds them."""

    def lines(of: Mapping[str, float], indent: int) -> str:
        return "".join(f'{" " * indent}"{name}": {value},\n' for name, value in of.items())

    stages = "".join(f'    "{stage}": {{\n{lines(of, 8)}    }},\n' for stage, of in coefficients.items())
    return f'''"""What benchmarks/zoo/fit.py found on the development half of the zoo. Written by it: do not edit."""

from __future__ import annotations

KNOTS: dict[str, float] = {{
{lines(knots, 4)}}}
"""Where each part of the risk begins."""

RIDGE = {ridge}
"""By how much the fit held large coefficients back."""

COEFFICIENTS: dict[str, dict[str, float]] = {{
{stages}}}
"""What each part adds to the log of the odds, before the first step and after some."""

LIMIT = {limit}
"""The risk from which on a run is flagged."""
'''


def development() -> list[Run]:
    """The runs that the risk is fitted to."""
    found = [network for network in networks() if network.of.half == "dev" and network.known]
    return [run for network in found for run in (*network.runs, *network.excessive)]


def main() -> None:
    """Print what was found; with --write, write the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = development()
    knots, ridge = choose(found)
    text = text_of(knots, ridge, *fitted(found, knots, ridge))
    print(text)
    if options.write:
        FILE.write_text(text)


if __name__ == "__main__":
    main()
