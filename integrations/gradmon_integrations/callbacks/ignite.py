"""A handler for PyTorch-Ignite's engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon import ArgumentError, Monitor
from gradmon._batches import map_tensors
from gradmon._parameters import unwrapped, wrapper_of
from gradmon._types import Batch, Loss
from gradmon_integrations.callbacks._clipping import watch_clipping
from gradmon_integrations.callbacks._forwarding import Forwarding
from gradmon_integrations.callbacks._frameworks import framework
from gradmon_integrations.callbacks._options import Options, check_choice, checked
from gradmon_integrations.callbacks._ranks import for_ranks
from gradmon_integrations.callbacks._session import Session

_ENGINE: Any = framework("ignite.engine", "ignite")
_DISTRIBUTED: Any = framework("ignite.distributed", "ignite")


class GradmonHandler:
    """Watches the gradient while an engine runs.

    Args:
        model: The model.
        optimizer: The optimizer.
        loss_fn: ``loss_fn(prediction, target)``, as for `create_supervised_trainer`; None to make no passes, or where
            `loss` is given.
        loss: ``loss(model, batch)``, a scalar or one value per example, in the place of `loss_fn`.
        batch: What is made of the engine's batch: ``(x, target)`` for `loss_fn`, or what `loss` takes; None to take it
            as it is, on the model's device.
        gradient_accumulation_steps: By what the update function divides the loss.
        join: Whether the micro-batches of an accumulated step are laid end to end, so that one pass sees all of them.
            It takes as much memory as a step without accumulation would; without it, there are no numbers about single
            examples where gradients are accumulated.
        log: Whether the readings also go to ``engine.state.metrics``, where the engine's loggers find them.
        scaled: Whether the update function scales the loss, as `GradScaler` does.
        **options: Further arguments of `gradmon.Monitor`. `sinks` may be a function of the run's name.

    Raises:
        ArgumentError: An argument is not what it must be.
        GradmonError: ignite is not installed.

    Example:
        ``GradmonHandler(model, optimizer, loss_fn, sinks="tensorboard:runs/first").attach(trainer)``
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        loss: Loss | None = None,
        batch: Callable[[Any], Batch] | None = None,
        gradient_accumulation_steps: int = 1,
        join: bool = False,
        log: bool = False,
        scaled: bool = False,
        **options: Unpack[Options],
    ) -> None:
        for name, value in (("loss_fn", loss_fn), ("loss", loss), ("batch", batch)):
            if value is not None and not callable(value):
                raise ArgumentError(name, "be callable, or None", repr(value))
        if loss is not None and loss_fn is not None:
            raise ArgumentError("loss", "be None beside `loss_fn`", repr(loss))
        count = gradient_accumulation_steps
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError("gradient_accumulation_steps", "be an integer of at least 1", repr(count))
        for name, value in (("join", join), ("log", log), ("scaled", scaled)):
            check_choice(name, value)
        self._model, self._optimizer, self._batch = model, optimizer, batch
        # A partial: the core looks into it for modules.
        self._loss = loss if loss_fn is None else functools.partial(_supervised, loss_fn)
        self._every, self._weight, self._join, self._log, self._scaled = count, 1.0 / count, join, log, scaled
        self._options = checked(options)
        self._session: Session | None = None
        self._saved: Mapping[str, Any] | None = None
        self._stepped = False

    @property
    def monitor(self) -> Monitor:
        """The monitor of the run under way, or of the last one.

        Raises:
            ArgumentError: No run has begun, or not on this rank.
        """
        if self._session is None:
            raise ArgumentError("monitor", "be asked for when the engine runs", "none yet")
        return self._session.monitor

    def attach(self, engine: Any) -> GradmonHandler:
        """Watch an engine.

        Args:
            engine: The engine that trains.

        Returns:
            The handler itself.
        """
        events = _ENGINE.Events
        engine.add_event_handler(events.STARTED, self._begin)
        engine.add_event_handler(events.ITERATION_STARTED, self._take)
        engine.add_event_handler(events.ITERATION_COMPLETED, self._see)
        engine.add_event_handler(events.TERMINATE, self._terminate)
        engine.add_event_handler(events.COMPLETED, self._end)
        engine.add_event_handler(events.EXCEPTION_RAISED, self._fail)
        return self

    def _begin(self, engine: Any) -> None:
        state = self._saved
        if self._session is not None:
            if state is None and engine.state.iteration > 0:
                state = self._session.monitor.state_dict()
            self._session.close(RuntimeError("the run before did not come to its end"))
        self._session, self._saved = None, None
        options = for_ranks(self._options, unwrapped(self._model), wrapper_of(self._model), "another way")
        if options is None:
            return

        def send(numbers: Mapping[str, float], step: int) -> None:
            engine.state.metrics.update(numbers)

        self._session = session = Session(
            self._model, self._optimizer, self._loss, options, join=self._join,
            sinks=[Forwarding(send)] if self._log else [], state=state,
        )  # fmt: skip

        def stepped(*_: Any) -> None:
            self._stepped = True
            session.stepped()

        session.exit.callback(self._optimizer.register_step_post_hook(stepped).remove)
        if self._loss is None and not self._scaled:
            session.exit.callback(watch_clipping(self._model, session.monitor))

    def _take(self, engine: Any) -> None:
        """A batch is about to be trained on."""
        session, self._stepped = self._session, False
        if session is not None and session.monitor.wants_batch:
            session.monitor.failures.guard("batch", lambda: session.add(self._given(engine), self._weight), None)

    def _given(self, engine: Any) -> Batch:
        """The engine's batch as the loss takes it."""
        batch = engine.state.batch if self._batch is None else self._batch(engine.state.batch)
        device = next(self._model.parameters()).device
        return map_tensors(batch, lambda tensor: tensor.to(device))

    def _see(self, engine: Any) -> None:
        """A batch is over. A step that should have followed was left out by a gradient scaler, or never meant."""
        if self._session is not None and not self._stepped and engine.state.iteration % self._every == 0:
            (self._session.stepped if self._scaled else self._session.forget)()
        stop = self._session is not None and self._session.monitor.should_stop
        if _DISTRIBUTED.get_world_size() > 1 and self._options.get("on_alert", "log") not in ("log", None):
            stop = bool(_DISTRIBUTED.all_reduce(int(stop), "MAX"))
        if stop:
            engine.terminate()

    def _terminate(self, engine: Any) -> None:
        """The run ends early, and there may be no further event."""
        if engine.should_terminate == "skip_completed":
            self._end(engine)

    def _end(self, engine: Any) -> None:
        """The run has come to its end."""
        if self._session is not None:
            self._session.close()

    def _fail(self, engine: Any, error: BaseException) -> None:
        """The run has failed. An engine goes on without a word if somebody listens to that, so it is raised again."""
        if self._session is not None:
            self._session.close(error)
        owners = [getattr(h, "__self__", None) for h, *_ in engine._event_handlers[_ENGINE.Events.EXCEPTION_RAISED]]
        if owners[-1] is self and all(isinstance(owner, GradmonHandler) for owner in owners):
            raise error

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain types; for ignite's `Checkpoint`."""
        if self._saved is not None:
            return dict(self._saved)
        return {} if self._session is None else self._session.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved, when the run begins."""
        self._saved = dict(state)


def _supervised(loss_fn: Callable[[Any, Any], Tensor], model: nn.Module, batch: Batch) -> Tensor:
    """The loss of an input and its target."""
    x, target = batch
    return loss_fn(model(x), target)
