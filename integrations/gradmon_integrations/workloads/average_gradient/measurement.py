"""How much more of the loss a step of the average gradient takes away than the base optimizer's would have."""

from __future__ import annotations

import math
from typing import Protocol

from gradmon._errors import Unavailable
from gradmon._evidence import Step
from gradmon.metrics import Metric
from gradmon.metrics._metric import Value


class Measured(Protocol):
    """An optimizer that compares its steps with others."""

    @property
    def measurement(self) -> Measurement:
        """What it has compared so far."""
        ...


class Measurement:
    """The changes of the loss by the steps so far, and those that the base optimizer's steps would have made.

    ``RD = (mean D_avg - mean D_base) / |mean D_base|`` with ``D = l(w) - l(w')``, both for the same weights w, the same
    batch and the same random numbers; positive where the average gradient takes more of the loss away. Source: the
    paper's Eq. 7, reported with this sign.

    The means run over steps. A step's own RD has no mean over steps: its denominator comes close to zero.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self.steps = 0
        self._base = self._average = 0.0
        self._last: tuple[float, float] | None = None

    def add(self, before: float, base: float, average: float) -> None:
        """Take a step into account.

        Args:
            before: ``l(w)``.
            base: The loss on the same batch after the base optimizer's step.
            average: That after the step that was taken.
        """
        self.steps += 1
        self._last = before - average, before - base
        self._average += self._last[0]
        self._base += self._last[1]

    @property
    def relative_difference(self) -> float:
        """RD over all steps since the start or `reset`; NaN where there is none, see `reason`."""
        return _ratio(self._average, self._base) if self.reason is None else math.nan

    @property
    def last(self) -> float:
        """RD of the last step alone, NaN where there is none."""
        return math.nan if self._last is None else _ratio(*self._last)

    @property
    def reason(self) -> str | None:
        """Why there is no `relative_difference`, if there is none."""
        if self.steps == 0:
            return "no step was measured: AverageGradient(..., measure=True), with at least 2 iterations"
        if self._base == 0:
            return "the base optimizer's steps would not have changed the loss"
        if not (math.isfinite(self._base) and math.isfinite(self._average)):
            return "non-finite loss"
        return None

    def state_dict(self) -> dict[str, float]:
        """The sums, as plain types."""
        return {"steps": self.steps, "base": self._base, "average": self._average}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what was saved."""
        self.reset()
        self.steps, self._base, self._average = int(state["steps"]), float(state["base"]), float(state["average"])


def relative_difference_metric(optimizer: Measured) -> Metric:
    """RD over the steps since the reading before, for ``Monitor(metrics=["step_ratio", ...])``.

    Args:
        optimizer: An `AverageGradient` with ``measure=True``.

    Returns:
        The metric ``relative_difference``: each reading is that of the steps since the last one.
    """
    seen = Measurement()

    def compute(step: Step) -> Value:
        now, before = optimizer.measurement.state_dict(), seen.state_dict()
        if now["steps"] < before["steps"]:  # it was reset
            before = Measurement().state_dict()
        between = Measurement()
        between.load_state_dict({name: now[name] - before[name] for name in now})
        seen.load_state_dict(now)
        if between.reason is not None:
            raise Unavailable(between.reason)
        return Value(between.relative_difference)

    return Metric(
        "relative_difference",
        (Step,),
        compute,
        "high",
        "average gradient, Eq. 7",
        "step-consistency",
        "how much more of the loss the average gradient's steps take away than the base optimizer's would have",
        "where it is about 0, averaging over the step is not worth its passes",
    )


def _ratio(average: float, base: float) -> float:
    return (average - base) / abs(base) if base != 0 else math.nan
