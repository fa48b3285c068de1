"""What a step must put back: the base optimizer's state when it fails, buffers whenever the closure is called again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from gradmon_integrations.workloads.average_gradient.update import SMALL, alike, copy_all

_PLAIN = (int, float, str, type(None))


class OptimizerState:
    """Room for a copy of an optimizer's state, to be put back if a step cannot be finished.

    Args:
        optimizer: The optimizer.
        most: Up to how many bytes are copied; of a larger state nothing is.
    """

    def __init__(self, optimizer: Optimizer, most: int) -> None:
        self._optimizer, self._most = optimizer, most
        self._states: list[tuple[Any, dict[Any, Any], dict[Any, Any]]] = []
        self._others: dict[Any, Any] = {}
        self._known: list[Any] = []
        self._parts: list[Any] = []
        self._constant = False
        self._tensors: list[Tensor] = []
        self._sorted: list[Tensor] | None = None
        self._rows: list[list[Tensor]] = []
        self._stacked: list[Tensor] = []
        self._single: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []
        self._whole = True

    def keep(self) -> None:
        """Copy the state as it is now."""
        if not self._is_known():
            self._look()
        if self._sorted is None or not _same(self._sorted, self._tensors):
            self._sort()
        if not self._whole:
            return
        self._groups = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]
        with torch.no_grad():
            try:
                self._stacked = [torch.stack(row) for row in self._rows]
            except RuntimeError:  # of one of them the data was exchanged for others that do not lie alike
                self._sort()
                self._stacked = [torch.stack(row) for row in self._rows]
        for number, value in enumerate(self._single):
            spare = self._spare[number]
            if spare.shape == value.shape and spare.dtype == value.dtype and value.layout == torch.strided:
                spare.copy_(value.detach())
            else:
                self._spare[number] = value.detach().clone()

    def _is_known(self) -> bool:
        """Whether the state consists of the very objects that it did last time, and all that can change are tensors."""
        state = self._optimizer.state
        if not self._constant or not _same(self._known, [*state, *state.values()]):
            return False
        return _same(self._parts, _parts(state.values()))

    def _look(self) -> None:
        """Take up what the state consists of, but for what tensors contain."""
        state = self._optimizer.state
        others = {key: held for key, held in state.items() if not isinstance(held, dict)}
        self._others, self._constant = copy.deepcopy(others), not others
        self._known, self._parts = [*state, *state.values()], _parts(state.values()) if self._constant else []
        self._states, self._tensors = [], []
        for key, held in state.items():
            if key in others:
                continue
            kept = held.copy()
            self._states.append((key, held, kept))
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    self._tensors.append(value)
                elif not isinstance(value, _PLAIN):
                    kept[name] = copy.deepcopy(value)
                    self._constant = False

    def _sort(self) -> None:
        """Look at tensors that are new: small ones of one shape are copied together."""
        self._sorted = self._tensors
        self._whole = sum(tensor.nbytes for tensor in self._tensors) <= self._most
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        single: list[int] = []
        for place, tensor in enumerate(self._tensors if self._whole else ()):
            if type(tensor) is Tensor and tensor.layout == torch.strided and tensor.numel() <= SMALL:
                groups.setdefault((tensor.dtype, tensor.device), []).append(place)
            else:
                single.append(place)
        self._rows = []
        for group in groups.values():
            rows, others = alike(self._tensors, group)
            self._rows += [[self._tensors[place] for place in row] for row in rows]
            single += others
        self._single = [self._tensors[place] for place in single]
        self._spare = [torch.empty(0)] * len(single)

    def restore(self) -> bool:
        """Put the state back, into the tensors that it was in; whether there was a copy of it."""
        if not self._whole:
            return False
        with torch.no_grad():
            for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
                params = group["params"]
                group.clear()
                group.update(kept, params=params)
            for value, kept in zip(self._single, self._spare, strict=True):
                value.copy_(kept)
            for row, kept in zip(self._rows, self._stacked, strict=True):
                copy_all(row, kept.unbind())
        self._optimizer.state.clear()
        self._optimizer.state.update(self._others)
        for key, held, kept in self._states:
            held.clear()
            held.update(kept)
            self._optimizer.state[key] = held
        return True


def _parts(states: Collection[dict[Any, Any]]) -> list[Any]:
    """How much each of the states holds, under which names, and what."""
    values = map(dict[Any, Any].values, states)
    return [*map(len, states), *chain.from_iterable(states), *chain.from_iterable(values)]


def _same(known: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether these are the very objects that are known, in their order."""
    return len(known) == len(found) and all(map(is_, known, found))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


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
