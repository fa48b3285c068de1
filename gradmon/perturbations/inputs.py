"""Perturbations of the inputs, delta: where an example's gradient is taken again.

A sampler's `draw` prepares what all examples share and returns a function that gives, for one example, a generator:
it yields delta, of the shape of one input, and is sent back the change of that example's gradient along it, (P,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradmon._errors import ArgumentError, Unavailable
from gradmon._tensors import length, wide
from gradmon.perturbations._arguments import check_count, check_radius

Perturbations = Callable[[int], Generator[Tensor, Tensor, None]]


@dataclass(frozen=True)
class InputPoint:
    """Where the perturbations start.

    Attributes:
        x: The inputs, examples first, (B, ...).
        gradients: The gradients of the examples with respect to their own inputs, (B, ...).
        pull: ``pull(i, u)`` is ``J_i^T u``, of the shape of one input, for the Jacobian ``J_i = d h_i / d x_i`` and a
            vector u, (P,).
        generator: The source of randomness, on the CPU.
    """

    x: Tensor
    gradients: Tensor
    pull: Callable[[int, Tensor], Tensor]
    generator: torch.Generator


class InputSampler(Protocol):
    """Draws perturbations of the inputs.

    Attributes:
        examples: How many examples, from the first, are looked at; None for all.
    """

    @property
    def examples(self) -> int | None:
        """How many examples are looked at; None for all."""
        ...

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example."""
        ...


@dataclass(frozen=True)
class Random:
    """Uniform, with the batch's own mean and standard deviation, times `eta`; the same for all examples.

    Args:
        n: How many.
        eta: The factor.
        examples: How many examples, from the first, are looked at; None for all.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 4
    eta: float = 1e-3
    examples: int | None = None

    def __post_init__(self) -> None:
        _check(self.n, self.eta, self.examples)

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example."""
        values = wide(point.x)
        centre, spread = float(values.mean()), float(values.std(correction=0))
        shape = (self.n, *point.x.shape[1:])
        noise = 2 * torch.rand(shape, generator=point.generator, dtype=torch.float64) - 1
        return _shared(list(((centre + spread * math.sqrt(3) * noise) * self.eta).to(point.x)))


@dataclass(frozen=True)
class Targeted:
    """``eta * zeta * g_i / ||g_i||`` along the examples' input gradients (Nelson 2022, 3.5); the same for all examples.

    Args:
        n: How many: the first n examples of the batch whose input gradient is not zero, or all where there are fewer.
        eta: The absolute radius.
        examples: How many examples, from the first, are looked at; None for all.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 4
    eta: float = 1e-3
    examples: int | None = None

    def __post_init__(self) -> None:
        _check(self.n, self.eta, self.examples)

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example.

        Raises:
            Unavailable: All input gradients are zero.
        """
        found: list[Tensor] = []
        for gradient in point.gradients:
            size = length(gradient)
            if size > 0 and len(found) < self.n:
                zeta = 2 * int(torch.randint(2, (1,), generator=point.generator)) - 1
                found.append((wide(gradient) * (self.eta * zeta / size)).to(point.x))
        if not found:
            raise Unavailable("zero input gradient")
        return _shared(found)


@dataclass(frozen=True)
class Toward:
    """``eta * (x_a - x_b)``: part of the way from one example of the batch towards another; the same for all examples.

    Args:
        n: How many pairs, drawn at random.
        eta: The part of the way.
        examples: How many examples, from the first, are looked at; None for all.

    Raises:
        ArgumentError: An argument is out of range.
    """

    n: int = 4
    eta: float = 1e-3
    examples: int | None = None

    def __post_init__(self) -> None:
        _check(self.n, self.eta, self.examples)

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example.

        Raises:
            Unavailable: The batch holds one example only.
        """
        size = len(point.x)
        if size == 1:
            raise Unavailable("batch of one")
        found: list[Tensor] = []
        for _ in range(self.n):
            a = int(torch.randint(size, (1,), generator=point.generator))
            b = (a + 1 + int(torch.randint(size - 1, (1,), generator=point.generator))) % size
            found.append(((wide(point.x[a]) - wide(point.x[b])) * self.eta).to(point.x))
        return _shared(found)


@dataclass(frozen=True)
class Ascent:
    """Each example's input gradient, then k steps of ``J_i^T J_i``, a power iteration; the default.

    The only sampler here whose perturbations differ from example to example, and the one that comes close to the
    largest singular value of ``J_i = d h_i / d x_i``.

    Args:
        k: How many steps.
        scale: The radius relative to ``||x_i||``.
        examples: How many examples, from the first, are looked at; None for all.

    Raises:
        ArgumentError: An argument is out of range.
    """

    k: int = 1
    scale: float = 1e-4
    examples: int | None = None

    def __post_init__(self) -> None:
        _check(self.k, self.scale, self.examples, count="k", radius="scale")

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example."""

        def climb(example: int) -> Generator[Tensor, Tensor, None]:
            direction = point.gradients[example]
            radius = self.scale * length(point.x[example])
            for step in range(self.k + 1):
                size = length(direction)
                if size == 0 or radius == 0:
                    return
                change = yield (wide(direction) * (radius / size)).to(point.x)
                if step < self.k:
                    direction = point.pull(example, change)

        return climb


@dataclass(frozen=True, eq=False)
class Fixed:
    """The caller's own perturbations, as they are.

    Args:
        perturbations: (n, *x.shape[1:]), the same for all examples, or (n, *x.shape), one set for each.
        examples: How many examples, from the first, are looked at; None for all.

    Raises:
        ArgumentError: `perturbations` is not a floating-point tensor with at least one entry along n.
    """

    perturbations: Tensor
    examples: int | None = None

    def __post_init__(self) -> None:
        given = self.perturbations
        if not isinstance(given, Tensor) or given.ndim < 1 or not given.is_floating_point() or len(given) == 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("perturbations", "be a floating-point tensor (n, ...), n > 0", got)
        if self.examples is not None:
            check_count("examples", self.examples)

    def draw(self, point: InputPoint) -> Perturbations:
        """Perturbations for each example.

        Raises:
            ArgumentError: The perturbations have neither the shape of one input nor that of all.
        """
        given = self.perturbations.detach().to(point.x)
        if given.shape[1:] == point.x.shape[1:]:
            return _shared(list(given))
        if given.shape[1:] == point.x.shape:
            return lambda example: _each(list(given[:, example]))
        shape = tuple(point.x.shape)
        raise ArgumentError("perturbations", f"be (n, *{shape[1:]}) or (n, *{shape})", tuple(given.shape))


def _check(n: object, eta: object, examples: object, *, count: str = "n", radius: str = "eta") -> None:
    check_count(count, n)
    check_radius(radius, eta)
    if examples is not None:
        check_count("examples", examples)


def _each(deltas: list[Tensor]) -> Generator[Tensor, Tensor, None]:
    # Not `yield from`, which would hand what is sent on to a list, that has no use for it.
    for delta in deltas:  # noqa: UP028
        yield delta


def _shared(deltas: list[Tensor]) -> Perturbations:
    return lambda example: _each(deltas)
