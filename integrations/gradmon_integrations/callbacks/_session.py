"""One monitor for the time of one training."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmon import Monitor
from gradmon._batches import map_tensors
from gradmon._types import Batch, Loss
from gradmon.sinks import Sink
from gradmon_integrations.callbacks._accumulation import Kind, MicroBatch, accumulating, gathered
from gradmon_integrations.callbacks._bars import log_above_bars
from gradmon_integrations.callbacks._options import opened


class Session:
    """A monitor, and the micro-batches of the step under way.

    Args:
        model: The model.
        optimizer: Its optimizer.
        loss: The loss of one micro-batch; None to make no passes.
        options: Further arguments of the monitor.
        join: Whether to lay micro-batches end to end.
        sinks: Further sinks.
        state: What an earlier session's `state_dict` returned; None for a beginning.

    Attributes:
        monitor: The monitor.
        model: The model.
        exit: What is to be undone when the session ends.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss | None,
        options: Mapping[str, Any],
        *,
        join: bool = False,
        sinks: Sequence[Sink] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = dict(options)
        found = opened(arguments.pop("sinks", None), arguments.get("run", "run"))
        twice = arguments.get("derivative", "finite") == "exact"
        whole = None if loss is None else accumulating(loss, arguments.get("reduction", "mean"), twice=twice)
        self.monitor = Monitor(model, optimizer, whole, sinks=[*found, *sinks], **arguments)
        self.model, self.exit = model, contextlib.ExitStack()
        self.exit.callback(log_above_bars())
        self._join = join
        self._parts: list[tuple[Batch, float | None, Kind]] = []
        if state:  # of another version, or another model, it must not keep the training from going on
            self.monitor.failures.guard("resume", lambda: self.monitor.load_state_dict(state), None)

    def add(self, batch: Batch, weight: float | None = None, kind: Kind = "mean") -> None:
        """A micro-batch of the step under way.

        Args:
            batch: The batch; its containers are copied, because the training may empty them.
            weight: By what its loss is multiplied before the backward pass; None for one over how many there are.
            kind: What its loss is, apart from the weight.
        """
        if self.monitor.wants_batch:
            self._parts.append((map_tensors(batch, lambda tensor: tensor), weight, kind))

    @property
    def empty(self) -> bool:
        """Whether nothing is part of the coming step yet."""
        return not self._parts

    def forget(self) -> None:
        """No step is made of what was added."""
        self._parts = []

    def stepped(self) -> None:
        """The optimizer has taken its step."""
        parts = [MicroBatch(b, 1 / len(self._parts) if w is None else w, kind) for b, w, kind in self._parts]
        self._parts = []
        if parts or not self.monitor.wants_batch:
            self.monitor.step(gathered(parts, join=self._join) if parts else None)

    def close(self, error: BaseException | None = None) -> None:
        """End the session; a second call does nothing.

        Args:
            error: What ended the training; None where it came to its end.
        """
        self._parts = []
        self.exit.close()
        # Not `close`, which would look for an exception that is on its way: a trainer ends by some of its own.
        self.monitor.__exit__(*((None, None, None) if error is None else (type(error), error, error.__traceback__)))


def abandoned(session: Session) -> None:
    """End a session of a training that went away without a word."""
    session.close(RuntimeError("the training ended without telling its callbacks"))
