"""When to look: any callable from the step's number to a bool; these are the usual ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradmon._errors import ArgumentError

Schedule = Callable[[int], bool]
"""``schedule(step) -> bool``; steps count from 1. It must depend on the step only."""


@dataclass(frozen=True)
class every:  # noqa: N801 - reads as a word where it is used: schedule=every(50)
    """Every n-th step: n, 2 n, 3 n, ...

    Raises:
        ArgumentError: `n` is not a positive integer.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("n", "be a positive integer", self.n)

    def __call__(self, step: int) -> bool:
        """Whether to look at this step."""
        return step % self.n == 0


@dataclass(frozen=True)
class log_spaced:  # noqa: N801 - as above
    """The steps closest to ``10 ** (i / per_decade)``, i = 0, 1, ...: dense at the start, where most goes wrong.

    Raises:
        ArgumentError: `per_decade` is not a positive integer.
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        per_decade = self.per_decade
        if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("per_decade", "be a positive integer", per_decade)

    def __call__(self, step: int) -> bool:
        """Whether to look at this step."""
        if step < 1:
            return False
        guess = 0
        while round(10 ** (guess / self.per_decade)) < step:
            guess += 1
        return round(10 ** (guess / self.per_decade)) == step
