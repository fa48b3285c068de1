"""What a step must put back: the base optimizer's state when it fails, buffers whenever the closure is called again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from gradmon_integrations.workloads.average_gradient.update import SMALL, copy_all, flattened, unflattened


class OptimizerState:
    """A copy of an optimizer's state, to be put back if the step cannot be finished.

    Args:
        optimizer: The optimizer.
        most: Up to how many bytes are copied; of a larger state nothing is.
    """

    def __init__(self, optimizer: Optimizer, most: int) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = []
        tensors = (value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor))
        self._whole = sum(tensor.nbytes for tensor in tensors) <= most
        if not self._whole:
            return
        self._groups = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._states = [(parameter, held, dict(held)) for parameter, held in optimizer.state.items()]
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._large: list[tuple[Tensor, Tensor]] = []
        for _, held, kept in self._states:
            for name, value in held.items():
                if not isinstance(value, Tensor):
                    if not isinstance(value, int | float | str | bool | None):
                        kept[name] = copy.deepcopy(value)
                elif value.numel() > SMALL or value.layout != torch.strided:
                    self._large.append((value, value.detach().clone()))
                else:
                    small.setdefault((value.dtype, value.device), []).append(value)
        self._small = [(many, flattened(many)) for many in small.values()]

    def restore(self) -> bool:
        """Put the state back, into the tensors that it was in; whether there was a copy of it."""
        if not self._whole:
            return False
        with torch.no_grad():
            for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
                params = group["params"]
                group.clear()
                group.update(kept, params=params)
            for value, kept in self._large:
                value.copy_(kept)
            for many, kept in self._small:
                copy_all(many, unflattened(kept, many))
        self._optimizer.state.clear()
        for parameter, held, kept in self._states:
            held.clear()
            held.update(kept)
            self._optimizer.state[parameter] = held
        return True


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Buffers:
    """The buffers of the modules that a closure calls, found as they are called."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._before: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def keep(self) -> None:
        """Keep the contents of those that are known."""
        self._before = [(module, _contents(module)) for module in self._modules] if self._modules else []

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Find modules that are called, and keep what their buffers hold before."""

        def look(module: nn.Module, inputs: Any) -> None:
            if module._buffers and module not in self._modules:
                self._modules.add(module)
                self._before.append((module, _contents(module)))

        handle = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def apart(self, *, exploring: bool) -> Iterator[None]:
        """Let a forward pass start from the buffers as they were kept, and leave those that are there now alone.

        They are exchanged rather than written to: the graph of the first pass may still need what they hold.

        Args:
            exploring: Whether modules may be called that are not known yet; theirs are taken as they are now.
        """
        now: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        twins: dict[int, Tensor] = {}

        def exchange(module: nn.Module, contents: dict[str, Tensor]) -> None:
            now.append((module, dict(module._buffers)))
            for name, kept in contents.items():
                buffer = module._buffers.get(name)
                if buffer is not None:
                    module._buffers[name] = twins.setdefault(id(buffer), kept.clone())

        def look(module: nn.Module, inputs: Any) -> None:
            if module._buffers and module not in self._modules:
                self._modules.add(module)
                self._before.append((module, _contents(module)))
                exchange(*self._before[-1])

        handle = register_module_forward_pre_hook(look) if exploring else None
        try:
            for module, contents in self._before:
                exchange(module, contents)
            yield
        finally:
            if handle is not None:
                handle.remove()
            for module, buffers in now:
                module._buffers.clear()
                module._buffers.update(buffers)

    def restore(self) -> None:
        """Put the contents back that were kept."""
        with torch.no_grad():
            for module, contents in self._before:
                for name, kept in contents.items():
                    buffer = module._buffers.get(name)
                    if buffer is not None and buffer.shape == kept.shape:
                        buffer.copy_(kept)

    def release(self) -> None:
        """Let go of the contents."""
        self._before = []


def _contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}
