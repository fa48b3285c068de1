"""Inner products that can be trusted: accumulated in float64, reweighted under a mask, split by layer."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradmon._errors import OUT_OF_MEMORY, Unavailable, told

_CHUNK = 1 << 20
_WORTH_HALVING = 1 << 23
"""The multiplications from which on a product in pieces takes less time than in one call."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def working(tensor: Tensor) -> Tensor:
    """The tensor in at least float32, where sums and differences of half-precision numbers keep their digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def ran_out(error: Exception) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, Unavailable):
        return error.reason == OUT_OF_MEMORY
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in told(error)


def to_plain(tensor: Tensor) -> dict[str, Any]:
    """A tensor as plain types that any file format holds: its numbers as base64."""
    held = tensor.detach().cpu().contiguous()
    data = base64.b64encode(held.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")
    return {"dtype": str(held.dtype).removeprefix("torch."), "shape": list(held.shape), "data": data}


def from_plain(state: Mapping[str, Any]) -> Tensor:
    """What `to_plain` was given, on the CPU."""
    data, dtype = bytearray(base64.b64decode(state["data"])), getattr(torch, state["dtype"])
    if not data:  # of which `frombuffer` makes nothing
        return torch.empty(state["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(state["shape"])


def symmetric(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` of a matrix, (n, n); on a CPU little more than half of it is worked out, where that pays."""
    count, columns = rows.shape
    if rows.device.type != "cpu" or count < 64 or count * count * columns < _WORTH_HALVING:
        return rows @ rows.T
    found, step = rows.new_empty(count, count), 64 if count >= 128 else 32
    for start in range(0, count, step):
        end = start + step
        torch.mm(rows[start:end], rows[:end].T, out=found[start:end, :end])
        if start:
            found[:start, start:end] = found[start:end, :start].T
    return found


def length(tensor: Tensor) -> float:
    """The 2-norm of all entries, accumulated in float64."""
    return math.sqrt(sum(float(wide(part).square().sum()) for part in torch.split(tensor.reshape(-1), _CHUNK)))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(matrix))  # pyright: ignore[reportUnknownMemberType]
    return values, vectors


def largest_eigenvalue(matrix: Tensor) -> float:
    """The largest eigenvalue of a symmetric positive matrix, (n, n), float64; of a large one by Lanczos' method."""
    count = len(matrix)
    if count <= 512:
        return float(eigh(matrix)[0][-1])
    from scipy.sparse.linalg import eigsh  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    start = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    find = cast("Any", eigsh)
    return float(find(matrix.cpu().numpy(), k=1, which="LA", v0=start, return_eigenvectors=False)[0])


def gram(rows: Tensor | Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """All inner products of some vectors.

    Args:
        rows: The vectors, (n, k), or n of shape (k,).
        weight: A factor for each coordinate, (k,); None for ones.

    Returns:
        ``rows @ diag(weight) @ rows.T``, (n, n), float64.
    """
    count, size = len(rows), rows[0].numel()
    total: Tensor | float = 0.0
    step = max(1, _CHUNK // count)
    for start in range(0, size, step):
        part = torch.stack([wide(row[start : start + step]) for row in rows])
        scaled = part if weight is None else part * weight[start : start + step].to(part.device)
        total = scaled @ part.T + total
    if not isinstance(total, Tensor):
        return torch.zeros(count, count, dtype=torch.float64)
    return (total + total.T) / 2


def largest_quotient(above: Tensor, below: Tensor) -> tuple[float, Tensor]:
    """The largest ``c.A c / c.B c``: the largest eigenvalue of ``A c = lambda B c``.

    Args:
        above: A, symmetric, (n, n), float64.
        below: B, symmetric and positive, (n, n), float64; directions in which it vanishes are left out.

    Returns:
        The quotient, and its c, (n,).
    """
    sizes = below.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    values, vectors = eigh(below / sizes / sizes[:, None])
    kept = values > 1e-10 * values[-1]
    basis = vectors[:, kept] / values[kept].sqrt() / sizes[:, None]
    quotients, inner = eigh(basis.T @ above @ basis)
    return float(quotients[-1]), basis @ inner[:, -1]


@dataclass(frozen=True)
class Coordinates:
    """Which coordinates of `w` a vector holds, and how they count.

    Attributes:
        segments: For each tensor of `w`, in order: its layer, its number of coordinates here, its full size.
        weight: ``numel_t / k_t`` for each coordinate, (k,), float64; None where all of `w` is held.
        total: The number P of entries of `w`.
    """

    segments: tuple[tuple[str, int, int], ...]
    weight: Tensor | None
    total: int

    def _chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, size, _CHUNK):
            yield slice(start, start + _CHUNK)

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two vectors, (k,) each; reweighted so that its mean over masks is the full one."""
        total = 0.0
        for part in self._chunks(a.numel()):
            left = wide(a[part])
            right = left if a is b else wide(b[part])
            if self.weight is not None:
                right = right * self.weight[part].to(right.device)
            total += float(torch.dot(left, right))
        return total

    def norm(self, a: Tensor) -> float:
        """The 2-norm that belongs to `dot`."""
        return math.sqrt(self.dot(a, a))

    def gram(self, rows: Tensor | Sequence[Tensor]) -> Tensor:
        """All inner products of some vectors, (n, n), float64."""
        return gram(rows, self.weight)

    def squares_by_layer(self, a: Tensor) -> dict[str, float]:
        """The squared norm of a vector, split by layer; the parts add up to ``dot(a, a)``."""
        squares: dict[str, float] = {}
        start = 0
        for layer, held, full in self.segments:
            if held:
                part = wide(a[start : start + held])
                squares[layer] = squares.get(layer, 0.0) + float((part * part).sum()) * (full / held)
            start += held
        return squares

    def shares_by_layer(self, a: Tensor) -> dict[str, float]:
        """Each layer's part of the squared norm, between 0 and 1; empty for a zero vector."""
        squares = self.squares_by_layer(a)
        total = sum(squares.values())
        return {layer: square / total for layer, square in squares.items()} if total > 0 else {}
