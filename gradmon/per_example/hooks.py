"""The hooks on a model that is listened to, and the calls of its modules that are under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

from torch import nn

from gradmon.per_example._autograd import current_mode, here
from gradmon.per_example.active import entering
from gradmon.per_example.capture import Capture, Entry
from gradmon.per_example.rules import Rules
from gradmon.per_example.whole import whole_modules


@dataclass
class Call:
    """A call of a module that is under way.

    Attributes:
        module: The module.
        frame: The frame in which it is called.
        close: What ends the capture that was begun with it.
    """

    module: nn.Module
    frame: FrameType | None
    close: Callable[[bool], None] | None = None

    def under_way(self) -> bool:
        """Whether it is; an interrupt ends it without a hook being told."""
        frame = here()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class UnderWay(threading.local):
    """The calls under way in each thread, outermost first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


class Hook:
    """A hook of which copies do nothing: those of a model that is copied, or saved, while it is listened to."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Pass the call on; a copy does nothing."""
        return None if self._call is None else self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def begun(capture: Capture, model: nn.Module, rules: Rules, entry: Entry | None = None) -> Callable[[bool], None]:
    """Begin to look; the function that is returned ends it."""
    stack = contextlib.ExitStack()
    stack.enter_context(whole_modules(model, rules, capture))
    if entry is not None and entry.module is not None:
        stack.callback(entry.module.register_forward_hook(entering(capture)).remove)
    capture.__enter__()

    def close(failed: bool) -> None:
        if current_mode() is capture:
            cast("Any", capture).__exit__(None, None, None)
        capture.off = True
        stack.close()

    return close


def compiled(modules: Iterable[nn.Module]) -> str | None:
    """Why a compiled model cannot be looked into; None if it is not one."""
    for module in modules:
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            return "the model is compiled: give the monitor the loss, so that it takes passes of its own"
    return None
