"""Modules for whose class there is a rule: they are taken as one use, with hooks around their calls."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn

from gradmon.per_example.capture import Capture
from gradmon.per_example.rules import Rules


@contextlib.contextmanager
def whole_modules(model: nn.Module, rules: Rules, capture: Capture) -> Generator[None]:
    """A context in which the capture takes the modules of certain classes as a whole."""
    classes = {kind for kind in rules if isinstance(kind, type)}
    found = [module for module in model.modules() if type(module) in classes] if classes else []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture.begin(module, args, kwargs)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        capture.end(module, output)

    with contextlib.ExitStack() as stack:
        for module in found:
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, always_call=True).remove)
        yield
