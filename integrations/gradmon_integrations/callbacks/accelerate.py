"""A monitor for a loop that uses Hugging Face's accelerate, which has no callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Unpack

from torch import nn

from gradmon import GradmonError, Monitor
from gradmon._parameters import wrapper_of
from gradmon._types import Batch, Loss
from gradmon_integrations.callbacks._clipping import watch_clipping
from gradmon_integrations.callbacks._forwarding import Forwarding
from gradmon_integrations.callbacks._frameworks import framework
from gradmon_integrations.callbacks._options import Options, check_choice, checked
from gradmon_integrations.callbacks._precision import in_full_precision
from gradmon_integrations.callbacks._ranks import for_ranks
from gradmon_integrations.callbacks._session import Session

framework("accelerate", "accelerate")


class AcceleratedMonitor:
    """A monitor that counts the steps as an accelerator does; made by `monitor`.

    Attributes:
        session: What watches; None in a process that has no monitor.
    """

    def __init__(self, accelerator: Any, session: Session | None) -> None:
        self._accelerator, self.session = accelerator, session

    @property
    def monitor(self) -> Monitor:
        """The monitor itself.

        Raises:
            GradmonError: This process has none.
        """
        if self.session is None:
            raise GradmonError(
                "Only the main process has a monitor, unless the model is trained by DistributedDataParallel."
            )
        return self.session.monitor

    @property
    def should_stop(self) -> bool:
        """Whether the training should end, as in `gradmon.Monitor`; also known to `accelerator.check_trigger`."""
        return self.session is not None and self.session.monitor.should_stop

    def step(self, batch: Batch) -> None:
        """Tell of a batch, right after ``optimizer.step()``, also where accelerate leaves that step out.

        Args:
            batch: The batch, as `loss` takes it.
        """
        session, accelerator = self.session, self._accelerator
        if session is None:
            return
        weight = 1.0 / accelerator.gradient_accumulation_steps
        session.monitor.failures.guard("batch", lambda: session.add(batch, weight), None)
        if accelerator.sync_gradients:
            before = session.monitor.should_stop
            session.stepped()
            if session.monitor.should_stop and not before:
                accelerator.set_trigger()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs; the accelerator saves it with its own state."""
        return {} if self.session is None else self.session.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        if self.session is not None and state:
            monitor = self.session.monitor
            monitor.failures.guard("resume", lambda: monitor.load_state_dict(state), None)

    def close(self) -> None:
        """Detach, and close the sinks: the training has come to its end. A second call does nothing."""
        if self.session is not None:
            self.session.close()

    def __enter__(self) -> AcceleratedMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.session is not None:
            self.session.close(error)


def monitor(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    loss: Loss | None = None,
    *,
    join: bool = False,
    log: bool = False,
    **options: Unpack[Options],
) -> AcceleratedMonitor:
    """Watch the gradient of a model that an accelerator has prepared.

    Micro-batches of one step are weighed as `Accelerator.backward` weighs them. The state is saved by
    `Accelerator.save_state`, and comes back by `load_state`.

    Args:
        accelerator: The accelerator.
        model: The model, prepared.
        optimizer: The optimizer, prepared.
        loss: ``loss(model, batch)``, a scalar or one value per example; None to make no passes.
        join: Whether the micro-batches of an accumulated step are laid end to end, so that one pass sees all of them.
            It takes as much memory as a step without accumulation would; without it, there are no numbers about single
            examples where gradients are accumulated.
        log: Whether the readings also go to `Accelerator.log`.
        **options: Further arguments of `gradmon.Monitor`.

    Returns:
        The monitor; a context manager.

    Raises:
        ArgumentError: An argument is not what it must be.

    Example:
        ``with monitor(accelerator, model, optimizer, loss) as watch:`` around the loop, and in it ``watch.step(batch)``
        after ``optimizer.step()``.
    """
    check_choice("join", join)
    check_choice("log", log)
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    arguments, session = for_ranks(checked(options), accelerator.unwrap_model(model), wrapper_of(model), kind), None
    if arguments is not None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        sinks = [Forwarding(lambda numbers, step: accelerator.log(numbers, step=step))] if log else []
        whole = None if loss is None else in_full_precision(loss)
        session = Session(accelerator.unwrap_model(model), optimizer, whole, arguments, join=join, sinks=sinks)
        if loss is None and accelerator.scaler is None:
            session.exit.callback(watch_clipping(accelerator.unwrap_model(model), session.monitor))
    made = AcceleratedMonitor(accelerator, session)
    accelerator.register_for_checkpointing(made)
    return made
