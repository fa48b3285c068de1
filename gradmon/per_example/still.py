"""Randomness held still, while it is found out which rows belong to which example."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ORDERING = ("sort", "argsort", "topk")


class Still(TorchDispatchMode):
    """A context that replaces random tensors by constant ones: examples in another order see the same noise.

    Args:
        turned: Whether orders that are drawn move the first; else they are those that change nothing.

    Attributes:
        orders: Whether an order may have been drawn: by torch, of as many things as there may be examples.
        foreign: Whether numpy's or Python's random numbers were drawn, which are not replaced.
    """

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.orders = self.foreign = False
        self._turned, self._lined = turned, False

    def __enter__(self) -> Still:
        self._states = _others()
        return cast("Still", super().__enter__())

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # pyright: ignore[reportUnknownMemberType]
        self.foreign = _others() != self._states

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            self.orders = self.orders or (self._lined and func.overloadpacket.__name__ in _ORDERING)
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:
            position = names.index("dropout_p")
            if position < len(args):
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is torch.ops.aten.randperm.default:
            self.orders = True
            order = torch.arange(args[0], **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})
            return order.flip(0) if self._turned else order
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() > 1:
            self._hold(result)
        return result

    def _hold(self, drawn: Tensor) -> None:
        """Put numbers in the place of what was drawn."""
        line = drawn.is_floating_point() and drawn.numel() == max(drawn.shape)
        self._lined = self._lined or line
        with torch.no_grad():
            if line and self._turned:  # the first is neither the least nor the greatest: sorted, it goes elsewhere
                drawn.copy_(drawn.flatten().sort().values.roll(-1).view(drawn.shape))
            else:
                drawn.fill_(drawn.mean() if drawn.is_floating_point() else drawn.reshape(-1)[0])


def _others() -> tuple[Any, ...]:
    """The states of numpy's and Python's generators."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return (random.getstate(), name, keys.tobytes(), *rest)
