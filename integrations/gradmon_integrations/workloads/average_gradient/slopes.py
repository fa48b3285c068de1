"""The functions whose derivative is averaged over a step, and the slope that stands for it.

Over a step that takes the input of an elementwise function f from x to x' on a straight line, the average of f' is the
slope of the secant, ``(f(x') - f(x)) / (x' - x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Function = Callable[..., Any]
Slope = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, f(x), x', f(x')) to the average slope between x and x', all of one shape; free to be anything where x' is x."""

NEAR = 1.19e-7
"""Up to this ``|x' - x|`` the derivative f'(x) stands for itself (the paper's constant; it is float32's epsilon)."""

_BEYOND = {
    torch.float32: float(np.nextafter(np.float32(NEAR), np.float32(1))),
    torch.float64: float(np.nextafter(NEAR, 1.0)),
}
"""The next number above `NEAR`."""
_INSIDE: Any = torch.ops.aten.hardtanh_backward.grad_input
_ONE = torch.ones((), device="cpu")


def resting(moved: Tensor, out: Tensor | None = None) -> Tensor:
    """1 where an input hardly moves, 0 elsewhere: numbers, since choosing by booleans is slow.

    Args:
        moved: ``x' - x``, any shape, float32 or float64.
        out: Where to write, if there is room.

    Returns:
        Of the same shape and dtype; 0 or 1 where `moved` is not a number.
    """
    # The derivative of hardtanh is 1 strictly between its limits. A distance and a comparison would take two calls.
    limit = _BEYOND[moved.dtype]
    one = _ONE if moved.is_cpu else moved.new_ones(())
    return _INSIDE(one, moved, -limit, limit, grad_input=torch.empty_like(moved) if out is None else out)


def secant(x: Tensor, y: Tensor, x_after: Tensor, y_after: Tensor) -> Tensor:
    """``(y' - y) / (x' - x)``, elementwise.

    Args:
        x: The input before the step, any shape.
        y: ``f(x)``.
        x_after: The input after the step.
        y_after: ``f(x')``.

    Returns:
        The slopes, of the same shape; not finite where x' is x.
    """
    return torch.sub(y_after, y).div_(torch.sub(x_after, x))


FUNCTIONS: Mapping[Function, Slope] = MappingProxyType(
    {
        torch.tanh: secant,
        torch.sigmoid: secant,
        F.elu: secant,
        F.selu: secant,
        F.celu: secant,
        F.gelu: secant,
        F.silu: secant,
        F.softplus: secant,
        F.mish: secant,
        F.hardswish: secant,
        F.softsign: secant,
        F.logsigmoid: secant,
        F.tanhshrink: secant,
        torch.sin: secant,
        torch.cos: secant,
        torch.atan: secant,
        torch.asinh: secant,
        torch.erf: secant,
    }
)
"""The functions that are averaged unless the caller says otherwise: elementwise, and not linear in pieces.

One entry stands for all forms of a function: ``torch.tanh``, ``x.tanh()``, ``F.tanh``, ``nn.Tanh``, and those in place.
To average others, too, such as ReLU, whose secant is well defined: ``functions={**FUNCTIONS, F.relu: secant}``.
"""

_OTHER_NAMES = {"log_sigmoid": ("logsigmoid",), "sigmoid": ("special_expit",), "atan": ("arctan",)}
_OTHER_NAMES |= {"asinh": ("arcsinh",), "erf": ("special_erf",), "logsigmoid": ("log_sigmoid",)}
_C: Any = torch._C
_PLACES: tuple[Any, ...] = (torch, F, Tensor, _C._nn, _C._special, torch.ops.aten)


@dataclass(eq=False)
class Form:
    """One way to call a function.

    Attributes:
        key: The function as it stands in the table; all forms of a function share it.
        name: What to call it in a message.
        slope: What stands for its derivative; None where there is no other than the ordinary one.
        apart: For a form that works in place, the one that does not.
        whole: Whether its derivative is always a node of its own in autograd's graph; None before its first call.
        linear: Whether it is a function of an input and a weight, linear in each.
    """

    key: Function
    name: str
    slope: Slope | None
    apart: Function | None = None
    whole: bool | None = None
    linear: bool = False


def forms(functions: Mapping[Function, Slope]) -> dict[Any, Form]:
    """Every form of some functions, by what is called.

    Args:
        functions: As `FUNCTIONS`.

    Returns:
        The functions themselves, and the functions of torch and methods of tensors that bear their names.
    """
    found: dict[Any, Form] = {}
    for key, slope in functions.items():
        stem = name_of(key)
        for name in (stem, *_OTHER_NAMES.get(stem, ())):
            for place in _PLACES:
                plain, in_place = getattr(place, name, None), getattr(place, f"{name}_", None)
                # F.tanh and the like are plain Python: what they call is seen.
                for function in _overloads(plain):
                    found[function] = Form(key, stem, slope)
                for function in _overloads(in_place):
                    found[function] = Form(key, stem, slope, apart=plain or key)
    for key, slope in functions.items():
        found[key] = Form(key, name_of(key), slope, whole=None if _of_torch(key) else False)
    return found


def _of_torch(function: Function) -> bool:
    """Whether it is torch's own, whose calls all leave the same nodes; others may decide anew each time."""
    return not isinstance(function, FunctionType) or function.__module__.partition(".")[0] == "torch"


def is_seen(function: Any) -> bool:
    """Whether calls of a function can be seen: those of torch can, and what asks ``__torch_function__`` as they do."""
    if any(getattr(place, name_of(function), None) is function for place in _PLACES):
        return True
    if isinstance(function, FunctionType):
        return "handle_torch_function" in function.__code__.co_names
    operators = torch._ops.OpOverloadPacket, torch._ops.OpOverload
    return isinstance(function, (BuiltinFunctionType, MethodDescriptorType, *operators))


def _overloads(function: Any) -> list[Any]:
    """A function, and for an operator of ``torch.ops`` also each of its overloads; none where there is no function."""
    if function is None:
        return []
    if not isinstance(function, torch._ops.OpOverloadPacket):
        return [function]
    return [function, *(getattr(function, name) for name in function.overloads())]


def name_of(function: Function) -> str:
    """The name of a function, as a message tells it."""
    return str(getattr(function, "__name__", function)).rstrip("_")
