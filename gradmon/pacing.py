"""What is due in which step, and what it costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradmon._evidence import (
    BatchGradient,
    Curvature,
    GradientMoments,
    InputGradients,
    InputSweep,
    PerExampleGradients,
    ScaledSweep,
    Step,
    StepPair,
    WeightSweep,
)
from gradmon._reading import Reading
from gradmon.metrics import Metric
from gradmon.publishing import Failures
from gradmon.schedules import Ledger, Schedule, budget, every

_GROUPS: dict[type, str] = {
    BatchGradient: "gradient",
    PerExampleGradients: "examples",
    GradientMoments: "examples",
    InputGradients: "examples",
    WeightSweep: "weights",
    Curvature: "weights",
    Step: "step",
    StepPair: "step",
    ScaledSweep: "scaled",
    InputSweep: "inputs",
}
"""The evidence that is gathered together."""
_ORDER = ("gradient", "examples", "weights", "step", "scaled", "inputs", "other")
"""What costs less first."""
_AROUND = 2.0
"""What a step without a probe costs, over what it takes in here: hooks, calls, what leaves the processor's caches."""
_PASSIVE_ORDER = ("gradient", "step", "examples", "other")
_SETTLING = 3
"""After how many steps ranks with a budget make their first plan; before, no step has been timed."""
_HORIZON = 500
"""How many steps they plan ahead."""
_UNPLANNED = 100
"""After how many steps ranks that have lost each other show again that there is nothing to be shown."""


class Plan(NamedTuple):
    """What ranks that share a budget look at next.

    Attributes:
        step: In which step; they plan anew after it.
        groups: The groups of metrics; empty to plan anew only.
    """

    step: int
    groups: list[str]


class Pacer:
    """Knows the time of the training and of the monitor, and says which metrics are due.

    Args:
        schedule: When to look.
        metrics: All metrics.
        passive: Whether only the training's own passes are looked at.
        device: Where the model is.
        failures: Where errors of the schedule are counted.
        shared: Whether several ranks must look at the same steps: what a budget allows is then planned ahead, by one.
    """

    def __init__(
        self,
        schedule: Schedule | budget,
        metrics: Sequence[Metric],
        passive: bool,
        device: torch.device,
        failures: Failures,
        *,
        shared: bool = False,
    ) -> None:
        self._schedule, self._failures, self._device = schedule, failures, device
        self._budget = schedule if isinstance(schedule, budget) else None
        self._ledger = Ledger() if self._budget is None else self._budget.ledger
        self._groups: dict[str, list[Metric]] = {name: [] for name in (_PASSIVE_ORDER if passive else _ORDER)}
        for metric in metrics:
            groups = {_GROUPS.get(kind, "other") for kind in metric.needs}
            self._groups[max(groups, key=list(self._groups).index)].append(metric)
        self._groups = {name: held for name, held in self._groups.items() if held}
        self._all = list(metrics)
        self._order = list(self._groups)
        self._left: float | None = None
        self._now = self._began = time.perf_counter()
        self._event: Any = None
        self._listened, self._listening = False, 0.0
        self._looked = True
        self._idle, self._resting = 0.0, 0
        self._due: frozenset[str] = frozenset()
        self._plan: Plan | None = Plan(_SETTLING, []) if shared and self._budget is not None else None

    def due(self, step: int) -> list[Metric]:
        """The metrics to look at in the coming step; to be asked once for each step."""
        if self._budget is None:
            schedule: Any = self._schedule
            due = self._failures.guard("schedule", lambda: bool(schedule(step)), False)
            self._due = frozenset(self._order) if due else frozenset()
            return self._all if due else []
        if self._plan is None:
            self._due = self._budget.choose(self._order)
        else:
            self._due = frozenset(self._plan.groups if step == self._plan.step else ()).intersection(self._order)
        if not self._due:
            return []
        chosen = {metric.name for group in self._due for metric in self._groups[group]}
        return [metric for metric in self._all if metric.name in chosen]

    def meets(self, step: int) -> bool:
        """Whether ranks that share a budget plan anew after a step, although nothing was due in it."""
        return self._plan is not None and step >= self._plan.step

    def proposal(self, step: int) -> Plan | None:
        """What this rank would look at next after a step, and when, if the training goes on as fast as before."""
        if self._plan is None or self._budget is None:
            return None
        usual = self._ledger.usual
        if usual <= 0:
            return Plan(step + _SETTLING, [])
        twin, ahead, wait = copy.deepcopy(self._budget), 0, 1
        while ahead < _HORIZON:
            for _ in range(wait):
                twin.ledger.trained(usual)
            ahead += wait
            groups = twin.choose(self._order)
            if groups:
                return Plan(step + ahead, [group for group in self._order if group in groups])
            wait = max(1, ahead // 4)
        return Plan(step + ahead, [])

    def adopt(self, plan: Plan | None, step: int) -> None:
        """Take over what the ranks have agreed on after a step; None where they could not."""
        if self._plan is not None:
            self._plan = Plan(step + _UNPLANNED, list(self._order)) if plan is None else plan

    def enter(self) -> None:
        """A step of the training is over, and the monitor begins its own work."""
        self._now = time.perf_counter()
        self._event, self._listening = None, 0.0
        if self._left is None:
            return
        lasted, usual, steps = self._now - self._left, self._ledger.usual, self._resting + 1
        if self._listened and usual > 0:  # what is beyond the usual is what listening took
            self._listening = max(0.0, lasted - usual)
            lasted = min(lasted, usual)
            self._ledger.spent(self._listening)
        self._ledger.trained(lasted, steps, min(lasted, self._now - self._began))

    def ignore(self) -> None:
        """What came since it was last asked counts for nothing: it was asked for once, and does not come again."""
        self._now = time.perf_counter()

    def begin(self) -> None:
        """Passes of our own begin: on CUDA what was queued before them is the training's."""
        if self._device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(self._device))

    def looked(self, *, again: bool = False) -> float:
        """Passes of our own are over.

        Args:
            again: Whether they belong to the step before, of which a part was still to come.

        Returns:
            How long they, and listening before, took, in seconds.
        """
        took = self._elapsed()
        self._looked = True
        self._ledger.spent(took)
        if not again:
            took += self._listening
        if self._budget is not None:
            groups = {"step"} if again else self._due
            self._budget.looked([g for g in self._order if g in groups] or self._order[-1:], took, more=again)
        return took

    def _elapsed(self) -> float:
        """The seconds since the last time it was asked, without those that the training's own work on CUDA took."""
        before, self._now = self._now, time.perf_counter()
        took = self._now - before
        if self._event is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(self._device))
            end.synchronize()  # nothing is in flight any more where numbers have been read
            waited = max(0.0, took - self._event.elapsed_time(end) / 1e3)
            self._event = None
            self._ledger.total += waited
            took -= waited
        return took

    def leave(self, listens: bool) -> None:
        """The monitor is done with this step, and is going to listen to the next one, or not."""
        elapsed = self._elapsed()
        if not self._looked:
            elapsed *= _AROUND
            self._idle = elapsed if self._idle == 0 else 0.9 * self._idle + 0.1 * elapsed
        self._ledger.spent(elapsed)
        self._left = self._began = self._now
        self._listened, self._looked, self._resting = listens, False, 0

    def rest(self, step: int) -> int:
        """How many steps after this one it need not be told of, because nothing is due in them, nor just after them."""
        if isinstance(self._schedule, every):
            self._resting = max(0, self._schedule.following(step) - step - 2)
        elif self._budget is not None and self._plan is None:
            self._resting = self._budget.rest(self._idle)
        return self._resting

    def wake(self) -> None:
        """The last step of a rest is over: the next one alone shows how long a step takes, without earlier pauses."""
        self._began = time.perf_counter()

    def readings(self, step: int, took: float) -> list[Reading]:
        """What the monitor itself costs."""
        return [
            Reading("probe_seconds", took, step),
            Reading("monitor_overhead", self._ledger.overhead, step)
            if self._ledger.steps
            else Reading("monitor_overhead", float("nan"), step, reason="no step has been timed yet"),
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain types."""
        return {} if self._budget is None else self._budget.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved; what has come since the last step, to make a run ready for instance, is nobody's."""
        self._left, self._looked, self._idle = None, True, 0.0
        self.ignore()
        if state and self._budget is not None:
            self._budget.load_state_dict(state)
        if self._plan is not None:
            self._plan = Plan(0, [])  # the next step is beyond it
