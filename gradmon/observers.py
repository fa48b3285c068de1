"""How a monitor looks at a step: by passes of its own, or at nothing but the training's own passes and steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._errors import Unavailable
from gradmon._evidence import BatchGradient, Step, StepPair
from gradmon._objective import Objective
from gradmon._parameters import Weights
from gradmon._reading import Reading
from gradmon._tensors import length, ran_out, wide
from gradmon._types import Batch, Derivative, Loss, Reduction
from gradmon.masks import Mask
from gradmon.metrics import Metric
from gradmon.perturbations.inputs import InputSampler
from gradmon.perturbations.weights import Krylov, WeightSampler
from gradmon.probes import (
    EXHAUSTED,
    LISTENED,
    PROBES,
    Keep,
    Memory,
    PassiveProbe,
    Scene,
    StepWatch,
    Taken,
    across,
    gradient_evidence,
    is_plain,
    step_evidence,
)
from gradmon.reading import Pending, Reader, unavailable
from gradmon.team import Team, Unsharded, gathered, passes_talk

_NORMS: frozenset[type] = frozenset({BatchGradient, Step, StepPair})
"""What can be had of gradients and steps alone."""
_UNLIKE = "weights or gradients differ from rank to rank: these do not train one model, or on gradients of their own"
"""Why several ranks cannot be measured as one."""
_OTHERS = "which parameters are trained has changed since the step"
"""Why a step, or the gradient after it, cannot be compared with what is there now."""
_MOVED = "something other than the optimizer has moved the weights since the step"
"""Why the next gradient is not that after the step."""
_NEARLY = 1e-2
"""How far the weights may be from where the step led, relative to its length: put back by who moved them."""
_SHARDED = (
    "the model is sharded by fully_shard, so that its own passes cannot be listened to: give the monitor the loss"
)
"""Why there are no gradients of single examples."""


@dataclass
class Setting:
    """What is looked at, and how; the same for all probes of a monitor.

    Attributes:
        model: The model.
        optimizer: The optimizer whose steps are looked at; None for none.
        mask: The coordinates to look at; None for all.
        weights: The sampler of weight perturbations; None to track the direction along which the gradient changes most.
        inputs: The sampler of input perturbations.
        derivative: How the gradient's change along a weight perturbation is taken.
        micro_batches: Into how many parts the metrics over batch means divide the batch.
        input_module: The module whose output is x; None to find x.
        seed: The seed of the samplers.
        memory: What is remembered from probe to probe.
        team: The ranks that train the model; None for this process alone.
        unsharded: The model, where each rank holds a part of its parameters; None where it holds all.
        refused: Why only the norms can be had, or of a sharded model without a team nothing; None where all can.
        rates: The learning rates of the step that is looked at.
    """

    model: nn.Module
    optimizer: Optimizer | None
    mask: Mask | None
    weights: WeightSampler | None
    inputs: InputSampler
    derivative: Derivative
    micro_batches: int
    input_module: nn.Module | str | None
    seed: int
    memory: Memory
    team: Team | None = None
    unsharded: Unsharded | None = None
    refused: str | None = None
    rates: Sequence[float] = ()

    def layout(self) -> Weights:
        """The layout of `w`."""
        return Weights(self.model, None if self.mask is None else self.mask.picks(self.model))

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """A context in which every rank holds the whole model."""
        return contextlib.nullcontext() if self.unsharded is None else self.unsharded.plain()


class Observer(Protocol):
    """Looks at the steps of a training.

    Attributes:
        pending: The probed step that waits for the next batch.
        listens: Whether hooks are on the model, which make the coming step take longer.
    """

    pending: Pending | None

    @property
    def listens(self) -> bool:
        """Whether hooks are on the model."""
        ...

    def prepare(self, watch: StepWatch | None, metrics: Sequence[Metric]) -> None:
        """Attach what the coming step needs, in which these metrics are due; take off what it does not."""
        ...

    def keep(self, metrics: Sequence[Metric]) -> Keep:
        """What of the coming optimizer step is to be kept; it is about to be taken."""
        ...

    def look(self, number: int, batch: Batch, taken: Taken | None, metrics: Sequence[Metric]) -> list[Reading]:
        """The readings of these metrics for the step that was just taken; some may have to wait for the next batch."""
        ...

    def finish(self, pending: Pending, batch: Batch, taken: Taken | None) -> list[Reading]:
        """The readings that waited for this batch."""
        ...

    def close(self) -> None:
        """Take everything off."""
        ...


class ActiveObserver:
    """Looks by passes of its own, at the weights before the step.

    Args:
        setting: What is looked at, and how.
        loss: The loss.
        reduction: How one value per example becomes the batch loss.
        reader: Makes readings.
    """

    def __init__(self, setting: Setting, loss: Loss, reduction: Reduction, reader: Reader) -> None:
        self._setting, self._loss, self._reader = setting, loss, reader
        self._reduction: Reduction = reduction
        self.pending: Pending | None = None

    @property
    def listens(self) -> bool:
        """Never: a pass of its own costs when it is made."""
        return False

    def prepare(self, watch: StepWatch | None, metrics: Sequence[Metric]) -> None:
        """See in the step after a probed one whether its gradient can be used as it is."""
        if watch is not None and self._follows:
            watch.listen()

    @property
    def _follows(self) -> bool:
        """Whether the gradient of the next step may serve as that of the next batch after the step that waits."""
        return self.pending is not None and self.pending.plain

    def keep(self, metrics: Sequence[Metric]) -> Keep:
        """The weights before a scheduled step; gradients where what compares with the next batch can use them."""
        if not metrics:
            return "both" if self._follows else "nothing"
        # Of several ranks each would have to know that none of the others' gradients were changed.
        pairs = self._setting.team is None and any(StepPair in metric.needs for metric in metrics)
        return "both" if self._follows or pairs else "weights"

    def look(self, number: int, batch: Batch, taken: Taken | None, metrics: Sequence[Metric]) -> list[Reading]:
        """What the passes show."""
        with self._setting.plain():
            return self._look(number, batch, taken, metrics)

    def _look(self, number: int, batch: Batch, taken: Taken | None, metrics: Sequence[Metric]) -> list[Reading]:
        setting, team, layout = self._setting, self._setting.team, self._setting.layout()
        if taken is not None and not taken.fits(layout):
            return unavailable(metrics, _OTHERS, number)
        setting.memory.begin()
        after = [parameter.detach() for parameter in layout.parameters]
        before = after if taken is None else gathered(taken.values)
        if team is not None and setting.memory.checks and team.differ("weights", list(map(length, before))):
            return unavailable(metrics, _UNLIKE, number)
        with (
            Objective(setting.model, self._loss, batch, layout, self._reduction, before, team=team) as objective,
            Scene(
                objective,
                PROBES,
                weight_sampler=self._sampler(layout.total, metrics),
                input_sampler=setting.inputs,
                derivative=setting.derivative,
                micro_batches=setting.micro_batches,
                optimizer=setting.optimizer,
                rates=setting.rates,
                # Without a step that was seen (a skipped one, under a gradient scaler) there is none to look at.
                after=None if taken is None else after,
                trial=False,
                input_module=setting.input_module,
                seed=setting.seed + number,
                needed=frozenset(kind for m in metrics if m.name not in self._reader.given_up for kind in m.needs),
                memory=setting.memory,
            ) as scene,
        ):
            with contextlib.suppress(Unavailable):  # which every metric then says for itself
                scene.gradient  # noqa: B018 - a loss that fails fails once, and not for every metric again
            return self._read(scene, number, [value.clone() for value in after], taken, metrics)

    def _sampler(self, total: int, metrics: Sequence[Metric]) -> WeightSampler:
        """The perturbations of the weights: those asked for, or one product along the direction that is tracked."""
        setting = self._setting
        if setting.weights is not None:
            return setting.weights
        direction = setting.memory.direction
        tracked = direction is not None and direction.numel() == total and not setting.memory.checks
        several = any(metric.name == "weight_diversity" for metric in metrics)
        return Krylov(1, start=direction) if tracked and not several else Krylov()

    def _read(
        self, scene: Scene, number: int, after: list[Tensor], taken: Taken | None, metrics: Sequence[Metric]
    ) -> list[Reading]:
        readings, waiting = self._reader.divide(metrics, lambda kinds, waits: self._seen(scene, kinds, waits), number)
        if waiting:
            state, before = scene.objective.sandbox.random, scene.objective.base
            plain = taken is not None and is_plain(taken, scene)
            signature = scene.objective.weights.signature
            self.pending = Pending(number, scene.get(Step), list(before), after, waiting, state, signature, plain)
        return readings

    def finish(self, pending: Pending, batch: Batch, taken: Taken | None) -> list[Reading]:
        """One pass on the next batch, or two where its gradient after the step is not at hand."""
        with self._setting.plain():
            return self._finish(pending, batch, taken)

    def _finish(self, pending: Pending, batch: Batch, taken: Taken | None) -> list[Reading]:
        if pending.signature != self._setting.layout().signature:
            return pending.missing(_OTHERS)
        try:
            return self._reader.complete(pending, self._pair(pending, batch, taken))
        except Exception as error:
            if not ran_out(error):
                raise
        memory = self._setting.memory
        memory.relieve()
        try:
            return self._reader.complete(pending, self._pair(pending, batch, taken))
        except Exception as error:
            if not ran_out(error):
                raise
        reason = memory.exhausted[StepPair] = EXHAUSTED
        return pending.missing(reason)

    @staticmethod
    def _seen(scene: Scene, kinds: Sequence[type], waits: bool) -> list[Any]:
        try:
            return ActiveObserver._gathered(scene, kinds, waits)
        except Exception as error:
            if scene.objective.team is not None:
                scene.objective.team.trouble(error)
            raise

    @staticmethod
    def _gathered(scene: Scene, kinds: Sequence[type], waits: bool) -> list[Any]:
        if waits and StepPair in scene.memory.exhausted:
            raise Unavailable(scene.memory.exhausted[StepPair])
        return [scene.get(kind) for kind in kinds]

    def _pair(self, pending: Pending, batch: Batch, taken: Taken | None) -> StepPair:
        setting, layout = self._setting, self._setting.layout()
        known = None
        # A step that waits may have been saved by one process alone, which knew its gradients to be those of its batch.
        if (
            setting.team is None
            and taken is not None
            and taken.plain
            and taken.gradients
            and taken.began_at(pending.after)
        ):
            known = taken.filled(layout)
        with Objective(
            setting.model, self._loss, batch, layout, self._reduction, pending.before, pending.random, setting.team
        ) as objective:
            return across(pending.step, objective, pending.after, batch, known)

    def close(self) -> None:
        """Let the step that waits go."""
        self.pending = None


class PassiveObserver:
    """Looks at what the training's own passes, gradients and steps reveal, as they are when the optimizer steps.

    Args:
        setting: What is looked at, and how.
        metrics: All metrics that may be due.
        whole: Whether the examples' inner products are taken over all coordinates, whatever the mask.
        example_dim: The dimension of the model's inputs that holds the examples; None for the first.
        reader: Makes readings.
    """

    def __init__(
        self, setting: Setting, metrics: Sequence[Metric], whole: bool, example_dim: int | None, reader: Reader
    ) -> None:
        self._setting, self._reader = setting, reader
        self.pending: Pending | None = None
        needed = frozenset(kind for metric in metrics for kind in metric.needs)
        self._probe: PassiveProbe | None = None
        self._deaf = setting.refused or (None if setting.unsharded is None else _SHARDED)
        if self._deaf is None and setting.team is not None:
            self._deaf = passes_talk(setting.model)
        if needed & LISTENED and self._deaf is None:
            self._probe = PassiveProbe(
                setting.model, needed, None if whole else setting.mask, setting.mask, setting.micro_batches,
                example_dim, setting.input_module, setting.memory, setting.team, setting.mask if whole else None,
            )  # fmt: skip

    @property
    def listens(self) -> bool:
        """Whether hooks are on the model, which make the coming step take longer."""
        return self._probe is not None and self._probe.armed

    def prepare(self, watch: StepWatch | None, metrics: Sequence[Metric]) -> None:
        """Listen to the passes of the coming step if the examples are to be looked at; else leave nothing attached."""
        if self._probe is not None:
            listens = any(LISTENED.intersection(metric.needs) for metric in metrics)
            (self._probe.arm if listens else self._probe.disarm)()

    def keep(self, metrics: Sequence[Metric]) -> Keep:
        """Weights and gradients of a scheduled step, and of the one after it."""
        if self._probe is not None:
            self._probe.freeze()
        return "both" if metrics or self.pending is not None else "nothing"

    def look(self, number: int, batch: Batch, taken: Taken | None, metrics: Sequence[Metric]) -> list[Reading]:
        """What the training has revealed."""
        # Whole norms of a sharded model take all ranks.
        if self._setting.refused is not None and self._setting.team is None and self._setting.unsharded is not None:
            return unavailable(metrics, self._setting.refused, number)
        layout = self._setting.layout()
        if taken is not None and not taken.fits(layout):
            return unavailable(metrics, _OTHERS, number)
        listened = any(LISTENED.intersection(metric.needs) for metric in metrics)
        held = self._probe.gather(batch) if self._probe is not None and listened else {}
        step, finite = None, True
        if taken is not None:
            gradients, before = gathered(taken.filled(layout)), gathered(taken.values)
            seen = gradient_evidence(layout, before, gradients, math.nan, 0)
            team = self._setting.team
            if team is not None and team.differ("norms", [seen.gradient_norm, seen.parameter_norm]):
                return unavailable(metrics, _UNLIKE, number)
            after = gathered([parameter.detach() for parameter in layout.parameters])
            step = step_evidence(layout, before, after, layout.pick(gradients), None, layout.epsilon)
            held |= {BatchGradient: lambda: seen, Step: lambda: step}
            finite = math.isfinite(seen.gradient_norm)

        def gather(kinds: Sequence[type], waits: bool) -> list[Any]:
            if not finite:
                raise Unavailable("non-finite gradient")
            if self._probe is None and not LISTENED.isdisjoint(kinds):
                raise Unavailable(str(self._deaf))
            if self._setting.refused is not None and not _NORMS.issuperset(kinds):
                raise Unavailable(self._setting.refused)
            if any(kind not in held for kind in kinds):
                raise Unavailable("no optimizer step was taken")
            return [held[kind]() for kind in kinds]

        readings, waiting = self._reader.divide(metrics, gather, number)
        if waiting and step is not None:
            self.pending = Pending(number, step, [], [], waiting, None, layout.signature)
        return readings

    def finish(self, pending: Pending, batch: Batch, taken: Taken | None) -> list[Reading]:
        """The step and the gradient that the optimizer used in the next one."""
        if taken is None:
            return pending.missing("no optimizer step was taken on the next batch")
        layout, step = self._setting.layout(), pending.step
        if pending.signature != layout.signature or not taken.fits(layout):
            return pending.missing(_OTHERS)
        led = wide(step.weights) + wide(step.perturbation)
        if length(wide(layout.pick(gathered(taken.values))) - led) > _NEARLY * length(wide(step.perturbation)):
            return pending.missing(_MOVED)
        return self._reader.complete(pending, StepPair(step, None, layout.pick(gathered(taken.filled(layout)))))

    def close(self) -> None:
        """Take the hooks off, and let the step that waits go."""
        if self._probe is not None:
            self._probe.disarm()
        self.pending = None
