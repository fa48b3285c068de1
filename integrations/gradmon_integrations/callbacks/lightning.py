"""A callback for Lightning, whether it is imported as ``lightning.pytorch`` or as ``pytorch_lightning``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack

from torch.optim import Optimizer

from gradmon import ArgumentError, Monitor
from gradmon._batches import map_tensors
from gradmon._types import Batch, Loss
from gradmon.sinks import Sink
from gradmon_integrations.callbacks._forwarding import Forwarding
from gradmon_integrations.callbacks._frameworks import framework
from gradmon_integrations.callbacks._options import Options, check_choice, checked
from gradmon_integrations.callbacks._parts import name_of, trained_by
from gradmon_integrations.callbacks._quiet import TrainingStep, repeatable
from gradmon_integrations.callbacks._ranks import for_ranks
from gradmon_integrations.callbacks._session import Session

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _packages() -> list[Any]:
    """Whichever of the two packages is in use, or there; they do not know each other's classes."""
    found = [framework(name, "lightning") for name in _NAMES if name in sys.modules]
    if found:
        return found
    return [framework(_NAMES[0] if importlib.util.find_spec("lightning") else _NAMES[1], "lightning")]


_PACKAGES = _packages()
_Base: Any = type("_Base", tuple(package.Callback for package in _PACKAGES), {})


def _for_both(kind: type) -> type:
    """A class of callbacks that is also one of the package that has been imported since."""
    missing = [base for package in _packages() if not issubclass(kind, base := package.Callback)]
    return type(kind.__name__, (kind, *missing), {"__module__": kind.__module__}) if missing else kind


class GradmonCallback(_Base):
    """Watches the gradient during `Trainer.fit`.

    In automatic optimisation the loss is what `training_step` returns, made again without logging; gradients are those
    before clipping. In manual optimisation, with several optimizers, or where `training_step` takes its batches itself,
    nothing is made again: each optimizer has a monitor without a loss, on the modules that it trains.

    Args:
        loss: ``"training_step"``; or ``loss(module, batch)``, a scalar or one value per example; or None to make no
            passes.
        batch: What is made of the trainer's batch for a `loss` of one's own, and to count the examples; None to take it
            as it is.
        join: Whether the micro-batches of an accumulated step are laid end to end, so that one pass sees all of them.
            It takes as much memory as a step without accumulation would; without it, there are no numbers about single
            examples where gradients are accumulated.
        log: Whether the readings also go to the trainer's loggers.
        **options: Further arguments of `gradmon.Monitor`. `sinks` may be a function of the run's name, and must be one
            where there are several optimizers: their runs are called ``run-optimizer``.

    Attributes:
        monitors: The monitors of the training, by the name of the optimizer; ``""`` where there is only one.

    Raises:
        ArgumentError: An argument is not what it must be.
        GradmonError: Lightning is not installed.

    Example:
        ``Trainer(callbacks=[GradmonCallback(sinks="tensorboard:runs/first")]).fit(module)``
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> GradmonCallback:
        """Make one that each of the packages in use takes for its own."""
        return object.__new__(_for_both(cls))

    def __init__(
        self,
        *,
        loss: Loss | Literal["training_step"] | None = "training_step",
        batch: Callable[[Any], Batch] | None = None,
        join: bool = False,
        log: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if loss is not None and loss != "training_step" and not callable(loss):
            raise ArgumentError("loss", 'be "training_step", callable as loss(module, batch), or None', repr(loss))
        if batch is not None and (not callable(batch) or loss == "training_step"):
            must = "be None, or callable with the trainer's batch beside a `loss` that takes what it returns"
            raise ArgumentError("batch", must, repr(batch))
        check_choice("join", join)
        check_choice("log", log)
        self._loss, self._batch, self._join, self._log = loss, batch, join, log
        self._options = checked(options)
        self._sessions: dict[str, Session] = {}
        self._saved: dict[str, Any] = {}
        self._loaded = self._stepped = self._added = False
        self._module: weakref.ref[Any] | None = None
        self._now: tuple[Batch, int] | None = None
        self._steps = 0

    @property
    def state_key(self) -> str:
        """What its state is called in a checkpoint; another for each run that is watched at the same time."""
        return f"gradmon[{self._options.get('run', 'run')}]"

    @property
    def monitors(self) -> dict[str, Monitor]:
        """The monitors of the training, by the name of the optimizer; ``""`` where there is only one."""
        return {name: session.monitor for name, session in self._sessions.items()}

    @property
    def monitor(self) -> Monitor:
        """The only monitor.

        Raises:
            ArgumentError: There is none, or there are several.
        """
        if len(self._sessions) != 1:
            raise ArgumentError("monitor", "be the only one", f"{len(self._sessions)} monitors")
        return next(iter(self.monitors.values()))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch.

        Raises:
            ArgumentError: An argument does not fit the module or its optimizers.
        """
        self._end(None)
        before = self.state_dict() if self._loaded or self._continues(trainer, pl_module) else {}
        self._sessions, self._saved, self._loaded = {}, {}, False
        self._module = weakref.ref(pl_module)
        self._steps, self._stepped, self._now = trainer.global_step, False, None
        strategy = trainer.strategy
        options = for_ranks(
            self._options, pl_module, getattr(strategy, "model", None), type(strategy).__name__.removesuffix("Strategy")
        )
        if options is None:
            return
        several = len(trainer.optimizers) > 1
        sinks = self._options.get("sinks")
        if several and sinks is not None and not (callable(sinks) and not isinstance(sinks, Sink)):
            must = 'be a function of the run, as in lambda run: f"tensorboard:runs/{run}", for several optimizers'
            raise ArgumentError("sinks", must, repr(sinks))
        try:
            for number, optimizer in enumerate(trainer.optimizers):
                part = trained_by(pl_module, optimizer) if several else pl_module
                name = name_of(part, number) if several else ""
                name = f"optimizer{number}" if name in self._sessions else name
                self._begin(trainer, pl_module, part, optimizer, name, before.get(name), options)
        except BaseException as error:
            self._end(error)
            raise

    def _continues(self, trainer: Any, module: Any) -> bool:
        """Whether a training goes on that was watched before, as when `fit` is called again."""
        return trainer.global_step > 0 and self._module is not None and self._module() is module

    def _begin(
        self,
        trainer: Any,
        module: Any,
        part: Any,
        optimizer: Optimizer,
        name: str,
        state: Mapping[str, Any] | None,
        given: Mapping[str, Any],
    ) -> None:
        options = dict(given)
        if name:
            options["run"] = f"{options.get('run', 'run')}-{name}"
        automatic = module.automatic_optimization
        loss: Any = None if name or self._loss == "training_step" else self._loss
        if self._loss == "training_step" and repeatable(module) and not name:
            dummy = importlib.import_module(f"{_PACKAGES[0].__name__}.loggers.logger").DummyLogger
            loss = TrainingStep(trainer, dummy)
        sinks = [Forwarding(functools.partial(_send, trainer), f"gradmon/{name}" if name else "gradmon")]
        session = Session(
            part, optimizer, loss, options, join=self._join, sinks=sinks if self._log else [], state=state
        )
        self._sessions[name] = session

        def stepped(*_: Any) -> None:
            self._stepped = True
            if not automatic and session.empty:  # another step on the same batch
                self._add(session, 1.0)
            session.stepped()

        session.exit.callback(optimizer.register_step_post_hook(stepped).remove)

    def _add(self, session: Session, weight: float) -> None:
        """Make the batch under way a part of the coming step."""

        def add() -> None:
            batch, number = self._now or (None, 0)
            batch = batch if self._batch is None else self._batch(batch)
            session.add((batch, number) if self._loss == "training_step" else batch, weight)

        if session.monitor.wants_batch:
            session.monitor.failures.guard("batch", add, None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        wanted = any(session.monitor.wants_batch for session in self._sessions.values())
        # The training step may take something out of it.
        self._now = (map_tensors(batch, lambda tensor: tensor), batch_idx) if wanted else None
        self._added = False
        if not pl_module.automatic_optimization:
            for session in self._sessions.values():
                self._add(session, 1.0)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The batch under way has a loss: it is a part of the coming step, however often a closure is called."""
        if pl_module.automatic_optimization and self._now is not None and not self._added:
            self._added = True
            for session in self._sessions.values():
                self._add(session, 1.0 / trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """In manual optimisation, clipping may be what comes next."""
        if not pl_module.automatic_optimization and getattr(trainer.precision_plugin, "scaler", None) is None:
            for session in self._sessions.values():
                if any(p.requires_grad for p in session.model.parameters()):  # not while another optimizer is toggled
                    session.monitor.before_clipping()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """In automatic optimisation, clipping may be what comes next."""
        if pl_module.automatic_optimization:
            for session in self._sessions.values():
                session.monitor.before_clipping()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See whether the training should stop, and whether a gradient scaler has left out a step."""
        self._now = None
        tried, self._steps = trainer.global_step > self._steps, trainer.global_step
        if tried and not self._stepped and pl_module.automatic_optimization:
            for session in self._sessions.values():
                session.stepped()
        self._stepped = False
        stop = any(session.monitor.should_stop for session in self._sessions.values())
        if trainer.world_size > 1 and self._options.get("on_alert", "log") not in ("log", None):
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training has failed."""
        self._end(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The training is over, and its last checkpoint is written."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        for session in self._sessions.values():
            session.close(error)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, as plain types."""
        if self._loaded:
            return self._saved
        return {name: session.monitor.state_dict() for name, session in self._sessions.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what was saved, when the training begins."""
        self._saved, self._loaded = dict(state_dict), True


def _send(trainer: Any, numbers: Mapping[str, float], step: int) -> None:
    """Hand numbers to the trainer's loggers; they count steps from 0."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=step - 1)
