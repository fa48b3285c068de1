"""Perturbations of the weights, omega: where the gradient is taken again.

A sampler's `draw` is a generator: it yields omega, (P,), and is sent back the change of the gradient along it, (P,),
so that a sampler may choose the next one by what the last one did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from gradmon._errors import ArgumentError, Unavailable
from gradmon._tensors import length, wide
from gradmon.perturbations._arguments import check_count, check_radius

Perturbations = Generator[Tensor, Tensor, None]


@dataclass(frozen=True)
class WeightPoint:
    """Where the perturbations start.

    Attributes:
        weights: w, one flat tensor per parameter.
        gradient: The batch gradient h, (P,).
        example: ``example(i)`` is the gradient h_i of one example, (P,).
        examples: The number B of examples.
        generator: The source of randomness, on the CPU.
        product: From a direction v, (P,), to the Hessian product ``H v``; None where only differences are taken.
    """

    weights: Sequence[Tensor]
    gradient: Tensor
    example: Callable[[int], Tensor]
    examples: int
    generator: torch.Generator
    product: Callable[[Tensor], Tensor] | None = None

    @property
    def norm(self) -> float:
        """``||w||``."""
        return math.sqrt(sum(length(part) ** 2 for part in self.weights))


class WeightSampler(Protocol):
    """Draws perturbations of the weights.

    Attributes:
        span: Whether a condition number is the largest over their span rather than over the perturbations.
    """

    span: ClassVar[bool]

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,); is sent the change of the gradient along it, (P,)."""
        ...

    def scaled(self, factor: float) -> WeightSampler:
        """The same perturbations at another radius."""
        ...


@dataclass(frozen=True)
class Random:
    """Normal, with each weight tensor's own mean and standard deviation, times `eta` (Nelson 2022, 2.3).

    Args:
        n: How many.
        eta: The factor.
        scale: Instead of `eta`: the radius ``||omega|| / ||w||`` to stretch each perturbation to.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 16
    eta: float = 1e-3
    scale: float | None = None
    span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_radius("eta", self.eta)
        if self.scale is not None:
            check_radius("scale", self.scale)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,)."""
        for _ in range(self.n):
            parts: list[Tensor] = []
            for part in point.weights:
                noise = torch.randn(part.numel(), generator=point.generator, dtype=torch.float64)
                values = wide(part)
                spread, centre = float(values.std(correction=0)), float(values.mean())
                parts.append(((centre + spread * noise) * self.eta).to(point.gradient))
            yield _stretched(torch.cat(parts), self.scale, point)

    def scaled(self, factor: float) -> Random:
        """The same draws, `factor` times as long."""
        return Random(self.n, self.eta * factor, _times(self.scale, factor))


@dataclass(frozen=True)
class Targeted:
    """``eta * zeta * h_i / ||h_i||`` along the examples' own gradients, zeta = +-1 (Nelson 2022, 2.6).

    Args:
        n: How many: the first n examples of the batch whose gradient is not zero, or all where there are fewer.
        eta: The absolute radius.
        scale: Instead of `eta`: the radius relative to ``||w||``.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 16
    eta: float = 1e-3
    scale: float | None = None
    span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_radius("eta", self.eta)
        if self.scale is not None:
            check_radius("scale", self.scale)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,)."""
        given = 0
        for example in range(point.examples):
            gradient = point.example(example)
            size = length(gradient)
            if size == 0:
                continue
            zeta = 2 * int(torch.randint(2, (1,), generator=point.generator)) - 1
            yield _stretched((wide(gradient) * (self.eta * zeta / size)).to(point.gradient), self.scale, point)
            given += 1
            if given == self.n:
                return

    def scaled(self, factor: float) -> Targeted:
        """The same draws, `factor` times as long."""
        return Targeted(self.n, self.eta * factor, _times(self.scale, factor))


@dataclass(frozen=True)
class Limited:
    """``+-eta * h / ||h||_inf`` along the batch gradient (Nelson 2022, 2.7; the max-norm as written there).

    Args:
        n: How many, 1 or 2: the first with +, the second with -.
        eta: The largest change of one weight.
        scale: Instead of `eta`: the radius ``||omega|| / ||w||``.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 2
    eta: float = 1e-3
    scale: float | None = None
    span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n", self.n, most=2)
        check_radius("eta", self.eta)
        if self.scale is not None:
            check_radius("scale", self.scale)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,).

        Raises:
            Unavailable: The batch gradient is zero.
        """
        gradient = wide(point.gradient)
        largest = float(gradient.abs().max())
        if largest == 0:
            raise Unavailable("zero gradient")
        for zeta in (1.0, -1.0)[: self.n]:
            yield _stretched((gradient * (zeta * self.eta / largest)).to(point.gradient), self.scale, point)

    def scaled(self, factor: float) -> Limited:
        """The same directions, `factor` times as long."""
        return Limited(self.n, self.eta * factor, _times(self.scale, factor))


@dataclass(frozen=True)
class Krylov:
    """The Krylov space of the Hessian, started from the batch gradient; the default.

    The first direction is ``h / ||h||``, every further one is the last change of the gradient, orthogonalised against
    the directions before. The condition number is the largest over their span,
    ``sigma_max([H q_1 ... H q_k]) ||w|| / ||h_0||``: tight, where single perturbations give only a lower bound.

    Args:
        k: How many products.
        scale: The radius relative to ``||w||``.
        start: The first direction, (P,); None for the batch gradient. With the last change of the gradient for it, each
            probe is a further step of the power method.

    Raises:
        ArgumentError: An argument is out of range.
    """

    k: int = 3
    scale: float = 1e-3
    start: Tensor | None = field(default=None, compare=False)
    span: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_radius("scale", self.scale)
        if self.start is not None and (not isinstance(self.start, Tensor) or length(self.start) == 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("start", "be a tensor (P,) that is not zero", type(self.start).__name__)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,); each depends on the change that the one before was answered with.

        Raises:
            ArgumentError: `start` does not have one entry per weight.
            Unavailable: The batch gradient or the weights are zero.
        """
        if self.start is not None and self.start.shape != point.gradient.shape:
            raise ArgumentError("start", f"have {point.gradient.numel()} entries, one per weight", self.start.numel())
        if length(point.gradient) == 0:
            raise Unavailable("zero gradient")
        radius = self.scale * point.norm
        if radius == 0:
            raise Unavailable("zero weights")
        directions: list[Tensor] = []
        following = wide(point.gradient if self.start is None else self.start.to(point.gradient))
        for _ in range(self.k):
            before = length(following)
            for _ in range(2):  # once more: the first time leaves rounding errors of the size of what is left
                for direction in directions:
                    following = following - wide(direction) * float(torch.dot(wide(direction), following))
            size = length(following)
            if size <= before * torch.finfo(point.gradient.dtype).eps ** 0.5 or before == 0:
                return  # the span is invariant: there is nothing new along it
            directions.append((following / size).to(point.gradient))
            change = yield directions[-1] * radius
            following = wide(change)

    def scaled(self, factor: float) -> Krylov:
        """As many products at another radius."""
        return Krylov(self.k, self.scale * factor, self.start)


@dataclass(frozen=True)
class Lanczos:
    """The two ends of the Hessian's spectrum, to a tolerance, by the restarted Lanczos method (ARPACK, through scipy).

    Many exact products (some tens to hundreds), for which ``derivative`` must be ``"exact"``: the slow cross-check of
    the other samplers, for tests and research. Over the span of its two directions `weight_condition` is
    ``||H|| ||w|| / ||h||``, and `sharpness` the largest eigenvalue, both as exact as the tolerance.

    Args:
        tolerance: The relative accuracy of the eigenvalues; 0 for that of the machine.
        scale: The radius relative to ``||w||``, of which an exact product knows nothing.

    Raises:
        ArgumentError: An argument is out of range.
    """

    tolerance: float = 1e-6
    scale: float = 1e-3
    span: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_radius("scale", self.scale)
        if self.tolerance:
            check_radius("tolerance", self.tolerance)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield the eigenvectors of the largest and of the smallest eigenvalue, (P,).

        Raises:
            ArgumentError: There are no exact products.
            Unavailable: The weights are zero, or the method did not converge.
        """
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # pyright: ignore

        product = point.product
        if product is None:
            raise ArgumentError("derivative", 'be "exact" for `Lanczos`', '"finite"')
        radius, size = self.scale * point.norm, point.gradient.numel()
        if radius == 0:
            raise Unavailable("zero weights")

        def multiply(vector: Any) -> Any:
            given = torch.tensor(vector.reshape(-1)).to(point.gradient)
            return wide(product(given)).cpu().numpy()

        if size < 3:  # too small for ARPACK
            for row in torch.eye(size, dtype=point.gradient.dtype, device=point.gradient.device):
                yield row * radius
            return
        start = torch.randn(size, generator=point.generator, dtype=torch.float64).numpy()
        operator: Any = cast("Any", LinearOperator)((size, size), matvec=multiply, dtype="float64")
        try:
            found: Any = cast("Any", eigsh)(operator, k=2, which="BE", v0=start, tol=self.tolerance)
        except ArpackNoConvergence as error:
            raise Unavailable(f"Lanczos' method did not converge: {error}") from error
        for vector in found[1].T[::-1]:
            yield torch.tensor(vector.copy()).to(point.gradient) * radius

    def scaled(self, factor: float) -> Lanczos:
        """The same directions at another radius."""
        return Lanczos(self.tolerance, self.scale * factor)


@dataclass(frozen=True, eq=False)
class Fixed:
    """The caller's own perturbations, as they are.

    Args:
        perturbations: (n, P), in the order of `named_parameters()`, trainable ones only.

    Raises:
        ArgumentError: `perturbations` is not a floating-point matrix with at least one row.
    """

    perturbations: Tensor
    span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self.perturbations
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point() or len(given) == 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("perturbations", "be a floating-point tensor (n, P), n > 0", got)

    def draw(self, point: WeightPoint) -> Perturbations:
        """Yield omega, (P,).

        Raises:
            ArgumentError: The rows do not have one entry per weight.
        """
        size = point.gradient.numel()
        if self.perturbations.shape[1] != size:
            raise ArgumentError("perturbations", f"have {size} columns, one per weight", self.perturbations.shape[1])
        for omega in self.perturbations:
            yield omega.detach().to(point.gradient)

    def scaled(self, factor: float) -> Fixed:
        """The same directions, `factor` times as long."""
        return Fixed(self.perturbations * factor)


def _times(scale: float | None, factor: float) -> float | None:
    return None if scale is None else scale * factor


def _stretched(omega: Tensor, scale: float | None, point: WeightPoint) -> Tensor:
    """The perturbation as it is, or stretched to ``scale * ||w||``."""
    size = length(omega)
    return omega if scale is None or size == 0 else omega * (scale * point.norm / size)
