"""The monitor: the one place that wires schedule, probes, metrics, alerts and sinks to a training loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError
from gradmon._parameters import trainable
from gradmon._reading import Alert, Reading
from gradmon._types import Batch, Derivative, Loss, Reduction
from gradmon.alerts import Rule
from gradmon.circumstances import circumstances, missing, troubles
from gradmon.describing import described
from gradmon.lockstep import Lockstep, find_team
from gradmon.masks import Mask, as_mask
from gradmon.metrics import Metric
from gradmon.observers import ActiveObserver, Observer, PassiveObserver, Setting
from gradmon.options import (
    asked_alike,
    check_described,
    check_input_module,
    check_monitor,
    check_options,
    choose_monitored,
)
from gradmon.pacing import Pacer
from gradmon.per_example import RULES, Experience, Rules
from gradmon.perturbations.inputs import Ascent, InputSampler
from gradmon.perturbations.weights import WeightSampler
from gradmon.probes import Keep, Memory, StepWatch, Taken
from gradmon.publishing import Failures, OnAlert, Publisher, ended_well
from gradmon.reading import Pending, Reader
from gradmon.schedules import Schedule, budget, every
from gradmon.sinks import Sink
from gradmon.starting import Start
from gradmon.team import Group, Unsharded, is_sharded

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
            itself reveals: norms, `step_condition`, and, by hooks in scheduled steps, how much the examples disagree.
        metrics: ``"default"``, ``"all"`` (also those that take many passes), or names and `Metric` objects.
        schedule: When to look: a `budget`, `every`, `log_spaced`, or any callable from the step's number, counted from
            1; None for ``every(50)``.
        mask: The coordinates to look at: a `Mask`, a fraction in (0, 1], or None for all. ``"default"`` is 0.05;
            without `loss` only for `gradient_snr`, because the examples' inner products come cheaper whole.
        seed: The seed of mask and samplers.
        run: The run's name, for sinks that label what they write.
        rank: This process's rank, likewise; None for its place in `group`.
        sinks: Sinks, or strings such as ``"jsonl:run.jsonl"``, ``"tensorboard:runs/mlp"``, ``"prometheus:9464"``.
        alerts: ``"default"``, or rules.
        on_alert: What else to do about an alert that starts or stops to fire: ``"log"`` it, to the logger ``gradmon``;
            ``"stop"``: also ask for the end of the training when a critical one fires; a function to call with it.
        hparams: What else describes the run: names and numbers, strings or booleans, for the sinks that show them.
        weights: The sampler of weight perturbations; None for `Krylov`: three products at the first probe, then one a
            probe, along the direction in which the gradient changed most at the one before. That finds some 0.7 to 0.9
            of the largest `weight_condition` while batches change; ``Krylov()`` takes three each time, and finds more.
        inputs: The sampler of input perturbations; None for `Ascent()`.
        derivative: ``"finite"`` for differences of gradients, ``"exact"`` for Hessian products.
        micro_batches: n of the metrics over batch means, at least 2.
        reduction: How one value per example becomes the batch loss.
        input_module: The module (or its name) whose output is an example's input x; None to find it.
        layers: Whether to add readings for each layer.
        rules: How the examples' gradients in the uses of a function or module are had; None for `per_example.RULES`.
        max_memory: The most bytes to hold at a time for the examples' gradients, beside what the training itself holds.
        example_dim: Without a `loss`: the dimension of the model's inputs that holds the examples; None for the first.
        group: The processes that train the model together: their examples are one batch, and the first alone writes. A
            `ProcessGroup`, None for this one alone, or ``"auto"``: as `DistributedDataParallel` or ``fully_shard`` say.
        group_timeout: How many seconds to wait for the other processes, before each goes on alone.
        preflight: Whether to say at the first batch if the run will train, as `gradmon.preflight` does: in readings
            ``preflight_...`` and the alerts ``preflight`` and ``stuck``.

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
        schedule: Schedule | budget | None = None,
        mask: Mask | float | Literal["default"] | None = "default",
        seed: int = 0,
        run: str = "run",
        rank: int | None = None,
        sinks: Sink | str | Iterable[Sink | str] | None = None,
        alerts: Literal["default"] | Iterable[Rule] | None = "default",
        on_alert: OnAlert = "log",
        hparams: Mapping[str, str | int | float | bool] | None = None,
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
        group: Group = "auto",
        group_timeout: float = 300.0,
        preflight: bool = False,
    ) -> None:
        self.run, self.rank = run, rank or 0
        self._around = sys.exc_info()[1]
        self.failures = Failures(run)
        self._step = self._resting = 0
        self._watch: StepWatch | None = None
        self._lockstep: Lockstep | None = None
        self._disabled = self._closed = os.environ.get("GRADMON_DISABLED") == "1"
        self._start = Start(False if self._disabled else preflight, model, optimizer, loss, reduction)
        self._publisher = Publisher(None if self._disabled else self._start.rules(alerts), self.failures, on_alert)
        if self._disabled:
            return
        check_options(weights, inputs, derivative, micro_batches, optimizer, layers)
        check_monitor(model, optimizer, loss, reduction, schedule, run, rank, max_memory, example_dim, group_timeout)
        check_described(seed, rules, hparams)
        schedule = every(50) if schedule is None else schedule
        chosen = as_mask(_SAMPLED if mask == "default" else mask, seed)
        if chosen is not None:
            chosen.picks(model)
        self._metrics = metrics = choose_monitored(metrics, optimizer, loss)
        check_input_module(model, input_module)
        self._optimizer, self._example_dim = optimizer, example_dim or 0
        info = described(
            model, optimizer, passive=loss is None, schedule=schedule, mask=chosen, seed=seed, derivative=derivative,
            hparams=hparams or {},
        )  # fmt: skip
        alike = asked_alike(info, metrics, chosen, micro_batches, max_memory)
        team, place, refused = find_team(model, group, alike, group_timeout)
        self.rank = place if rank is None else rank
        self._publisher.writes = place == 0
        experience = Experience(rules=RULES if rules is None else rules, max_memory=max_memory)
        self._setting = Setting(
            model=model,
            optimizer=optimizer,
            mask=chosen,
            weights=weights,
            inputs=Ascent() if inputs is None else inputs,
            derivative=derivative,
            micro_batches=micro_batches,
            input_module=input_module,
            seed=seed,
            memory=Memory(experience, precise=False),
            team=team,
            unsharded=Unsharded(model) if is_sharded(model) else None,
            refused=refused,
        )
        self._reader = Reader(self.failures, layers)

        def observe() -> Observer:
            if loss is None or refused is not None:
                return PassiveObserver(self._setting, metrics, mask == "default", example_dim, self._reader)
            return ActiveObserver(self._setting, loss, reduction, self._reader)

        self._observe, self._observer = observe, observe()
        device = next(iter(trainable(model).values())).device
        self._pacer = pacer = Pacer(schedule, metrics, loss is None, device, self.failures, shared=team is not None)
        if team is not None:
            self._lockstep = Lockstep(team, pacer, self._reader, self._publisher, self._example_dim)
        if optimizer is not None:
            self._watch = StepWatch(optimizer, model, self._keep, self.failures.note)
        self._due: list[Metric] = []
        self._plan()
        try:
            self._publisher.open(sinks, run, self.rank, info)
        except BaseException:
            self._close(False)
            raise

    @property
    def readings(self) -> dict[str, Reading]:
        """The newest reading of each metric, by name; those of layers by ``"name/layer"``."""
        return self._publisher.readings

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that fire now, oldest first."""
        return self._publisher.alerts

    @property
    def should_stop(self) -> bool:
        """Whether to end: a critical alert with ``on_alert="stop"``, or `stop`, asked for it; the same on all ranks."""
        return self._publisher.should_stop if self._lockstep is None else self._lockstep.stops

    def stop(self) -> None:
        """Ask for the end of the training, as a function given as `on_alert` may; see `should_stop`."""
        self._publisher.should_stop = True

    @property
    def coverage(self) -> dict[str, str]:
        """By which way the examples' gradients of each parameter were had, at the last probe that looked at them.

        A function with a rule (``"linear"``), ``"replay"`` or ``"repeat"`` of its call, or ``"unused"``: none arrived.
        """
        return {} if self._disabled else dict(self._setting.memory.experience.coverage)

    @property
    def steps(self) -> int:
        """How many steps have been seen."""
        return self._step

    @property
    def wants_batch(self) -> bool:
        """Whether the batch of the step under way is going to be looked at; where not, `step` may be given None."""
        return not self._closed and (bool(self._due) or self._observer.pending is not None or self._start.waits)

    def step(self, batch: Batch) -> None:
        """Tell the monitor that a step was taken; on scheduled steps, look.

        Args:
            batch: The batch of that step, as `loss` takes it.
        """
        if self._closed:
            return
        self._step += 1
        if self._resting:
            self._resting -= 1
            if not self._resting:
                self._pacer.wake()
            return
        self.failures.guard("step", lambda: self._see(batch), None)
        self._due = []
        self.failures.guard("plan", self._plan, None)

    def before_clipping(self) -> None:
        """Tell a monitor without a `loss` that the gradients are complete, and about to be clipped.

        To be called after each backward pass (with a gradient scaler: after ``unscale_``). Without it the gradients are
        read as the optimizer finds them. With a `loss` they are those of the monitor's own passes.
        """
        if self.wants_batch and self._watch is not None and isinstance(self._observer, PassiveObserver):
            self.failures.guard("before_clipping", self._watch.complete, None)

    def _see(self, batch: Batch) -> None:
        """Look at the step that was taken, and finish what waited for it."""
        self._pacer.enter()
        taken = None if self._watch is None else self._watch.take()
        if self.wants_batch and self._watch is not None:
            self._setting.rates = self._watch.rates
        pending, self._observer.pending = self._observer.pending, None
        if self._lockstep is None:
            self._publisher.publish(self._looked(batch, taken, pending))
            return
        with self._lockstep.round(self._step, batch, taken, self._due, pending) as apart:
            none = None if apart is None else missing(self._due, self._step, pending, apart)
            self._publisher.publish(self._looked(batch, taken, pending) if none is None else none)

    def _looked(self, batch: Batch, taken: Taken | None, pending: Pending | None) -> list[Reading]:
        """The readings of the step that was taken, and those that waited for it."""
        pacer, reader, observer, due = self._pacer, self._reader, self._observer, self._due
        alone = self._lockstep is None and self._setting.refused is None
        readings = self._start.readings(self._step, batch, taken, self._setting.rates, self.failures, alone)
        if readings:
            pacer.ignore()
        if pending is not None:
            lost, number = [metric for metric, _ in pending.waiting], pending.number
            pacer.begin()
            readings += reader.safely("next batch", lambda: observer.finish(pending, batch, taken), lost, number)
            pacer.looked(again=True)
        if due:
            pacer.begin()
            readings += reader.safely("probe", lambda: observer.look(self._step, batch, taken, due), due, self._step)
            own = [*pacer.readings(self._step, pacer.looked()), *troubles(self._step, self.failures, self._publisher)]
            around = circumstances(self._step, self._setting.rates, batch, self._example_dim)
            if self._lockstep is not None:
                around, own = self._lockstep.pooled(self._step, around), self._lockstep.alike(own)
            readings = [*around, *readings, *own]
        return [*readings, *self._start.later(readings)]

    def _keep(self) -> Keep:
        """What is to be kept of the step that the optimizer is about to take."""
        return "nothing" if self._resting else self._start.keep(self._observer.keep(self._due))

    def _plan(self) -> None:
        """See what is due in the coming step, and prepare for it."""
        self._due = self._pacer.due(self._step + 1)
        self.failures.guard("hooks", lambda: self._observer.prepare(self._watch, self._due), None)
        self._pacer.leave(self._observer.listens)
        # Where nothing can be due for a while, neither the optimizer's hook nor `step` does anything, but at first.
        awake = self.wants_batch or self._lockstep is not None or self._step == 0
        self._resting = 0 if awake else self._pacer.rest(self._step)

    def flush(self, seconds: float = 60.0) -> bool:
        """Wait until the sinks have taken all that they were given; whether they have, within some seconds."""
        return self._publisher.flush(seconds)

    def close(self) -> None:
        """Detach from model and optimizer, and close the sinks: the run has come to its end.

        While an exception is on its way, as in a ``finally:``, it says that the run has failed. It waits for the sinks,
        but a minute at most. A second call does nothing.
        """
        self._close(ended_well(sys.exc_info()[1], self._around))

    def _close(self, succeeded: bool) -> None:
        if self._watch is not None:
            self._watch.close()
        if not self._disabled:
            self._observer.close()
        if self._lockstep is not None:
            self._lockstep.close()
        self._publisher.close(None if self._closed else succeeded, self._step)
        self._closed = True

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(ended_well(error, None))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not been interrupted, as plain types.

        The tracked direction has as many numbers as the model; a step that waits for the next batch some times as many.
        """
        if self._disabled:
            return {}
        mask = self._setting.mask
        return {
            "version": 3,
            "step": self._step,
            "mask": None if mask is None else mask.state_dict(),
            "memory": self._setting.memory.state_dict(),
            "pace": self._pacer.state_dict(),
            "pending": None if self._observer.pending is None else self._observer.pending.state_dict(),
            "failed": self._reader.state_dict(),
            "failures": dict(self.failures),
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
        if state.get("version") != 3:
            raise ArgumentError("state", "be of version 3", state.get("version"))
        setting = self._setting
        self._step = int(state["step"])
        if self._step:
            self._start.skip()
        setting.mask = Mask.restored(state["mask"], setting.model)
        setting.memory.load_state_dict(state["memory"])
        self._pacer.load_state_dict(state["pace"])
        self._reader.load_state_dict(state["failed"])
        self.failures.clear()
        self.failures.update({str(where): int(count) for where, count in state["failures"].items()})
        self._observer.close()
        self._observer = self._observe()  # on the coordinates of the mask that was saved
        self._observer.pending = Pending.restored(state["pending"], setting.layout(), self._metrics)
        self._publisher.load_state_dict(state)
        self._plan()
