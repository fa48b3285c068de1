"""The linear maps and convolutions of a forward pass: the first, the last, and what goes in and comes out of it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradmon._batches import tensors

_TRANSPOSED: frozenset[Callable[..., Any]] = frozenset(
    cast("Any", (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d))
)
CONVOLUTIONS: frozenset[Callable[..., Any]] = _TRANSPOSED | frozenset(
    cast("Any", (functional.conv1d, functional.conv2d, functional.conv3d))
)
LINEAR: Callable[..., Any] = cast("Any", functional.linear)
ADDMM: Callable[..., Any] = cast("Any", torch.addmm)
"""A linear map whose weight is (in, out), when it is called with a parameter."""
_COMPOSITE: Callable[..., Any] = functional.multi_head_attention_forward


@dataclass(frozen=True)
class Call:
    """One call of a linear map or a convolution.

    Attributes:
        number: The how many-th of its forward pass it is.
        function: What was called.
        inputs: What went in, detached.
        weight: Its weight, as it was handed over.
        bias: Its bias; None without.
        output: What came out, detached.
        arguments: All that it was called with, by name or, after the first three, by place.
    """

    number: int
    function: Callable[..., Any]
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def channels(self) -> int:
        """The dimension of the output that holds the units."""
        return -1 if self.function in (LINEAR, ADDMM) else self.output.ndim - self.weight.ndim + 1

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.function in _TRANSPOSED

    @property
    def groups(self) -> int:
        """How many groups a convolution has: its channels in, over those that one of its units sees."""
        if self.function in (LINEAR, ADDMM):
            return 1
        if not self.transposed:
            return self.inputs.shape[self.channels] // self.weight.shape[1]
        return self.output.shape[self.channels] // self.weight.shape[1]

    def again(self) -> Tensor:
        """Make the same call once more, with what its weight and bias are now."""
        args, kwargs = self.arguments
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Replacement:
    """What comes out instead of the outputs of some calls: the same for all examples.

    Attributes:
        weight: The calls with this weight; None for the output of the model.
        number: The call of this number, where its weight is made anew in every pass.
        value: One value for each unit, (C,); a graph leads to it, and to nothing else.
        channels: The dimension of the output that holds the units.
    """

    weight: Tensor | None
    number: int | None
    value: Tensor
    channels: int

    def instead(self, output: Tensor) -> Tensor:
        """The constant output, of the shape of the one that it replaces."""
        shape = [1] * output.ndim
        shape[self.channels] = -1
        return torch.zeros_like(output) + self.value.to(output.dtype).reshape(shape)


@dataclass(eq=False)
class Calls:
    """Listens to forward passes.

    Attributes:
        change: What is done in place of a call; None for the call itself.
        replacement: What comes out instead of some outputs; None for what does come out.
        trained: The identities of the parameters that are the model's or the optimizer's: calls of other networks, such
            as a discriminator or a teacher in the loss, are neither `first` nor `last`. None for all calls.
        first: The first call with a parameter as its weight.
        last: The last call.
        output: The output of the model: a tensor, its attribute or entry ``logits``, or the first tensor in it.
        count: How many calls there were.
    """

    change: Callable[[Call], Tensor] | None = None
    replacement: Replacement | None = None
    trained: frozenset[int] | None = None
    first: Call | None = None
    last: Call | None = None
    output: Tensor | None = None
    count: int = 0
    _inside: int = field(default=0, init=False)
    _entered: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def during(self, model: nn.Module) -> Generator[None]:
        """A context for one forward pass."""
        self.first = self.last = self.output = None
        self.count = self._inside = 0
        self._entered = False
        with contextlib.ExitStack() as stack:
            if not isinstance(model, torch.jit.ScriptModule):  # which has no such hooks
                stack.callback(model.register_forward_pre_hook(self._enter).remove)
                stack.callback(model.register_forward_hook(self._leave).remove)
            stack.enter_context(_Mode(self))
            yield

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._inside += 1
        self._entered = True

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._inside -= 1
        found = logits_of(output)
        self.output = None if found is None else found.detach()
        if self.replacement is not None and self.replacement.weight is None and self.replacement.number is None:
            return self.replacement.instead(output) if isinstance(output, Tensor) else None
        return None

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Make a call, and note it."""
        names = ("bias", "input", "weight") if function is ADDMM else ("input", "weight", "bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs, weight, bias = given["input"], given["weight"], given.get("bias")
        number, self.count = self.count, self.count + 1
        output = function(*args, **kwargs)
        note = Call(number, function, inputs.detach(), weight, bias, output.detach(), (args, kwargs))
        if self.change is not None:
            output = self.change(note)
        if not self._foreign(weight):
            if self.first is None and isinstance(weight, nn.Parameter):
                self.first = note
            self.last = note
        instead = self.replacement
        if instead is not None and (
            instead.number == number or (instead.weight is not None and instead.weight is weight)
        ):
            return instead.instead(output)
        return output

    def _foreign(self, weight: Tensor) -> bool:
        """Whether a weight belongs to another network."""
        if self.trained is None or not self.trained.isdisjoint(_leaves(weight)):
            return False
        return isinstance(weight, nn.Parameter) or (self._entered and not self._inside)


def _leaves(tensor: Tensor) -> set[int]:
    """The identities of the tensors that one is made of, as autograd knows them."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, seen, waiting = set[int](), set[Any](), [cast("Any", tensor.grad_fn)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found


def logits_of(output: Any) -> Tensor | None:
    """What a model's output says: itself, what it calls ``logits``, or its first tensor of real numbers."""
    if isinstance(output, Tensor):
        return output
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(held, Tensor):
        return held
    return next((tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.ndim > 0), None)


class _Mode(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _COMPOSITE and (opened := _opened(func)) is not None:
            with self:
                return opened(*args, **kwargs)
        product = func is ADDMM and len(args) == 3 and isinstance(args[2], nn.Parameter)
        if func is LINEAR or func in CONVOLUTIONS or product:
            return self._calls.call(func, args, kwargs)
        return func(*args, **kwargs)


def _opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function without its question for overrides, which would come back here without end."""
    names: dict[str, Any] | None = getattr(function, "__globals__", None)
    code = getattr(function, "__code__", None)
    if names is None or code is None or "has_torch_function" not in names:
        return None
    copy = types.FunctionType(
        code, {**names, "has_torch_function": _never}, code.co_name, getattr(function, "__defaults__", None)
    )
    copy.__kwdefaults__ = getattr(function, "__kwdefaults__", None)
    return copy


def _never(tensors: Any) -> bool:
    return False
