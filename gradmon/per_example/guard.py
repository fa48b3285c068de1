"""What runs inside the training's own passes leaves no trace there, and never stops them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from gradmon._errors import OUT_OF_MEMORY, Unavailable, told
from gradmon._sandbox import QUIET, full_precision, packing_hook, unpacked
from gradmon._tensors import ran_out


class Guard:
    """A context without gradients and autocast, in full precision, of which no exception gets out.

    Args:
        kinds: The kinds of devices.
        fail: Told why, where there is an exception.
    """

    def __init__(self, kinds: Sequence[str], fail: Callable[[str], None]) -> None:
        self._kinds, self._fail = kinds, fail
        self._exit: contextlib.ExitStack | None = None
        self._depth, self._grad = 0, True

    def __enter__(self) -> None:
        self._depth, self._grad = QUIET.depth, torch.is_grad_enabled()
        try:
            self._begin()
        except BaseException:  # an interrupt: nobody is going to call __exit__
            self._end()
            raise

    def _begin(self) -> None:
        QUIET.depth += 1
        torch.set_grad_enabled(False)
        cast = [
            kind for kind in self._kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        packed = packing_hook() is not None
        if cast or packed or "cuda" in self._kinds:
            self._exit = contextlib.ExitStack()
            for kind in cast:
                self._exit.enter_context(torch.autocast(kind, enabled=False))
            if "cuda" in self._kinds:
                self._exit.enter_context(full_precision())
            if packed:
                self._exit.enter_context(unpacked())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            self._end()
        except BaseException:
            self._end()
            raise
        if isinstance(error, Unavailable):
            self._fail(error.reason)
        elif isinstance(error, Exception) and ran_out(error):
            self._fail(OUT_OF_MEMORY)
        elif isinstance(error, Exception):
            self._fail(told(error))
        return isinstance(error, Exception)

    def _end(self) -> None:
        if self._exit is not None:
            self._exit.close()
        torch.set_grad_enabled(self._grad)
        QUIET.depth = self._depth
