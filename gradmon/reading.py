"""From evidence to readings, of which none ever fails."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradmon._errors import Unavailable, told
from gradmon._evidence import Step, StepPair, evidence_from_plain, evidence_to_plain
from gradmon._parameters import Weights
from gradmon._reading import NOT_TRAINED, Reading
from gradmon._snapshot import RandomState
from gradmon._tensors import from_plain, to_plain
from gradmon.measure import readings_from
from gradmon.metrics import Metric
from gradmon.publishing import Failures

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
        signature: What the weights consist of.
        plain: Whether the gradient that the optimizer used was that of the batch, and nothing else.
    """

    number: int
    step: Step
    before: list[Tensor]
    after: list[Tensor]
    waiting: list[tuple[Metric, list[Any]]]
    random: RandomState | None
    signature: list[str]
    plain: bool = False

    def state_dict(self) -> dict[str, Any]:
        """It as plain types."""
        evidence: list[Any] = [self.step]
        waiting: dict[str, list[int]] = {}
        for metric, held in self.waiting:
            for seen in held:
                if not any(seen is other for other in evidence):
                    evidence.append(seen)
            waiting[metric.name] = [next(i for i, e in enumerate(evidence) if e is seen) for seen in held]
        return {
            "number": self.number,
            "evidence": [evidence_to_plain(seen) for seen in evidence],
            "before": [to_plain(value) for value in self.before],
            "after": [to_plain(value) for value in self.after],
            "waiting": waiting,
            "random": None if self.random is None else self.random.state_dict(),
            "signature": self.signature,
            "plain": self.plain,
        }

    @staticmethod
    def restored(state: Mapping[str, Any] | None, layout: Weights, metrics: Sequence[Metric]) -> Pending | None:
        """What was saved, for those metrics that still want the same; None where there was nothing."""
        if state is None:
            return None
        evidence = [evidence_from_plain(seen, layout.coordinates, layout.device) for seen in state["evidence"]]
        values = [
            [
                from_plain(value).to(parameter.device)
                for value, parameter in zip(state[name], layout.parameters, strict=False)
            ]
            for name in ("before", "after")
        ]
        waiting: list[tuple[Metric, list[Any]]] = []
        for metric in metrics:
            held = [evidence[place] for place in state["waiting"].get(metric.name, [])]
            if StepPair in metric.needs and list(map(type, held)) == at_first(metric):
                waiting.append((metric, held))
        random = None if state["random"] is None else RandomState.restored(state["random"])
        return Pending(
            int(state["number"]), evidence[0], values[0], values[1], waiting, random,
            list(state["signature"]), bool(state["plain"]),
        )  # fmt: skip

    def missing(self, reason: str) -> list[Reading]:
        """NaN with a reason for all that waits."""
        return unavailable([metric for metric, _ in self.waiting], reason, self.number)


def unavailable(metrics: Sequence[Metric], reason: str, step: int) -> list[Reading]:
    """NaN with a reason for some metrics."""
    return [Reading(metric.name, math.nan, step, reason=reason) for metric in metrics]


def at_first(metric: Metric) -> list[type]:
    """The evidence that a metric needs and that is there before the next batch."""
    return [Step if kind is StepPair else kind for kind in metric.needs]


class Reader:
    """Makes readings of metrics; where one is not available or fails, NaN with the reason.

    A metric that fails three times in a row is given up: it stays NaN, with the reason, and costs nothing any more. A
    layer that is frozen, and so has no number any more, gets NaN once, so that its last number does not stay for good.

    Args:
        failures: Where failures are noted.
        layers: Whether to add readings for each layer.

    Attributes:
        given_up: The metrics that are not computed any more, and why.
    """

    def __init__(self, failures: Failures, layers: bool) -> None:
        self._failures, self._layers = failures, layers
        self._in_a_row: Counter[str] = Counter()
        self._had: dict[str, list[str]] = {}
        self.given_up: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Which metrics have failed, and the layers that had numbers, as plain types."""
        layers = {name: list(layers) for name, layers in self._had.items()}
        return {"in_a_row": dict(self._in_a_row), "given_up": dict(self.given_up), "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._in_a_row = Counter({str(name): int(count) for name, count in state["in_a_row"].items()})
        self.given_up = {str(name): str(reason) for name, reason in state["given_up"].items()}
        self._had = {str(name): list(map(str, layers)) for name, layers in state.get("layers", {}).items()}

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
        if gather:
            return found
        self._in_a_row.pop(metric.name, None)
        return found + self._gone(metric, found, step)

    def _gone(self, metric: Metric, found: Sequence[Reading], step: int) -> list[Reading]:
        """NaN for layers that had a number of a metric the last time, and have none now."""
        before = self._had.get(metric.name, [])
        now = self._had[metric.name] = [reading.layer for reading in found if reading.layer is not None]
        gone = sorted(set(before) - set(now))
        return [Reading(metric.name, math.nan, step, layer, reason=NOT_TRAINED) for layer in gone]

    def divide(
        self, metrics: Sequence[Metric], gather: Callable[[Sequence[type], bool], list[Any]], step: int
    ) -> tuple[list[Reading], list[tuple[Metric, list[Any]]]]:
        """The readings that can be had at once; what is missing already says so now.

        Args:
            metrics: The metrics.
            gather: Gathers evidence of some kinds, for a metric that waits for the next batch, or does not.
            step: The number of the step.

        Returns:
            The readings, and the metrics that wait for the next batch, each with the evidence that it has already.
        """
        readings: list[Reading] = []
        waiting: list[tuple[Metric, list[Any]]] = []
        for metric in metrics:
            waits, held = StepPair in metric.needs, list[Any]()

            def evidence(m: Metric = metric, w: bool = waits, into: list[Any] = held) -> list[Any]:
                into[:] = gather(at_first(m), w)
                return into

            found = self.read(metric, evidence, step, gather=waits)
            readings += found
            if waits and not found:
                waiting.append((metric, held))
        return readings, waiting

    def complete(self, pending: Pending, pair: StepPair) -> list[Reading]:
        """The readings that waited for the next batch."""
        readings: list[Reading] = []
        for metric, evidence in pending.waiting:
            whole = [pair if kind is StepPair else seen for kind, seen in zip(metric.needs, evidence, strict=True)]
            readings += self.read(metric, lambda w=whole: w, pending.number)
        return readings

    def _failed(self, metric: Metric, error: Exception, step: int) -> Reading:
        reason = told(error)
        self._in_a_row[metric.name] += 1
        if self._in_a_row[metric.name] >= _PATIENCE:
            self.given_up[metric.name] = f"given up after {_PATIENCE} failures in a row: {reason}"
        return Reading(metric.name, math.nan, step, reason=reason)
