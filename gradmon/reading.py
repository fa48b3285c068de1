"""From evidence to readings, of which none ever fails."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._evidence import Step, StepPair
from gradmon._parameters import Weights
from gradmon._reading import Reading
from gradmon._snapshot import RandomState
from gradmon._tensors import from_plain, to_plain
from gradmon.measure import readings_from
from gradmon.metrics import Metric
from gradmon.publishing import Failures

_TENSORS = ("weights", "perturbation", "gradient", "after")
"""The tensors among the fields of a `Step`."""
_PATIENCE = 3
"""How many times in a row a metric may fail before it is given up."""


@dataclass(frozen=True)
class Pending:
    """A probed step whose comparison with the next batch is still to come.

    Attributes:
        number: Its number.
        step: The step.
        before: The weights before it; empty without a loss.
        after: The weights after it; likewise.
        waiting: The metrics, each with the evidence that it has already.
        random: The random states that its passes began with; None without a loss.
        plain: Whether the gradient that the optimizer used was that of the batch, and nothing else.
    """

    number: int
    step: Step
    before: list[Tensor]
    after: list[Tensor]
    waiting: list[tuple[Metric, list[Any]]]
    random: RandomState | None
    plain: bool = False

    def state_dict(self) -> dict[str, Any]:
        """It as plain types, without metrics that wait with evidence of other kinds."""
        fields = {field.name: getattr(self.step, field.name) for field in dataclasses.fields(self.step)}
        del fields["coordinates"]
        return {
            "number": self.number,
            "step": {name: to_plain(value) if isinstance(value, Tensor) else value for name, value in fields.items()},
            "before": [to_plain(value) for value in self.before],
            "after": [to_plain(value) for value in self.after],
            "waiting": [m.name for m, evidence in self.waiting if all(seen is self.step for seen in evidence)],
            "random": None if self.random is None else self.random.state_dict(),
            "plain": self.plain,
        }

    @staticmethod
    def restored(state: Mapping[str, Any] | None, layout: Weights, metrics: Sequence[Metric]) -> Pending | None:
        """What was saved, for those metrics that are still wanted; None where there was nothing."""
        if state is None:
            return None
        fields: dict[str, Any] = {
            name: from_plain(value).to(layout.device) if name in _TENSORS and value is not None else value
            for name, value in state["step"].items()
        }
        step = Step(coordinates=layout.coordinates, **fields)
        values = [
            [
                from_plain(value).to(parameter.device)
                for value, parameter in zip(state[name], layout.parameters, strict=False)
            ]
            for name in ("before", "after")
        ]
        waiting = [(m, [step] * len(m.needs)) for m in metrics if m.name in state["waiting"]]
        random = None if state["random"] is None else RandomState.restored(state["random"])
        return Pending(int(state["number"]), step, values[0], values[1], waiting, random, bool(state["plain"]))


class Reader:
    """Makes readings of metrics; where one is not available or fails, NaN with the reason.

    A metric that fails three times in a row is given up: it stays NaN, with the reason, and costs nothing any more.

    Args:
        failures: Where failures are noted.
        layers: Whether to add readings for each layer.

    Attributes:
        given_up: The metrics that are not computed any more, and why.
    """

    def __init__(self, failures: Failures, layers: bool) -> None:
        self._failures, self._layers = failures, layers
        self._in_a_row: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Which metrics have failed, as plain types."""
        return {"in_a_row": dict(self._in_a_row), "given_up": dict(self.given_up)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._in_a_row = Counter({str(name): int(count) for name, count in state["in_a_row"].items()})
        self.given_up = {str(name): str(reason) for name, reason in state["given_up"].items()}

    def safely(
        self, where: str, look: Callable[[], list[Reading]], metrics: Sequence[Metric], step: int
    ) -> list[Reading]:
        """The readings of some metrics; where the look fails as a whole, NaN with the error for each."""
        try:
            return look()
        except Exception as error:
            self._failures.note(where, error)
            return [self._failed(metric, error, step) for metric in metrics]

    def read(
        self, metric: Metric, evidence: Callable[[], list[Any]], step: int, *, gather: bool = False
    ) -> list[Reading]:
        """The readings of one metric.

        Args:
            metric: The metric.
            evidence: Gathers what it needs.
            step: The number of the step.
            gather: Whether only to gather; then there is no reading, unless the evidence cannot be had.
        """
        if metric.name in self.given_up:
            return [Reading(metric.name, math.nan, step, reason=self.given_up[metric.name])]
        try:
            seen = evidence()
            found = [] if gather else readings_from(metric, seen, layers=self._layers, step=step)
        except Unavailable as missing:
            return [Reading(metric.name, math.nan, step, reason=missing.reason)]
        except Exception as error:
            self._failures.note(f"metric {metric.name}", error)
            return [self._failed(metric, error, step)]
        if not gather:
            self._in_a_row.pop(metric.name, None)
        return found

    def complete(self, pending: Pending, pair: StepPair) -> list[Reading]:
        """The readings that waited for the next batch."""
        readings: list[Reading] = []
        for metric, evidence in pending.waiting:
            whole = [pair if kind is StepPair else seen for kind, seen in zip(metric.needs, evidence, strict=True)]
            readings += self.read(metric, lambda w=whole: w, pending.number)
        return readings

    def _failed(self, metric: Metric, error: Exception, step: int) -> Reading:
        reason = f"{type(error).__name__}: {error}"
        self._in_a_row[metric.name] += 1
        if self._in_a_row[metric.name] >= _PATIENCE:
            self.given_up[metric.name] = f"given up after {_PATIENCE} failures in a row: {reason}"
        return Reading(metric.name, math.nan, step, reason=reason)
