"""What has to be asked of autograd and has no public name."""

# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode


def running_backward() -> int | None:
    """The number of the backward pass that runs in this thread; None if none does."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def after_backward(call: Callable[[], None]) -> None:
    """Have something called at the end of the backward pass that runs."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def here(above: int = 0) -> FrameType | None:
    """The frame of the caller, or of the one so many above it."""
    return sys._getframe(above + 1)


def version(tensor: Tensor) -> int:
    """How often a tensor has been overwritten."""
    return tensor._version


def current_mode() -> TorchFunctionMode | None:
    """The innermost function mode."""
    return _get_current_function_mode()
