"""Models whose parameters are sharded over the ranks (``fully_shard``), as plain ones while they are looked at."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmon._parameters import unwrapped

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def gathered(values: Sequence[Tensor]) -> list[Tensor]:
    """The whole of tensors of which each rank holds a part, on every rank; others as they are.

    All ranks must ask for it: it is gathered over them.
    """
    return [cast("Any", value).full_tensor() if is_distributed(value) else value for value in values]


def is_distributed(value: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # which takes long to import, and else nobody needs
    return module is not None and isinstance(value, module.DTensor)


def is_replicated(model: object) -> bool:
    """Whether a model is wrapped so that its gradients are averaged over the ranks."""
    return isinstance(model, nn.parallel.DistributedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of some parameter."""
    return torch.distributed.is_available() and any(is_distributed(parameter) for parameter in model.parameters())


@contextlib.contextmanager
def without_talk(models: Iterable[nn.Module]) -> Generator[None]:
    """A context in which every `DistributedDataParallel` in some models, or around them, talks to nobody.

    For a loss that calls the wrapper of its own accord, and for models of which only parts are wrapped: a rank may make
    another number of passes than the others.
    """
    inside = dict.fromkeys(module for model in models for module in model.modules())
    wrappers = [module for module in inside if isinstance(module, nn.parallel.DistributedDataParallel)]
    held = [(wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, (backward, forward) in zip(wrappers, held, strict=True):
            wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = backward, forward


def passes_talk(model: nn.Module) -> str | None:
    """Why there can be no passes of which the ranks make different numbers; None where there can."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return "SyncBatchNorm makes the examples of all ranks interact: those of one cannot be looked at alone"
    return None


class Unsharded:
    """A sharded model, which is a plain one with whole parameters inside of `plain`, and afterwards as it was.

    The plain parameters are the same objects every time, so that what is known of them stays known.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._twins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    @contextlib.contextmanager
    def plain(self) -> Generator[None]:
        """A context, to be entered by all ranks, in which the model is plain: parameters, hooks and classes."""
        with contextlib.ExitStack() as stack:
            for module in list(self._model.modules()):
                reshard = getattr(module, "reshard", None)
                if _is_fsdp(type(module)) and reshard is not None:
                    reshard()  # a forward pass without a backward pass leaves whole parameters behind
            for module in list(self._model.modules()):
                for name, parameter in module._parameters.items():
                    if parameter is not None and is_distributed(parameter):
                        twin = self._twin(parameter, stack)
                        module._parameters[name] = twin
                        stack.callback(module._parameters.__setitem__, name, parameter)
                self._strip(module, stack.callback)
            yield

    def _twin(self, parameter: nn.Parameter, stack: contextlib.ExitStack) -> nn.Parameter:
        """The plain parameter in the place of a sharded one, with its value."""
        key = id(parameter)
        known = self._twins.get(key)
        if known is None or known[0] is not parameter:
            empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            known = self._twins[key] = parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad)
        twin = known[1]
        if twin.numel() == 0:
            twin.data = gathered([parameter.detach()])[0]
            twin.requires_grad_(parameter.requires_grad)
            stack.callback(_emptied, twin)
        return twin

    @staticmethod
    def _strip(module: nn.Module, later: Callable[..., object]) -> None:
        """Take off what gathers the parameters around a call."""
        for table in _HOOKS:
            hooks: OrderedDict[int, Any] = getattr(module, table)
            kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _gathers(hook))
            if len(kept) < len(hooks):
                vars(module)[table] = kept
                later(vars(module).__setitem__, table, hooks)
        kind = type(module)
        if _is_fsdp(kind):
            object.__setattr__(module, "__class__", next(base for base in kind.__bases__ if not _is_fsdp(base)))
            later(object.__setattr__, module, "__class__", kind)


def _emptied(twin: nn.Parameter) -> None:
    twin.grad = None
    twin.data = twin.data.new_empty(0)


def _is_fsdp(kind: type) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return issubclass(kind, FSDPModule)


def _gathers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("torch.distributed.fsdp", "torch.distributed._composable"))
