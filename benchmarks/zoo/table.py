"""The zoo's results put together: one entry for each network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo.configurations import DEFAULTS, FAMILIES, SIZES, Configuration, configuration
from benchmarks.zoo.data import limit_of
from benchmarks.zoo.records import FOLDER, read
from benchmarks.zoo.remedies import ANEW_EXPONENTS
from benchmarks.zoo.training import EXPONENTS, HIGH_EXPONENTS
from gradmon.preflight.score import Signs


@dataclass(frozen=True)
class Network:
    """A network of the zoo, and all that is known of it.

    Attributes:
        of: Its configuration.
        grid: The final loss for each exponent of the grid.
        early: The loss after 20 steps, likewise.
        high: The final loss for each of `HIGH_EXPONENTS`; empty where these were not tried.
        high_early: The loss after 20 steps, likewise.
        ranged: The final loss at the learning rate of the range test.
        seen: The numbers of the check.
        anew: Those of the check after it was initialised anew.
        metrics: Further numbers.
        best: The final loss at lr*; None where this was not tried.
        anew_best: The final loss, initialised anew, at its lr*.
        anew_grid: The final loss, initialised anew, for each exponent of `ANEW_EXPONENTS`.
    """

    of: Configuration
    grid: Mapping[float, float]
    early: Mapping[float, float]
    high: Mapping[float, float]
    high_early: Mapping[float, float]
    ranged: float
    seen: Mapping[str, Any]
    anew: Mapping[str, Any]
    metrics: Mapping[str, float]
    best: float | None
    anew_best: float | None
    anew_grid: Mapping[float, float]

    def fails(self, final: float) -> bool:
        """Whether a final loss is a failure."""
        return not final <= limit_of(self.of)

    @property
    def known(self) -> bool:
        """Whether everything that the risk is made of was measured."""
        return None not in (self.seen["half"], self.seen["out_sd"], self.seen["chance"])

    @property
    def runs(self) -> list[Run]:
        """The network at each learning rate of the grid: one run each."""
        return [Run(self, exponent) for exponent in EXPONENTS]

    @property
    def excessive(self) -> list[Run]:
        """The network at learning rates that are far too high for nearly every one."""
        return [Run(self, exponent) for exponent in self.high]


@dataclass(frozen=True)
class Run:
    """A network at one learning rate. What is measured before the first step is the same at all of them.

    Attributes:
        network: The network.
        exponent: log10 of its learning rate over the default.
    """

    network: Network
    exponent: float

    @property
    def final(self) -> float:
        """The final loss."""
        return {**self.network.grid, **self.network.high}[self.exponent]

    @property
    def failed(self) -> bool:
        """Whether it fails."""
        return self.network.fails(self.final)

    @property
    def progress(self) -> float:
        """The loss after 20 steps over the loss at chance."""
        early = {**self.network.early, **self.network.high_early}
        return early[self.exponent] / self.network.seen["chance"]

    @property
    def signs(self) -> Signs:
        """What the risk is made of."""
        seen = self.network.seen
        sharpness = math.log10(DEFAULTS[self.network.of.optimizer] / seen["half"])
        return Signs(self.exponent + 0.5 * sharpness, seen["out_sd"], seen["sig"], seen["relg"], sharpness)


def networks(folder: Path = FOLDER, families: Sequence[str] = FAMILIES) -> list[Network]:
    """All networks that have been trained and measured."""
    stages = ("trained", "excessive", "measured", "remedied")
    trained, excessive, measured, remedied = (read(stage, folder) for stage in stages)
    found: list[Network] = []
    for family in families:
        for number in range(SIZES[family]):
            of = configuration(family, number)
            if of.name not in trained or of.name not in measured:
                continue
            one, two, three = trained[of.name], measured[of.name], remedied.get(of.name)
            over = excessive.get(of.name, {"early": [], "final": []})
            final, early = _numbers(one["final"]), _numbers(one["early"])
            tried = None if three is None else _numbers(three["final"])
            found.append(
                Network(
                    of=of,
                    grid=dict(zip(EXPONENTS, final, strict=False)),
                    early=dict(zip(EXPONENTS, early, strict=False)),
                    high=dict(zip(HIGH_EXPONENTS, _numbers(over["final"]), strict=False)),
                    high_early=dict(zip(HIGH_EXPONENTS, _numbers(over["early"]), strict=False)),
                    ranged=final[-1],
                    seen=two["look"],
                    anew=two["anew"],
                    metrics=two["metrics"],
                    best=None if tried is None else tried[0],
                    anew_best=None if tried is None else tried[1],
                    anew_grid={} if tried is None else dict(zip(ANEW_EXPONENTS, tried[2:], strict=True)),
                )
            )
    return found


def _numbers(held: Sequence[float | None]) -> list[float]:
    """Losses, those that are not finite as NaN."""
    return [math.nan if loss is None else loss for loss in held]
