"""Batch-dissonance: how much the examples' gradients disagree at one w."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import GradientMoments, InputGradients, PerExampleGradients
from gradmon._tensors import largest_eigenvalue
from gradmon.metrics._metric import Value


def gradient_rank(seen: PerExampleGradients) -> float:
    """The stable rank of the examples' gradients over that of noise of the same shape.

    ``R(A) / R(Y)``, ``R(A) = ||A||_F^2 / ||A||_2^2 = tr(G) / lambda_max(G)``, Y standard normal, P x B, for which
    ``R(Y)`` is taken as ``P B / (sqrt(P) + sqrt(B))^2``.

    Range: (0, about 1], low is good. Source: Nelson 2022, Definition 3.7; Balduzzi et al. 2017.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    return _rank(seen.gram, seen.total)


def input_gradient_rank(seen: InputGradients) -> float:
    """`gradient_rank` with each example's gradient with respect to its own input, (D,), as columns.

    Range: (0, about 1], low is good. Source: Nelson 2022, Definition 3.7; Balduzzi et al. 2017.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    return _rank(seen.gram, seen.total)


def noise_rank(rows: int, columns: int) -> float:
    """The stable rank that a standard normal matrix tends to, ``P B / (sqrt(P) + sqrt(B))^2``."""
    return rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


def gradient_confusion(seen: PerExampleGradients) -> float:
    """``-min(0, min_{i<j} cos(hbar_i, hbar_j))`` over the means of n consecutive equal parts of the batch.

    Parts whose mean gradient is zero contradict nobody and are left out.

    Range: [0, 1], low is good. Source: Nelson 2022, Definition 3.11; Sankararaman et al. 2019.

    Raises:
        Unavailable: Batch of one, or fewer than two parts have a gradient.
    """
    blocks = _blocks(seen)
    # A mean whose members cancel is rounding error, and so is its direction.
    squares = blocks.diagonal()
    kept = squares > _rounding(seen) * _members(seen, len(blocks))
    sizes = squares.clamp_min(0).sqrt()
    if int(kept.sum()) < 2:
        raise Unavailable("zero gradient" if not bool(kept.any()) else "fewer than two micro-batches have a gradient")
    sizes, blocks = sizes[kept], blocks[kept][:, kept]
    cosines = blocks / sizes / sizes[:, None]
    first, second = torch.triu_indices(len(sizes), len(sizes), offset=1)
    return max(0.0, min(1.0, -float(cosines[first, second].min())))


def gradient_diversity(seen: PerExampleGradients) -> float:
    """``sum_i ||hbar_i||^2 / ||sum_i hbar_i||^2`` over the means of n consecutive equal parts of the batch.

    Range: >= 1/n, low is good. Source: Nelson 2022, Definition 3.12; Yin et al. 2017.

    Raises:
        Unavailable: Batch of one, or the means add up to zero.
    """
    blocks = _blocks(seen)
    squares, total = float(blocks.trace()), float(blocks.sum())
    _nonzero(squares, total, seen)
    return squares / total


def gradient_coherence(seen: PerExampleGradients) -> float:
    """``sum_i <h, h_i> / sum_i ||h_i||^2 = sum_ij G_ij / (B tr G)``.

    1 where all examples agree, 1/B where they are orthogonal, 0 where they cancel.

    Range: [0, 1], depends on B, high is good. Source: Nelson 2022, Definition 3.13; Chatterjee & Zielinski 2020.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    _several(seen.gram)
    squares = float(seen.gram.trace())
    if squares == 0:
        raise Unavailable("zero gradient")
    return max(0.0, min(1.0, float(seen.gram.sum()) / (len(seen.gram) * squares)))


def noise_scale(seen: PerExampleGradients) -> Value:
    """``tr(Sigma) / ||h||^2``: the batch size at which noise and signal are equally strong.

    Both are unbiased: ``tr(Sigma) = sum_i ||h_i - h||^2 / (B - 1)`` and ``||h||^2 - tr(Sigma) / B``.

    Unit: examples; compare with B. Range: >= 0, infinite where no signal stands out. Source: McCandlish et al. 2018,
    the simple noise scale.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    _several(seen.gram)
    count = len(seen.gram)
    squares = float(seen.gram.trace())
    if squares == 0:
        raise Unavailable("zero gradient")
    mean_square = max(0.0, float(seen.gram.sum())) / count**2
    noise = max(0.0, squares - count * mean_square) / (count - 1)
    signal = mean_square - noise / count
    if signal <= 4 * seen.resolution * mean_square:  # a difference that is rounding error is none
        return Value(math.inf, reason="no signal above the noise")
    return Value(noise / signal)


def noise_ratio(seen: PerExampleGradients) -> Value:
    """``noise_scale / B``: above 1 the batch gradient is more noise than signal.

    Range: >= 0, low is good. Source: McCandlish et al. 2018.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    found = noise_scale(seen)
    return found._replace(value=found.value / len(seen.gram))


def gradient_snr(seen: GradientMoments) -> Value:
    """The median over the coordinates of ``mean_i(h_i)^2 / var_i(h_i)``, unbiased variance.

    Coordinates that are zero for all examples are left out; the median is the mean of the middle two.

    Range: >= 0, high is good; infinite where the examples agree exactly. Source: Per-example gradients: a new
    frontier, 2025.

    Raises:
        Unavailable: Batch of one, or all gradients are zero.
    """
    if seen.examples == 1:
        raise Unavailable("batch of one")
    means, variances = seen.means[seen.seen], seen.variances[seen.seen]
    if len(means) == 0:
        raise Unavailable("zero gradient")
    ratios = (means.abs() / variances.sqrt()).square()
    value = (_ranked(ratios, (len(ratios) - 1) // 2) + _ranked(ratios, len(ratios) // 2)) / 2
    return Value(value, reason="no variance over the examples" if math.isinf(value) else None)


def _ranked(values: Tensor, place: int) -> float:
    return float(values.kthvalue(place + 1).values)


def _several(gram: Tensor) -> None:
    if len(gram) == 1:
        raise Unavailable("batch of one")


def _rank(gram: Tensor, total: int) -> float:
    _several(gram)
    squares = float(gram.trace())
    if squares == 0:
        raise Unavailable("zero gradient")
    largest = largest_eigenvalue(gram / squares)
    return 1 / largest / noise_rank(total, len(gram))


def _blocks(seen: PerExampleGradients) -> Tensor:
    """The Gram matrix of the means over consecutive equal parts; trailing examples are left out."""
    _several(seen.gram)
    parts = min(seen.micro_batches, len(seen.gram))
    size = len(seen.gram) // parts
    return seen.gram[: parts * size, : parts * size].reshape(parts, size, parts, size).mean((1, 3))


def _members(seen: PerExampleGradients, parts: int) -> Tensor:
    """The mean squared norm of the gradients within each part, (n,)."""
    size = len(seen.gram) // parts
    return seen.gram.diagonal()[: parts * size].reshape(parts, size).mean(1)


def _nonzero(squares: float, total: float, seen: PerExampleGradients) -> None:
    """A sum that is only rounding error is none."""
    if total <= squares * _rounding(seen):
        raise Unavailable("zero gradient")


def _rounding(seen: PerExampleGradients) -> float:
    """The squared norm of a sum of gradients that cancel, relative to that of the gradients."""
    return max((4 * seen.epsilon) ** 2, 4 * seen.resolution)
