"""Slow, independent truths: every metric of metrics.md by its definition, in float64, with plain loops.

Nothing here imports gradmon. Vectors are numpy arrays; `weights` is the mask's reweighting, one factor `numel_t / k_t`
per kept coordinate (N-1.6 and the section "Mask" of metrics.md), or None where nothing is masked.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.model_references import batch_gradient as batch_gradient
from tests.model_references import coordinate_weights as coordinate_weights
from tests.model_references import flat_weights as flat_weights
from tests.model_references import gradient as gradient
from tests.model_references import gradient_at as gradient_at
from tests.model_references import hessian as hessian
from tests.model_references import hessian_by_differences as hessian_by_differences
from tests.model_references import input_gradients as input_gradients
from tests.model_references import input_jacobian as input_jacobian
from tests.model_references import inputs as inputs
from tests.model_references import shares as shares
from tests.model_references import shifted_shares as shifted_shares
from tests.model_references import trainable as trainable

Vectors = Sequence[np.ndarray]


# --- vectors -------------------------------------------------------------------------------------------------------


def dot(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Inner product, coordinate `c` counted `weights[c]` times (metrics.md, "Mask"); summed exactly."""
    assert len(a) == len(b)
    factors = [1.0] * len(a) if weights is None else [float(factor) for factor in weights]
    assert len(factors) == len(a)
    return math.fsum(factor * float(x) * float(y) for factor, x, y in zip(factors, a, b, strict=True))


def norm(a: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Euclidean norm under `dot`."""
    return math.sqrt(dot(a, a, weights))


def cosine(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Cosine of the angle under `dot`."""
    return dot(a, b, weights) / (norm(a, weights) * norm(b, weights))


def gram(H: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """`G_ij = <h_i, h_j>` for the rows of `H`, shape (B, B)."""
    G = np.zeros((len(H), len(H)))
    for i in range(len(H)):
        for j in range(len(H)):
            G[i, j] = dot(H[i], H[j], weights)
    return G


def total(vectors: Vectors) -> np.ndarray:
    """Sum of a list of vectors."""
    result = np.zeros(len(vectors[0]))
    for vector in vectors:
        result = result + vector
    return result


def mean(vectors: Vectors) -> np.ndarray:
    """Mean of a list of vectors."""
    return total(vectors) / len(vectors)


def weighted_columns(vectors: Vectors, weights: np.ndarray | None = None) -> np.ndarray:
    """The vectors as columns, each row scaled by `sqrt(weight)` so that plain products are products under `dot`."""
    columns = np.zeros((len(vectors[0]), len(vectors)))
    for j, vector in enumerate(vectors):
        for c in range(len(vector)):
            columns[c, j] = vector[c] * (1.0 if weights is None else math.sqrt(weights[c]))
    return columns


# --- step-consistency ----------------------------------------------------------------------------------------------


def weight_condition(
    w: np.ndarray, h_0: np.ndarray, hs: Vectors, omegas: Vectors, weights: np.ndarray | None = None
) -> float:
    """`max_k |h_k - h_0| |w| / (|omega_k| |h_0|)` (N-2.5, i = j)."""
    values = []
    for h_k, omega_k in zip(hs, omegas, strict=True):
        relative_change = norm(h_k - h_0, weights) / norm(h_0, weights)
        relative_perturbation = norm(omega_k, weights) / norm(w, weights)
        values.append(relative_change / relative_perturbation)
    return max(values)


def weight_cosine(h_0: np.ndarray, hs: Vectors, weights: np.ndarray | None = None) -> float:
    """`min_k cos(h_k, h_0)` (N-4.1)."""
    return min(cosine(h_k, h_0, weights) for h_k in hs)


def weight_diversity(hs: Vectors, weights: np.ndarray | None = None) -> float:
    """`sum_k |h_k|^2 / |sum_k h_k|^2` (N-4.2)."""
    summed = total(hs)
    return sum(dot(h_k, h_k, weights) for h_k in hs) / dot(summed, summed, weights)


def weight_coherence(h_0: np.ndarray, hs: Vectors, weights: np.ndarray | None = None) -> float:
    """`sum_k <h_0, h_k> / sum_k |h_k|^2` (N-4.3)."""
    return sum(dot(h_0, h_k, weights) for h_k in hs) / sum(dot(h_k, h_k, weights) for h_k in hs)


def span_condition(
    qs: Vectors, products: Vectors, w: np.ndarray, h_0: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """`sigma_max([H q_1 ... H q_k]) |w| / |h_0|` (metrics.md, `krylov`).

    The largest stretch `|H q| / |q|` of any `q` in the span, all norms on the same coordinates. Where the `qs` are
    orthonormal under `weights` that is the plain largest singular value of the products.
    """
    Q = weighted_columns(qs, weights)
    HQ = weighted_columns(products, weights)
    _, R = np.linalg.qr(Q)
    stretch = np.linalg.svd(HQ @ np.linalg.inv(R), compute_uv=False)[0]
    return float(stretch) * norm(w, weights) / norm(h_0, weights)


class Krylov(NamedTuple):
    """What the `krylov` sampler produces: orthonormal directions, finite-difference products, and their evidence."""

    directions: list[np.ndarray]
    products: list[np.ndarray]
    omegas: list[np.ndarray]
    gradients: list[np.ndarray]


def krylov_directions(gradient_fn: Callable[[np.ndarray], np.ndarray], w: np.ndarray, k: int, radius: float) -> Krylov:
    """The `krylov` sampler (metrics.md, "Weight perturbations"), with `radius = |omega_k|` absolute.

    `q_1` is the batch gradient's direction; product k is `(h(w + radius q_k) - h(w)) / radius`; `q_{k+1}` is product k
    made orthonormal to all directions so far. Stops early where nothing is left of a product (an invariant span). For
    exact products pass the linearised `gradient_fn`, `v -> h_0 + H (v - w)`.
    """
    h_0 = gradient_fn(w)
    found = Krylov([], [], [], [])
    candidate = h_0
    while len(found.directions) < k:
        remainder = candidate
        for _ in range(2):
            for q in found.directions:
                remainder = remainder - dot(q, remainder) * q
        if norm(remainder) <= 1e-9 * norm(candidate):
            break
        q = remainder / norm(remainder)
        omega = (w + radius * q) - w
        h_k = gradient_fn(w + omega)
        found.directions.append(q)
        found.omegas.append(omega)
        found.gradients.append(h_k)
        candidate = (h_k - h_0) / radius
        found.products.append(candidate)
    return found


def step_condition(
    h_before: np.ndarray, h_after: np.ndarray, w: np.ndarray, omega: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """`weight_condition` with the one `omega` the optimizer took (N-2.5, p. 37).

    `w` and `h_before` are from before the step; `h_after` may be of another batch (i != j).
    """
    return weight_condition(w, h_before, [h_after], [omega], weights)


# --- batch-dissonance ----------------------------------------------------------------------------------------------


def input_condition(
    H: np.ndarray, shifted: Vectors, X: np.ndarray, deltas: Vectors, weights: np.ndarray | None = None
) -> float:
    """Mean over examples of `max_k |h_i(x_i + delta_k) - h_i| |x_i| / (|delta_k| |h_i|)` (N-3.4, eq. 3.16).

    `H` is (m, P); `shifted[k]` is (m, P), the gradients at the inputs moved by `deltas[k]`, which is (D,) where all
    examples share it and (m, D) where each has its own; `X` is (m, D).
    """
    values = []
    for i in range(len(H)):
        worst = 0.0
        for moved, delta in zip(shifted, deltas, strict=True):
            own = delta if delta.ndim == 1 else delta[i]
            relative_change = norm(moved[i] - H[i], weights) / norm(H[i], weights)
            worst = max(worst, relative_change / (norm(own) / norm(X[i])))
        values.append(worst)
    return sum(values) / len(values)


def stable_rank(A: np.ndarray) -> float:
    """`R(A) = |A|_F^2 / |A|_2^2` by singular values (N-3.7, [B])."""
    singular_values = np.linalg.svd(A, compute_uv=False)
    return float(sum(s**2 for s in singular_values) / max(singular_values) ** 2)


def expected_normal_rank(P: int, B: int) -> float:
    """`R(Y)` of a standard normal P x B matrix, `P B / (sqrt(P) + sqrt(B))^2` (metrics.md, `gradient_rank`)."""
    return P * B / (math.sqrt(P) + math.sqrt(B)) ** 2


def gradient_rank(H: np.ndarray, P: int | None = None, weights: np.ndarray | None = None) -> float:
    """`R(A) / R(Y)`, the columns of A being the rows `h_i` of `H` (N-3.7, [B]).

    `P` is the full number of parameters, also where `H` holds masked coordinates only; None means `H`'s own width.
    """
    B = len(H)
    return stable_rank(weighted_columns(H, weights)) / expected_normal_rank(H.shape[1] if P is None else P, B)


def input_gradient_rank(G: np.ndarray) -> float:
    """`gradient_rank` with the columns `g_i`, given as the rows of the (B, D) `G` (N-3.7, [B])."""
    return stable_rank(weighted_columns(G)) / expected_normal_rank(G.shape[1], len(G))


def batch_means(H: np.ndarray, n: int) -> list[np.ndarray]:
    """Means of the rows over `n` consecutive equal parts; trailing rows left out; n > B counts as n = B."""
    n = min(n, len(H))
    size = len(H) // n
    parts = []
    for part in range(n):
        parts.append(mean([H[row] for row in range(part * size, (part + 1) * size)]))
    return parts


def gradient_confusion(H: np.ndarray, n: int, weights: np.ndarray | None = None) -> float:
    """`-min(0, min_{i<j} cos(hbar_i, hbar_j))` over the `n` batch means (N-3.11, [S])."""
    means = batch_means(H, n)
    worst = 0.0
    for i in range(len(means)):
        for j in range(i + 1, len(means)):
            worst = min(worst, cosine(means[i], means[j], weights))
    return abs(worst)


def gradient_diversity(H: np.ndarray, n: int, weights: np.ndarray | None = None) -> float:
    """`sum |hbar_i|^2 / |sum hbar_i|^2` over the `n` batch means (N-3.12, [Y])."""
    return weight_diversity(batch_means(H, n), weights)


def gradient_coherence(H: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`sum_i <h, h_i> / sum_i |h_i|^2` with `h = mean_i h_i` (N-3.13, [C])."""
    return weight_coherence(mean(H), list(H), weights)


def noise_scale(H: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`tr(Sigma) / |h|^2`, both unbiased ([M]); inf where the unbiased `|h|^2` is <= 0."""
    B = len(H)
    h = mean(H)
    trace = sum(dot(h_i - h, h_i - h, weights) for h_i in H) / (B - 1)
    signal = dot(h, h, weights) - trace / B
    return trace / signal if signal > 0 else math.inf


def gradient_snr(H: np.ndarray) -> float:
    """Median over coordinates of `mean_i(h_i)^2 / var_i(h_i)`, unbiased variance ([P]).

    Coordinates that are 0 for every example are left out; the median of an even number is the mean of the middle two.
    """
    return _median(_signal_to_noise(H))


def gradient_snr_range(H: np.ndarray, rtol: float) -> tuple[float, float]:
    """Between which values `gradient_snr` may be found: coordinates that cancel but for rounding have any ratio.

    Such are the biases of attention's keys. Where there are none, both are `gradient_snr` but for `rtol`.
    """
    largest = np.abs(H).max(0)
    noise = largest < 1e-12 * largest.max()
    ratios = _signal_to_noise(H[:, ~noise])
    lost = int((noise & (largest > 0)).sum())
    lowest, highest = _median([0.0] * lost + ratios), _median(ratios + [math.inf] * lost)
    return lowest * (1 - rtol) - 1e-12, highest * (1 + rtol) + 1e-12


def _signal_to_noise(H: np.ndarray) -> list[float]:
    """The ratio of every coordinate that is not 0 for all examples, sorted."""
    B = len(H)
    ratios = []
    for c in range(H.shape[1]):
        values = [float(H[i, c]) for i in range(B)]
        if all(value == 0 for value in values):
            continue
        average = sum(values) / B
        variance = sum((value - average) ** 2 for value in values) / (B - 1)
        ratios.append(average**2 / variance if variance > 0 else math.inf)
    return sorted(ratios)


def _median(ratios: list[float]) -> float:
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


# --- where the variance comes from, health -------------------------------------------------------------------------


def step_share(h: np.ndarray, h_step: np.ndarray, h_next: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`|h_step - h|^2 / S` with `h_step = h(w + omega, chi)`, `h_next = h(w, chi')` (metrics.md, N's objective 2)."""
    step = norm(h_step - h, weights) ** 2
    batch = norm(h_next - h, weights) ** 2
    return step / (step + batch)


def batch_share(h: np.ndarray, h_step: np.ndarray, h_next: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`|h_next - h|^2 / S`, the other side of `step_share`."""
    step = norm(h_step - h, weights) ** 2
    batch = norm(h_next - h, weights) ** 2
    return batch / (step + batch)


def step_ratio(h: np.ndarray, h_step: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`|h(w + omega, chi) - h(w, chi)| / |h(w, chi)|`."""
    return norm(h_step - h, weights) / norm(h, weights)


def noise_ratio(H: np.ndarray, weights: np.ndarray | None = None) -> float:
    """`noise_scale / B`."""
    return noise_scale(H, weights) / len(H)


def update_ratio(omega: np.ndarray, w: np.ndarray) -> float:
    """`|omega| / |w|`."""
    return norm(omega) / norm(w)


def sharpness(H: np.ndarray, qs: Vectors) -> float:
    """Largest algebraic eigenvalue of the dense Hessian `H` on the span of the orthonormal `qs` (Rayleigh-Ritz)."""
    projected = np.zeros((len(qs), len(qs)))
    for i, left in enumerate(qs):
        for j, right in enumerate(qs):
            projected[i, j] = dot(left, H @ right)
    return float(max(np.linalg.eigvalsh((projected + projected.T) / 2)))


def stability(lr: float, lambda_max: float) -> float:
    """`lr * lambda_max / 2` for SGD."""
    return lr * lambda_max / 2
