"""The monitor: the one place that wires schedule, probes, metrics, alerts and sinks to a training loop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError, Unavailable
from gradmon._evidence import BatchGradient, Step, StepPair
from gradmon._objective import Objective
from gradmon._parameters import Weights, check_trains, trainable
from gradmon._reading import Alert, Reading
from gradmon._types import Batch, Derivative, Loss, Reduction
from gradmon.alerts import Rule
from gradmon.masks import Mask, as_mask, check_seed
from gradmon.metrics import Metric
from gradmon.options import (
    check_input_module,
    check_monitor,
    check_options,
    check_rules,
    choose_monitored,
)
from gradmon.per_example import RULES, Experience, Rules
from gradmon.perturbations.inputs import Ascent, InputSampler
from gradmon.perturbations.weights import Krylov, WeightSampler
from gradmon.probes import (
    LISTENED,
    PROBES,
    PassiveProbe,
    Scene,
    StepWatch,
    Taken,
    across,
    gradient_evidence,
    step_evidence,
)
from gradmon.publishing import Failures, Publisher
from gradmon.reading import Pending, Reader
from gradmon.schedules import Schedule, every
from gradmon.sinks import Sink

_SAMPLED = 0.05
"""The part of the coordinates that is looked at unless it is said otherwise."""


class Monitor:
    """Watches the gradient of a model while it trains, without disturbing the training by a single bit.

    Call `step` once after every optimizer step. On scheduled steps the monitor looks at the batch at the weights
    *before* the step: the gradient that the step was made of. Numbers that compare with the next batch
    (`step_share`, `batch_share`, `step_condition`) follow with the next call, under the number of their step.

    Nothing that goes wrong in here stops the training: it is logged once, counted in `failures`, and shown as the
    reading `monitor_failures`. With ``GRADMON_DISABLED=1`` in the environment a monitor does nothing at all.

    Args:
        model: The model.
        optimizer: The optimizer whose steps are looked at; None to go without what needs one.
        loss: ``loss(model, batch)``: a scalar, or one value per example, (B,); None to look only at what the training
            itself reveals: the norms, `step_condition`, and, from hooks that are there for scheduled steps only, how
            much the examples of the batch disagree.
        metrics: ``"default"``, ``"all"`` (also those that take many passes), or names and `Metric` objects.
        schedule: When to look: `every`, `log_spaced`, or any callable from the step's number, counted from 1.
        mask: The coordinates to look at: a `Mask`, a fraction in (0, 1], or None for all. ``"default"`` is 0.05;
            without `loss` only for `gradient_snr`, because the examples' inner products come cheaper whole.
        seed: The seed of mask and samplers.
        run: The run's name, for sinks that label what they write.
        rank: This process's rank, likewise.
        sinks: Sinks, or strings such as ``"jsonl:run.jsonl"``, ``"tensorboard:runs/mlp"``, ``"prometheus:9464"``.
        alerts: ``"default"``, or rules.
        weights: The sampler of weight perturbations; None for `Krylov()`.
        inputs: The sampler of input perturbations; None for `Ascent()`.
        derivative: ``"finite"`` for differences of gradients, ``"exact"`` for Hessian products.
        micro_batches: n of the metrics over batch means, at least 2.
        reduction: How one value per example becomes the batch loss.
        input_module: The module (or its name) whose output is an example's input x; None to find it.
        layers: Whether to add readings for each layer.
        rules: How the examples' gradients in the uses of a function, or in a module of a class, are had; None for
            `gradmon.per_example.RULES`.
        max_memory: The most bytes to hold at a time for the examples' gradients, beside what the training itself holds.
        example_dim: Without a `loss`: the dimension of the tensors that the model is called with that holds the
            examples; None for the first, and refused where that is not clear.

    Raises:
        ArgumentError: An argument is not what it must be.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> with Monitor(model, optimizer, loss, schedule=every(1)) as monitor:
        ...     for batch in [(torch.randn(8, 3), torch.randn(8, 1))] * 3:
        ...         optimizer.zero_grad()
        ...         loss(model, batch).backward()
        ...         optimizer.step()
        ...         monitor.step(batch)
        >>> "step_ratio" in monitor.readings
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        loss: Loss | None = None,
        *,
        metrics: Literal["default", "all"] | str | Metric | Sequence[str | Metric] = "default",
        schedule: Schedule | None = None,
        mask: Mask | float | Literal["default"] | None = "default",
        seed: int = 0,
        run: str = "run",
        rank: int = 0,
        sinks: Sink | str | Iterable[Sink | str] | None = None,
        alerts: Literal["default"] | Iterable[Rule] | None = "default",
        weights: WeightSampler | None = None,
        inputs: InputSampler | None = None,
        derivative: Derivative = "finite",
        micro_batches: int = 8,
        reduction: Reduction = "mean",
        input_module: nn.Module | str | None = None,
        layers: bool = False,
        rules: Rules | None = None,
        max_memory: int = 1 << 28,
        example_dim: int | None = None,
    ) -> None:
        self.run, self.rank = run, rank
        self.failures = Failures(run)
        self._step = 0
        self._watch: StepWatch | None = None
        self._pending: Pending | None = None
        self._disabled = self._closed = os.environ.get("GRADMON_DISABLED") == "1"
        self._publisher = Publisher(None if self._disabled else alerts, self.failures)
        if self._disabled:
            return
        check_options(weights, inputs, derivative, micro_batches, optimizer, layers)
        check_seed(seed)
        if optimizer is not None:
            check_trains(optimizer, trainable(model).values())
        check_monitor(loss, reduction, schedule, run, rank, max_memory, example_dim)
        check_rules(rules)
        trainable(model)
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._schedule: Schedule = every(50) if schedule is None else schedule
        self._mask = as_mask(_SAMPLED if mask == "default" else mask, seed)
        self._whole = mask == "default" and loss is None
        if self._mask is not None:
            self._mask.picks(model)
        self._seed = seed
        self._options: dict[str, Any] = {
            "weight_sampler": Krylov() if weights is None else weights,
            "input_sampler": Ascent() if inputs is None else inputs,
            "derivative": derivative,
            "micro_batches": micro_batches,
            "input_module": input_module,
        }
        self._reduction: Reduction = reduction
        self._reader = Reader(self.failures, layers)
        self._metrics = choose_monitored(metrics, optimizer, loss)
        check_input_module(model, input_module)
        self._publisher.open(sinks, run, rank)
        self._experience = Experience(rules=RULES if rules is None else rules, max_memory=max_memory)
        needed = frozenset(kind for metric in self._metrics for kind in metric.needs)
        self._options |= {"needed": needed, "experience": self._experience}
        self._passive: PassiveProbe | None = None
        if loss is None and needed & LISTENED:
            self._passive = PassiveProbe(
                model, needed, None if self._whole else self._mask, self._mask, micro_batches,
                example_dim, input_module, self._experience,
            )  # fmt: skip
            self._arm()
        if optimizer is not None:
            self._watch = StepWatch(optimizer, model, self._wants_step, loss is None, self.failures.note)

    @property
    def readings(self) -> dict[str, Reading]:
        """The newest reading of each metric, by name; those of layers by ``"name/layer"``."""
        return self._publisher.readings

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that fire now, oldest first."""
        return self._publisher.alerts

    @property
    def coverage(self) -> dict[str, str]:
        """By which way the examples' gradients of each parameter were had at the last probe that looked at them.

        The name of a function for which there is a rule, such as ``"linear"``; ``"replay"`` or ``"repeat"`` where its
        call was made again; ``"unused"`` where no gradient arrived.
        """
        return {} if self._disabled else dict(self._experience.coverage)

    @property
    def steps(self) -> int:
        """How many steps have been seen."""
        return self._step

    def step(self, batch: Batch) -> None:
        """Tell the monitor that a step was taken; on scheduled steps, look.

        Args:
            batch: The batch of that step, as `loss` takes it.
        """
        if self._closed:
            return
        self._step += 1
        began = time.perf_counter()
        taken = None if self._watch is None else self._watch.take()
        pending, self._pending = self._pending, None
        readings: list[Reading] = []
        if pending is not None:
            lost = [metric for metric, _ in pending.waiting]
            readings += self._reader.safely(
                "next batch", lambda: self._finish(pending, batch, taken), lost, pending.number
            )
        due = self._is_due(self._step)
        if due:
            readings += self._reader.safely("probe", lambda: self._probe(batch, taken), self._metrics, self._step)
            readings.append(Reading("probe_seconds", time.perf_counter() - began, self._step))
            readings.append(Reading("monitor_failures", float(sum(self.failures.values())), self._step))
        if readings:
            self._publisher.publish(readings)
        self._arm()

    def _arm(self) -> None:
        """Listen to the passes of the coming step if it is a scheduled one; else leave nothing attached."""
        if self._passive is not None and not self._closed:
            listen = self._passive.arm if self._is_due(self._step + 1) else self._passive.disarm
            self.failures.guard("hooks", listen, None)

    def close(self) -> None:
        """Detach from the optimizer and close the sinks; a second call does nothing."""
        if self._watch is not None:
            self._watch.close()
        if not self._disabled and self._passive is not None:
            self._passive.disarm()
        self._publisher.close()
        self._closed = True
        self._pending = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on, as plain types.

        Numbers that wait for the next batch are not part of it: those of a step probed right before are lost.
        """
        if self._disabled:
            return {}
        return {
            "version": 1,
            "step": self._step,
            "mask": None if self._mask is None else self._mask.state_dict(),
            **self._publisher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved.

        Args:
            state: What `state_dict` returned.

        Raises:
            ArgumentError: The state comes from another version, or its mask does not fit.
        """
        if not state or self._disabled:
            return
        if state.get("version") != 1:
            raise ArgumentError("state", "be of version 1", state.get("version"))
        self._step = int(state["step"])
        if state["mask"] is not None:
            mask = Mask(state["mask"]["fraction"], state["mask"]["seed"])
            mask.load_state_dict(state["mask"])
            mask.picks(self._model)
            self._mask = mask
        else:
            self._mask = None
        self._publisher.load_state_dict(state)
        self._arm()

    def _is_due(self, step: int) -> bool:
        return self.failures.guard("schedule", lambda: bool(self._schedule(step)), False)

    def _wants_step(self) -> bool:
        """Whether the coming step is to be kept: a scheduled one, and in passive mode the one after it."""
        if self._passive is not None:
            self._passive.freeze()
        return self._is_due(self._step + 1) or (self._pending is not None and self._loss is None)

    def _layout(self) -> Weights:
        return Weights(self._model, None if self._mask is None else self._mask.picks(self._model))

    def _probe(self, batch: Batch, taken: Taken | None) -> list[Reading]:
        layout = self._layout()
        if self._loss is None:
            return self._look_passively(layout, taken, batch)
        after = [parameter.detach() for parameter in layout.parameters]
        before = after if taken is None else taken.values
        with Objective(self._model, self._loss, batch, layout, self._reduction, before) as objective:
            scene = Scene(
                objective,
                PROBES,
                optimizer=self._optimizer,
                # Without a step that was seen (a skipped one, under a gradient scaler) there is none to look at.
                after=None if taken is None else after,
                trial=False,
                seed=self._seed + self._step,
                **self._options,
            )
            with contextlib.suppress(Unavailable):  # which every metric then says for itself
                scene.gradient  # noqa: B018 - a loss that fails fails once, and not for every metric again
            return self._look(scene, [value.clone() for value in after])

    def _look(self, scene: Scene, after: list[Tensor]) -> list[Reading]:
        waiting: list[tuple[Metric, list[Any]]] = []
        readings: list[Reading] = []
        for metric in self._metrics:
            if StepPair not in metric.needs:
                readings += self._reader.read(
                    metric, lambda m=metric: [scene.get(kind) for kind in m.needs], self._step
                )
                continue
            # What compares with the next batch waits for it; what is missing already says so now.
            kinds = [Step if kind is StepPair else kind for kind in metric.needs]
            missing = self._reader.read(
                metric, lambda k=kinds: [scene.get(kind) for kind in k], self._step, only_gather=True
            )
            readings += missing
            if not missing:
                waiting.append((metric, [scene.get(kind) for kind in kinds]))
        if waiting:
            state = scene.objective.sandbox.random
            self._pending = Pending(self._step, scene.get(Step), scene.objective.base, after, waiting, state)
        return readings

    def _finish(self, pending: Pending, batch: Batch, taken: Taken | None) -> list[Reading]:
        """The numbers of the last probed step that compare with the batch after it."""
        layout = self._layout()
        if self._loss is None:
            if taken is None:
                return []
            pair = StepPair(pending.step, None, layout.pick(taken.filled(layout)))
        else:
            with Objective(
                self._model, self._loss, batch, layout, self._reduction, pending.before, pending.random
            ) as objective:
                pair = across(pending.step, objective, pending.after, batch)
        readings: list[Reading] = []
        for metric, evidence in pending.waiting:
            whole = [pair if kind is StepPair else seen for kind, seen in zip(metric.needs, evidence, strict=True)]
            readings += self._reader.read(metric, lambda w=whole: w, pending.number)
        return readings

    def _look_passively(self, layout: Weights, taken: Taken | None, batch: Batch) -> list[Reading]:
        """What the training's own passes, gradients and steps reveal, as they are when the optimizer steps."""
        gathered = {} if self._passive is None else self._passive.gather(batch)
        step, finite = None, True
        if taken is not None:
            gradients = taken.filled(layout)
            seen = gradient_evidence(layout, taken.values, gradients, math.nan, 0)
            after = [parameter.detach() for parameter in layout.parameters]
            step = step_evidence(layout, taken.values, after, layout.pick(gradients), None, layout.epsilon)
            gathered |= {BatchGradient: lambda: seen, Step: lambda: step}
            finite = math.isfinite(seen.gradient_norm)

        def gather(kinds: tuple[type, ...]) -> list[Any]:
            if not finite:
                raise Unavailable("non-finite gradient")
            if any(kind not in gathered for kind in kinds):
                raise Unavailable("no optimizer step was taken")
            return [gathered[kind]() for kind in kinds]

        readings: list[Reading] = []
        waiting: list[tuple[Metric, list[Any]]] = []
        for metric in self._metrics:
            if StepPair in metric.needs and finite and step is not None:
                waiting.append((metric, [step]))
            else:
                kinds = tuple(Step if kind is StepPair else kind for kind in metric.needs)
                readings += self._reader.read(metric, lambda k=kinds: gather(k), self._step)
        if waiting and step is not None:
            self._pending = Pending(self._step, step, [], [], waiting, None)
        return readings
