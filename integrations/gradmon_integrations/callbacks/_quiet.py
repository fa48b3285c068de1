"""A Lightning module's training step without what it does besides returning a loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmon import Unavailable
from gradmon._types import Batch

_LOGGING = ("log", "log_dict", "print")


class TrainingStep:
    """``loss(model, batch)`` of a Lightning module: what its `training_step` returns.

    In here nothing is logged or printed; a logger that the step writes to directly is replaced by one that does
    nothing. Precision is that of the trainer, but for autocast, which is off.

    Args:
        trainer: The trainer.
        dummy: Makes a logger that does nothing.
    """

    def __init__(self, trainer: Any, dummy: Callable[[], Any]) -> None:
        self._trainer, self._dummy = trainer, dummy

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a pair of a batch and its number.

        Args:
            model: The Lightning module.
            batch: The batch, and its number.

        Returns:
            The loss.

        Raises:
            Unavailable: The training step returned no loss.
        """
        module: Any = model
        taken = inspect.signature(module.training_step).parameters
        several = len(taken) > 1 or any(p.kind is p.VAR_POSITIONAL for p in taken.values())
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._trainer.precision_plugin.train_step_context())
            for kind in {"cpu", module.device.type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_silence(module, self._trainer, self._dummy))
            output = module.training_step(*batch) if several else module.training_step(batch[0])
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise Unavailable("training_step returned no loss when it was made again")
        return loss


def repeatable(module: Any) -> bool:
    """Whether a Lightning module's training step can be made again on the same batch."""
    itself = "dataloader_iter" in inspect.signature(module.training_step).parameters
    return bool(module.automatic_optimization) and not itself


@contextlib.contextmanager
def _silence(module: nn.Module, trainer: Any, dummy: Callable[[], Any]) -> Generator[None]:
    """A context in which neither the module, nor one inside of it, logs."""
    loggers = list(trainer.loggers)
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for held in (vars(m) for m in module.modules() if callable(getattr(m, "log_dict", None))):
            before.append((held, {name: held[name] for name in _LOGGING if name in held}))
            held.update(dict.fromkeys(_LOGGING, _nothing))
        trainer.loggers = [dummy() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for held, own in before:
            for name in _LOGGING:
                held.pop(name, None)
            held.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
