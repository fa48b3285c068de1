"""The buffers of what a closure calls: every call starts from the same ones, and a step changes them once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Buffers:
    """The buffers of the modules that a closure calls, and of their parts, found as they are called."""

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
            self._before += self._unknown(module)

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
            for found, contents in self._unknown(module):
                self._before.append((found, contents))
                exchange(found, contents)

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

    def _unknown(self, module: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """Those of a module and its parts, whether called or not, that were not known, with their contents."""
        found = [part for part in module.modules() if part._buffers and part not in self._modules]
        self._modules.update(found)
        return [(part, _contents(part)) for part in found]

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
    with cast("Any", torch._C).DisableTorchFunction():  # who watches the forward pass is not told of this
        return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}
