"""What an optimizer step starts from, kept by a hook on the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._objective import dense
from gradmon._parameters import Weights, trainable


@dataclass(frozen=True)
class Taken:
    """What a step started from.

    Attributes:
        values: The weights before it, one tensor per trainable parameter.
        gradients: The gradients that the optimizer used, None for a parameter without one; empty unless asked for.
    """

    values: list[Tensor]
    gradients: list[Tensor | None]

    def filled(self, layout: Weights) -> list[Tensor]:
        """The gradients with zeros in the place of those that are None."""
        return [dense(part, parameter) for part, parameter in zip(self.gradients, layout.parameters, strict=True)]


class StepWatch:
    """Keeps the weights, and on request the gradients, that an optimizer's step starts from.

    Args:
        optimizer: The optimizer.
        model: The model whose parameters are kept.
        wanted: Whether the coming step is to be kept; asked before every step.
        gradients: Whether to keep the gradients too.
        failed: Told of an error in here, which never reaches the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        wanted: Callable[[], bool],
        gradients: bool,
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._gradients = gradients
        self._failed = failed
        self._taken: Taken | None = None
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def take(self) -> Taken | None:
        """What the last step started from, once; None where no step was seen, or it was skipped."""
        taken, self._taken = self._taken, None
        return taken

    def close(self) -> None:
        """Take the hook off the optimizer."""
        self._hook.remove()
        self._taken = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        try:
            if not self._wanted():
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            self._taken = taken = self._keep(optimizer, closure is not None)
        except Exception as error:
            self._failed("optimizer hook", error)
            return None
        if closure is None or taken is None or not self._gradients:
            return None

        def watched() -> Any:
            """The closure; its first call makes the gradient at the weights before the step."""
            value = closure()
            if not taken.gradients:
                try:
                    taken.gradients.extend(self._read(optimizer))
                except Exception as error:
                    self._failed("optimizer hook", error)
            return value

        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    def _keep(self, optimizer: Optimizer, later: bool) -> Taken | None:
        overflow: Any = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return None  # a fused optimizer is about to skip this step
        values = [parameter.detach().clone() for parameter in trainable(self._model).values()]
        return Taken(values, self._read(optimizer) if self._gradients and not later else [])

    def _read(self, optimizer: Optimizer) -> list[Tensor | None]:
        """The gradients that the optimizer is about to use, without the scale that a fused one takes off itself."""
        scale: Any = getattr(optimizer, "grad_scale", None)
        found = [None if p.grad is None else p.grad.detach().clone() for p in trainable(self._model).values()]
        return found if scale is None else [None if g is None else g / scale.to(g.device) for g in found]
