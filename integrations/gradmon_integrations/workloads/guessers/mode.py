"""Sees every function of torch that a model calls, where gradients are wanted, and builds no graph of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

_SET = torch._C._set_grad_enabled  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Handler(Protocol):
    """What is made of the calls."""

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of which a gradient is wanted."""
        ...

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function under the model's own `torch.no_grad`, whose result is a constant."""
        ...


class Mode(TorchFunctionMode):
    """Hands the calls of a forward pass to a handler, to be entered under `torch.enable_grad`.

    The model finds gradients enabled, so that its own `torch.no_grad` can be told; each function then runs without.
    Forward-mode differentiation would otherwise go through what backpropagation takes for a constant.

    Args:
        handler: What is made of the calls.
        graph: Whether autograd is to follow the functions after all.
    """

    def __init__(self, handler: Handler, graph: bool = False) -> None:
        super().__init__()
        self._handler, self._graph = handler, graph

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SET:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._handler.constant(func, args, kwargs)
        if self._graph:
            return self._handler.call(func, args, kwargs)
        _SET(False)
        try:
            return self._handler.call(func, args, kwargs)
        finally:
            _SET(True)
