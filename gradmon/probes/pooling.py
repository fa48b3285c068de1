"""What every rank finds out about its own examples, put together: as if all of them were one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import InputGradients
from gradmon._objective import Gradient, Objective
from gradmon._parameters import Weights
from gradmon._tensors import wide, working
from gradmon.per_example import Pass, PerExample, PerExampleResult, Wanted
from gradmon.team import Team

ENDLESS_INPUTS = "non-finite gradient with respect to the inputs"
"""Why nothing can be had of the inputs' gradients; those of the weights may be finite all the same."""
_COLUMNS = 1 << 18
"""How many coordinates are widened at a time."""


def fits(team: Team, weights: Weights, max_memory: int) -> bool:
    """Whether every rank may hold the looked-at coordinates of its own examples."""
    size = weights.element_size * sum(held for _, held, _ in weights.coordinates.segments)
    return max(team.examples) * size <= max_memory


def pooled_pass(team: Team, objective: Objective, engine: PerExample, wanted: Wanted) -> Pass:
    """One pass of every rank over its own examples, with the batch gradient and the inner products of all.

    Raises:
        Unavailable: The examples' gradients cannot be told apart on some rank.
        RankError: It failed on some rank.
    """
    found: list[Pass] = []

    def own() -> Gradient:
        found[:] = [engine.run(own_part(wanted))]
        return found[0].gradient

    def say() -> dict[str, Any]:
        return {"coarsest": found[0].result.epsilon, "resolution": found[0].result.resolution}

    gradient, heard = objective.averaged(team, "examples", own, say)
    epsilon, resolution = (max(other[name] for other in heard) for name in ("coarsest", "resolution"))
    result = replace(found[0].result, epsilon=epsilon, resolution=resolution)
    return replace(found[0], gradient=gradient, result=pooled_result(team, result, objective.weights, wanted))


def own_part(wanted: Wanted) -> Wanted:
    """What a rank has to find out about its own examples: inner products with others need the coordinates."""
    return replace(wanted, gram=False, rows=wanted.gram, moments=wanted.moments and not wanted.gram)


def pooled_result(
    team: Team, own: PerExampleResult, weights: Weights, wanted: Wanted, sampled: Weights | None = None
) -> PerExampleResult:
    """The examples' gradients of all ranks, from those that every rank has found of its own.

    Args:
        team: The ranks.
        own: What this rank has found.
        weights: The coordinates that are looked at.
        wanted: What is wanted of them.
        sampled: The coordinates of which mean and variance are taken, where these are others.

    Raises:
        Unavailable: A gradient is not finite.
    """
    matrix = None
    if wanted.gram:
        assert own.rows is not None
        matrix = team.gram(own.rows, team.examples, weights.coordinates)
        factors = torch.tensor(
            [_factor(team, rank) for rank, count in enumerate(team.examples) for _ in range(count)],
            dtype=matrix.dtype,
            device=matrix.device,
        )
        matrix = matrix * factors * factors[:, None]
        if not math.isfinite(float(matrix.sum())):
            raise Unavailable("non-finite gradient")
    means = variances = seen = None
    if wanted.moments:
        means, variances, seen = _pooled_moments(team, *_own_moments(own, sampled))
    return replace(own, examples=team.total, gram=matrix, rows=None, means=means, variances=variances, seen=seen)


def _factor(team: Team, rank: int) -> float:
    return team.total / (team.size * team.examples[rank])


def _own_moments(own: PerExampleResult, sampled: Weights | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means, sums of squared deviations, and what is not zero, of this rank's examples."""
    if own.rows is None:
        assert own.means is not None
        assert own.variances is not None
        assert own.seen is not None
        alone = own.examples == 1  # of which there is no variance
        squares = torch.zeros_like(own.means) if alone else own.variances * (own.examples - 1)
        return own.means, squares, own.seen
    rows = own.rows if sampled is None else sampled.pick_columns(own.rows)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for piece in torch.split(rows, _COLUMNS, dim=1):
        widened = wide(piece)
        means = widened.mean(0)
        parts.append((means, (widened - means).square_().sum(0), (widened != 0).any(0)))
    means, squares, seen = (torch.cat(column) for column in zip(*parts, strict=True))
    return means, squares, seen


def _pooled_moments(team: Team, means: Tensor, squares: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, unbiased variances, and what is not zero, of all examples (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    factor, count = team.factor, team.examples[team.rank]

    def first() -> Tensor:
        return torch.stack([means * (factor * count), seen.to(means)])

    sums = team.sum(team.together("means", first)[0])
    whole = sums[0] / team.total

    def second() -> Tensor:
        return squares * factor**2 + count * (means * factor - whole).square()

    spread = team.sum(team.together("squares", second)[0])
    # 0 / 0 for a batch of one
    return whole, spread / (team.total - 1 if team.total > 1 else math.nan), sums[1] > 0


def pooled_inputs(team: Team, found: Callable[[], tuple[Tensor, Tensor]]) -> InputGradients:
    """The inner products of all ranks' gradients with respect to the examples' own inputs.

    Args:
        team: The ranks.
        found: This rank's inputs, and the gradients with respect to them, (B_r, ...), once.

    Raises:
        Unavailable: They were not found on some rank, are not finite, or inputs of different ranks differ in shape.
        RankError: It failed on some rank.
    """
    own = alike_inputs(team, found)[1]
    rows = own.flatten(1) * team.factor
    gram = team.gram(rows, team.examples)
    if not math.isfinite(float(gram.sum())):
        raise Unavailable(ENDLESS_INPUTS)
    return InputGradients(gram=gram, total=rows.shape[1])


def alike_inputs(team: Team, found: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """This rank's inputs and the gradients with respect to them, where those of all ranks have the same shape.

    Raises:
        Unavailable: They were not found on some rank, or differ in shape.
        RankError: It failed on some rank.
    """
    own, heard = team.together("inputs", found, lambda made: {"shape": list(made[0].shape[1:])})
    shapes = [tuple(other["shape"]) for other in heard]
    if len(set(shapes)) > 1:
        raise Unavailable(f"the inputs of different ranks have different shapes: {' and '.join(map(str, set(shapes)))}")
    return own


def pooled_share(team: Team, objective: Objective, engine: PerExample, example: int) -> Tensor:
    """The gradient h_i of one example of all, (P,).

    Args:
        team: The ranks.
        objective: The objective.
        engine: This rank's passes.
        example: Its number, counted over the ranks in order.

    Raises:
        Unavailable: It cannot be told apart from the others.
        RankError: It failed on the rank that has it.
    """
    owner, place = 0, example
    while place >= team.examples[owner]:
        place -= team.examples[owner]
        owner += 1

    def own() -> Tensor:
        weights = objective.weights
        if team.rank != owner:
            like = torch.empty(weights.total, dtype=weights.dtype, device=weights.device)
            return working(like)
        share = engine.run(Wanted(gram=False, example=place)).share
        return working(weights.flatten(share)) * team.factor

    return team.from_rank(owner, team.together("example", own)[0])
