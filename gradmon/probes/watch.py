"""What an optimizer step starts from, kept by a hook on the optimizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from gradmon._objective import dense
from gradmon._parameters import Weights, trainable

_LOG = logging.getLogger("gradmon")

Keep = Literal["nothing", "weights", "both"]
"""What to keep of a step: weights, and gradients with them."""


@dataclass(frozen=True)
class Taken:
    """What a step started from.

    Attributes:
        values: The weights before it, one tensor per trainable parameter.
        gradients: The gradients that the optimizer used, None for a parameter without one; empty unless asked for.
        names: Those of the parameters that were trainable then.
        plain: Whether the gradients are known to be those of one backward pass, as it left them.
    """

    values: list[Tensor]
    gradients: list[Tensor | None]
    names: list[str]
    plain: bool = False

    def fits(self, layout: Weights) -> bool:
        """Whether the same parameters are trained now."""
        shapes = [value.shape for value in self.values]
        return self.names == layout.names and shapes == [parameter.shape for parameter in layout.parameters]

    def began_at(self, values: Sequence[Tensor]) -> bool:
        """Whether the step started from these weights."""
        return len(values) == len(self.values) and all(map(torch.equal, self.values, values))

    def filled(self, layout: Weights) -> list[Tensor]:
        """The gradients with zeros in the place of those that are None."""
        return [dense(part, parameter) for part, parameter in zip(self.gradients, layout.parameters, strict=True)]


class LeftBehind:
    """What backward passes send to some parameters, by hooks that are there for one step.

    Args:
        parameters: The parameters.
        failed: Told of an error in a hook, which never reaches the training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        self._sent: dict[int, tuple[int, Tensor]] = {}
        self._parameters = list(parameters)
        self._handles: list[RemovableHandle] = []
        for parameter in self._parameters:
            hook = functools.partial(self._note, id(parameter))
            self._handles.append(cast("Any", parameter).register_hook(hook))

    def _note(self, key: int, gradient: Tensor) -> None:
        count = self._sent[key][0] if key in self._sent else 0
        try:
            self._sent[key] = count + 1, _norm(gradient.detach())
        except Exception as error:
            self._sent[key] = count + 1, torch.tensor(torch.nan)  # which equals nothing
            self._failed("gradient hook", error)

    def unchanged(self) -> bool:
        """Whether one backward pass made the gradients, and nobody has changed them: no clipping, hook, or sum."""
        for parameter in self._parameters:
            count, norm = self._sent.get(id(parameter), (0, None))
            if parameter.grad is None and norm is None:
                continue
            if parameter.grad is None or norm is None or count != 1 or _has_other_hooks(parameter):
                return False
            if not bool(_norm(parameter.grad) == norm):
                return False
        return bool(self._sent)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _has_other_hooks(parameter: Tensor) -> bool:
    """Whether somebody else may change a gradient on its way."""
    held = cast("Any", parameter)
    return len(held._backward_hooks or ()) > 1 or bool(getattr(held, "_post_accumulate_grad_hooks", None))


def _some_gradient(model: nn.Module) -> tuple[TensorWeakRef, int] | None:
    """The gradient of one trainable parameter, and how often it was written to; None where none has any."""
    gradients = (parameter.grad for parameter in trainable(model).values())
    return next(((TensorWeakRef(found), found._version) for found in gradients if found is not None), None)


def _norm(gradient: Tensor) -> Tensor:
    return cast("Any", gradient).norm()


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rates of the parameter groups that have one, as they are now."""
    return [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]


class StepWatch:
    """Keeps the weights, and on request the gradients, that an optimizer's step starts from.

    Args:
        optimizer: The optimizer.
        model: The model whose parameters are kept.
        wanted: What of the coming step is to be kept; asked before every step.
        failed: Told of an error in here, which never reaches the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        wanted: Callable[[], Keep],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._failed = failed
        self._taken: Taken | None = None
        self._inside: Taken | None = None
        self._rates: list[Any] = []
        self._early: list[Tensor | None] = []
        self._left: LeftBehind | None = None
        self._stepped, self._waiting = False, cast("tuple[TensorWeakRef, int] | None", None)
        self._optimizer = optimizer
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def take(self) -> Taken | None:
        """What the last step started from, once; None where no step was seen, or it was skipped."""
        taken, self._taken = self._taken, None
        self._early = []
        self._deafen()
        self._waiting = None if self._stepped else _some_gradient(self._model)
        self._stepped = False
        return taken

    def complete(self) -> None:
        """Keep the gradients as they are now, instead of those that the coming step finds: they may be clipped."""
        found = self._read(self._optimizer)
        if self._inside is not None:
            self._inside.gradients[:] = found
        else:
            self._early = found

    def listen(self) -> None:
        """See in the coming step whether its gradients stay as the backward pass leaves them."""
        self._deafen()
        self._left = LeftBehind(trainable(self._model).values(), self._failed)

    def _deafen(self) -> None:
        if self._left is not None:
            self._left.remove()
            self._left = None

    @property
    def rates(self) -> list[float]:
        """The learning rates of the parameter groups in the last step of which anything was kept; else as they are."""
        return [float(rate) for rate in self._rates] or learning_rates(self._optimizer)

    def close(self) -> None:
        """Take the hooks off."""
        self._hook.remove()
        self._deafen()
        self._taken, self._early, self._waiting = None, [], None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        try:
            self._stepped = True
            self._check_order()
            keep = self._wanted()
            if keep == "nothing":
                self._rates = []
                self._deafen()
                return None
            # A scheduler may change them before the monitor is called; those that are tensors it changes in place.
            rates = (group.get("lr") for group in optimizer.param_groups)
            self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates if rate is not None]
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            self._taken = taken = self._keep(optimizer, keep, closure is not None)
        except Exception as error:
            self._failed("optimizer hook", error)
            return None
        if closure is None or taken is None or keep == "weights":
            return None

        calls = 0

        def watched() -> Any:
            """The closure; its first call makes the gradient at the weights before the step."""
            nonlocal calls
            calls += 1
            self._inside = taken if calls == 1 else None
            try:
                value = closure()
            finally:
                self._inside = None
            if not taken.gradients:
                try:
                    taken.gradients.extend(self._read(optimizer))
                except Exception as error:
                    self._failed("optimizer hook", error)
            return value

        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    def _check_order(self) -> None:
        """Warn of a loop that asked for the step before it took it: no backward pass came in between."""
        waiting, self._waiting = self._waiting, None
        now = None if waiting is None else _some_gradient(self._model)
        if waiting is not None and now is not None and waiting[0]() is now[0]() and waiting[1] == now[1]:
            _LOG.warning(
                "monitor.step was called before optimizer.step: call it right after, or each step is looked at with "
                "the batch of another."
            )

    def _keep(self, optimizer: Optimizer, keep: Keep, later: bool) -> Taken | None:
        left, self._left = self._left, None
        plain = left is not None and not later and left.unchanged()
        if left is not None:
            left.remove()
        overflow: Any = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return None  # a fused optimizer is about to skip this step
        named = trainable(self._model)
        values = [parameter.detach().clone() for parameter in named.values()]
        scaled = getattr(optimizer, "grad_scale", None) is not None
        early, self._early = self._early, []
        if keep == "weights":
            return Taken(values, [], list(named), plain and not scaled)
        gradients = early or ([] if later else self._read(optimizer))
        return Taken(values, gradients, list(named), plain and not scaled)

    def _read(self, optimizer: Optimizer) -> list[Tensor | None]:
        """The gradients that the optimizer is about to use, without the scale that a fused one takes off itself."""
        scale: Any = getattr(optimizer, "grad_scale", None)
        found = [None if p.grad is None else p.grad.detach().clone() for p in trainable(self._model).values()]
        return found if scale is None else [None if g is None else g / scale.to(g.device) for g in found]
