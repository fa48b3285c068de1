"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import torch

from gradmon import ArgumentError, GradmonError, Monitor
from gradmon._types import Batch, Loss
from gradmon.team import is_sharded
from gradmon_integrations.callbacks._accumulation import Kind
from gradmon_integrations.callbacks._calls import (
    Call,
    Calls,
    model_loss,
    shares,
    trainer_loss,
    watch_model,
    watch_trainer,
)
from gradmon_integrations.callbacks._clipping import watch_clipping
from gradmon_integrations.callbacks._forwarding import Forwarding
from gradmon_integrations.callbacks._frameworks import framework
from gradmon_integrations.callbacks._options import Options, check_choice, checked
from gradmon_integrations.callbacks._precision import in_full_precision
from gradmon_integrations.callbacks._ranks import for_ranks
from gradmon_integrations.callbacks._session import Session, abandoned

_LOG = logging.getLogger("gradmon")
_TRANSFORMERS: Any = framework("transformers", "transformers")
_Base: Any = _TRANSFORMERS.TrainerCallback


class GradmonCallback(_Base):
    """Watches the gradient during `Trainer.train`.

    The loss is the one that the model returns, called again with what the Trainer called it with; by what the Trainer
    multiplies it is seen in the backward pass. Where the Trainer makes the loss (label smoothing, `compute_loss_func`,
    a `compute_loss` of its own), use `attach`.

    What a resumed training needs is written into each checkpoint, as ``gradmon.pt``, and found there again.

    A Trainer does not tell its callbacks of an exception. Then the monitor ends with the next training, with the
    Trainer, or at once where the callback is used as a context manager, or by `attach`.

    Args:
        loss: ``"trainer"`` for the Trainer's; or ``loss(model, batch)``, a scalar or one value per example; or None to
            make no passes.
        batch: What is made of the arguments by name that the model was called with, for a `loss` of one's own; None to
            take them as they are, as a dictionary.
        join: Whether the micro-batches of an accumulated step are laid end to end, so that one pass sees all of them.
            It takes as much memory as a step without accumulation would; without it, there are no numbers about single
            examples where gradients are accumulated.
        trainer: The Trainer, if it is there already; `attach` gives it.
        log: Whether the readings also go to `Trainer.log`; for `attach`.
        **options: Further arguments of `gradmon.Monitor`. `sinks` may be a function of the run's name.

    Raises:
        ArgumentError: An argument is not what it must be.
        GradmonError: transformers is not installed.

    Example:
        ``Trainer(..., callbacks=[GradmonCallback(sinks="tensorboard:runs/first")]).train()``
    """

    def __init__(
        self,
        *,
        loss: Loss | Literal["trainer"] | None = "trainer",
        batch: Callable[[Any], Batch] | None = None,
        join: bool = False,
        trainer: Any = None,
        log: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if loss is not None and loss != "trainer" and not callable(loss):
            raise ArgumentError("loss", 'be "trainer", callable as loss(model, batch), or None', repr(loss))
        if batch is not None and (not callable(batch) or loss == "trainer"):
            must = "be None, or callable with the model's arguments beside a `loss` that takes what it returns"
            raise ArgumentError("batch", must, repr(batch))
        check_choice("join", join)
        check_choice("log", log)
        if log and trainer is None:
            raise ArgumentError("log", "be False without the Trainer that logs: use attach(trainer, log=True)", log)
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self._log = log
        self._loss, self._batch, self._join = loss, batch, join
        self._options = checked(options)
        self._session: Session | None = None
        self._calls: Calls | None = None
        self._numbers: dict[str, float] = {}
        self._end: weakref.finalize[Any, Any] | None = None
        self._shares: Callable[[Call], bool] | None = None
        self._shared: Kind | None = None
        self._scaled = False

    @property
    def monitor(self) -> Monitor:
        """The monitor of the training under way, or of the last one.

        Raises:
            ArgumentError: No training has begun, or not on this rank.
        """
        if self._session is None:
            raise ArgumentError("monitor", "be asked for when the training has begun", "none yet")
        return self._session.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin to watch.

        Raises:
            ArgumentError: An argument does not fit the model or its optimizer.
        """
        self.close(RuntimeError("the training before ended without telling its callbacks"))
        trainer = None if self._trainer is None else self._trainer()
        options = _options(self._options, args, given["model"], trainer)
        if options is None:
            return
        optimizer = given["optimizer"]
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        model, self._scaled = given["model"], bool(args.fp16)
        loss: Any = self._loss
        if loss == "trainer":
            loss = model_loss if trainer is None else functools.partial(trainer_loss, trainer.compute_loss)
        loss = None if loss is None else in_full_precision(loss)
        numbers = self._numbers = {}
        sinks = [Forwarding(lambda found, _: numbers.update(found))] if self._log else []
        session = Session(model, optimizer, loss, options, join=self._join, sinks=sinks, state=_saved(args, state))
        self._session, self._calls = session, Calls(session.monitor)
        self._end = weakref.finalize(self, abandoned, session)
        own = trainer is not None and self._loss == "trainer"
        self._shares = self._shared = None
        several = args.gradient_accumulation_steps > 1
        if self._join and loss is not None and several and not is_sharded(model):
            self._shares = functools.partial(shares, loss, model, self._given)
        session.exit.callback(watch_trainer(trainer, self._calls) if own else watch_model(model, self._calls))
        if loss is None and not self._scaled:
            session.exit.callback(watch_clipping(model, session.monitor))

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A micro-batch is over, but not the step."""
        self._settle()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The optimizer has taken its step, or a gradient scaler has left it out."""
        self._settle()
        if self._session is not None:
            self._session.stepped()

    def _settle(self) -> None:
        """Make the micro-batch under way a part of the coming step."""
        session, made = self._session, [] if self._calls is None else self._calls.take()
        if session is None or not session.monitor.wants_batch:
            return
        try:
            if not made:
                raise GradmonError("No call of the model was seen: where it is wrapped, use attach(trainer).")
            if len(made) > 1 and self._loss is not None:
                raise GradmonError(f"The model was called {len(made)} times for one batch: use attach(trainer).")
            call, weight = made[-1].call, made[-1].weight
            share = call.kwargs.get("num_items_in_batch") is not None
            kind = self._share(call) if share else "mean"
            if self._loss == "trainer" and weight is None:
                raise GradmonError(
                    "The loss that is trained is not the one that the model returns: use attach(trainer), or `loss`."
                )
            found = 1.0 if share else None
            if self._loss == "trainer" and weight is not None and not self._scaled:
                found = float(weight)  # a scaler multiplies by what is not known here
            session.add(self._given(call), found, kind)
        except Exception as error:
            session.monitor.failures.note("batch", error)

    def _share(self, call: Call) -> Kind:
        """What the loss of a micro-batch is that is told how many items the step has; found out where it matters."""
        if self._shared is None and self._shares is not None and self._session is not None:
            shares = functools.partial(self._shares, call)
            self._shared = "share" if self._session.monitor.failures.guard("join", shares, False) else "unknown"
        return self._shared or "unknown"

    def _given(self, call: Call) -> Batch:
        """A call as the loss takes it."""
        if self._loss == "trainer":
            return call
        held: Any = call.kwargs if call.kwargs else call.args
        return held if self._batch is None else self._batch(held)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See whether the training should stop, and log what was read."""
        trainer = None if self._trainer is None else self._trainer()
        if self._session is not None and trainer is not None and self._numbers:
            numbers, due = dict(self._numbers), control.should_log
            self._numbers.clear()
            self._session.monitor.failures.guard("log", lambda: trainer.log(numbers), None)
            control.should_log = due  # which logging takes back
        stop = self._session is not None and self._session.monitor.should_stop
        if args.world_size > 1 and self._options.get("on_alert", "log") not in ("log", None):
            flag = torch.tensor(float(stop), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        if stop:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put what a resumed training needs into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        session = self._session
        if session is not None and folder.is_dir() and state.is_world_process_zero:
            session.monitor.failures.guard(
                "checkpoint", lambda: torch.save(session.monitor.state_dict(), folder / "gradmon.pt"), None
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The training has come to its end."""
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """End the watch; where there is none, do nothing.

        Args:
            error: What ended the training; None where it came to its end.
        """
        if self._end is not None:
            self._end.detach()
            self._end = None
        self._shares = None
        if self._session is not None:
            self._session.close(error)

    def __enter__(self) -> GradmonCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def attach(trainer: Any, **options: Any) -> GradmonCallback:
    """Watch a Trainer, whatever makes its loss, and whatever ends its training.

    Args:
        trainer: The Trainer.
        **options: Further arguments of `GradmonCallback`.

    Returns:
        The callback, which has been added to the Trainer.
    """
    callback = GradmonCallback(trainer=trainer, **options)
    trainer.add_callback(callback)
    train = trainer.train

    @functools.wraps(train)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            callback.close(error)
            raise

    trainer.train = watched
    return callback


def _options(options: Mapping[str, Any], args: Any, model: Any, trainer: Any) -> dict[str, Any] | None:
    """The options of this process's monitor; None where it is not to have one."""
    found = for_ranks(options, model, getattr(trainer, "model_wrapped", None), _kind(args))
    if args.world_size > 1 and "group" not in options and _kind(args) == "DDP":
        return {**options, "group": torch.distributed.group.WORLD}  # the Trainer wraps it, unless it is sharded
    return found


def _kind(args: Any) -> str:
    """How the Trainer distributes the model."""
    if getattr(args, "deepspeed", None):
        return "DeepSpeed"
    return "FSDP" if getattr(args, "fsdp", None) else "DDP"


def _saved(args: Any, state: Any) -> Mapping[str, Any] | None:
    """What the checkpoint holds with which a training goes on; None where it begins, or was not watched."""
    if not state.global_step:
        return None
    given = args.resume_from_checkpoint
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(given, str) and Path(given).is_dir():
        folders.insert(0, Path(given))
    for folder in folders:
        if (folder / "gradmon.pt").is_file():
            try:
                return torch.load(folder / "gradmon.pt", weights_only=True)
            except Exception as error:
                _LOG.error("%s cannot be read; the monitor begins anew", folder / "gradmon.pt", exc_info=error)
                return None
    _LOG.warning("no gradmon.pt in %s; the monitor begins anew", " or ".join(map(str, folders)))
    return None
