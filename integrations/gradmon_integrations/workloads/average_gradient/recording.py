"""What a forward pass calls: seen once with its graph, and again at other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient.calls import Call
from gradmon_integrations.workloads.average_gradient.midpoint import Midpoint
from gradmon_integrations.workloads.average_gradient.slopes import Form, Function, Slope, forms, name_of

LINEAR: tuple[Function, ...] = (
    F.linear,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
"""The functions of an input and a weight, in this order, that are linear in each."""

_FUSED = (
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
)
_FUSED_WHY = (
    "torch.{name} hides its nonlinearities inside one function, where their slopes cannot be averaged. Write the "
    "recurrence with torch.tanh and torch.sigmoid, or train this model with the base optimizer alone."
)
_NESTED_WHY = (
    "The closure calls torch.autograd.grad: where derivatives of the model are part of its loss, the slopes of its "
    "functions are not all that is to be averaged. Train this model with the base optimizer alone."
)
_HALF_WHY = (
    "The slopes of {name} need float32 or float64. Got {dtype}: its rounding would hide most of the change that a step "
    "makes. Leave autocast and half precision to the base optimizer."
)


_DIFFERS = "The closure must do the same whenever it is called: it must have no state of its own that changes."
_OTHER_DATA = (
    "The closure must use the same batch whenever it is called. The input of its first layer was another one when it "
    "was called again: take the batch outside of the closure."
)


class ReplayError(GradmonError):
    """The closure did something else when it was called again."""


class Table:
    """What to watch among all that a forward pass calls.

    Args:
        functions: The functions whose derivatives are averaged, each with its slope.
        midpoint: Whether those of linear functions are, too.
    """

    def __init__(self, functions: Mapping[Function, Slope], midpoint: bool) -> None:
        self.midpoint = midpoint
        self.forms: dict[Any, Form] = forms(functions)
        self.names = {form.name.replace("_", "") for form in self.forms.values()}
        self.linear = {function: Form(function, name_of(function), None) for function in LINEAR}
        self.refused: dict[Any, str] = {getattr(torch, name): _FUSED_WHY.format(name=name) for name in _FUSED}
        self.refused[torch.autograd.grad] = _NESTED_WHY
        self.watched = {**self.linear, **self.refused, **self.forms, F.multilabel_soft_margin_loss: None}


class Recorder(TorchFunctionMode):
    """Sees the watched calls of a forward pass whose graph is kept.

    Args:
        table: What to watch.
        copying: Whether to keep copies of inputs and outputs, because something writes into them later.

    Attributes:
        calls: The calls, in their order.
        opaque: Whether a function was called that uses a watched one inside, as part of a loss.
    """

    def __init__(self, table: Table, *, copying: bool) -> None:
        super().__init__()
        self._table, self._copying = table, copying
        self._watched, self._forms, self._linears = table.watched, table.forms, table.linear
        self.calls: list[Call] = []
        self.opaque = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call on, and note it if it is one to watch."""
        if func not in self._watched:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if "out" in kwargs:
            return func(*args, **kwargs)
        form = self._forms.get(func)
        if form is not None:
            x, rest, named = _input(args, kwargs)
            return self._nonlinear(form, func, x, rest, named)
        if func in self._linears:
            return self._linear(self._linears[func], func, *_operands(args, kwargs))
        self.opaque = self.opaque or func is F.multilabel_soft_margin_loss
        refuse(self._table, func)
        return func(*args, **kwargs)

    def kind(self) -> tuple[Any, ...]:
        """What tells this forward pass from others: the functions and weights in their order."""
        # Other weights than parameters are made anew in each forward pass.
        return tuple((call.form.key, id(call.weight) if call.lasting else 0) for call in self.calls)

    def release(self) -> None:
        """Let go of all tensors and nodes."""
        for call in self.calls:
            call.release()

    def _linear(self, form: Form, func: Any, x: Tensor, weight: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> Any:
        call = Call(form, x.shape, (), weight)
        self.calls.append(call)
        if len(self.calls) == 1 and not x.requires_grad:
            call.x = x  # the data: it must be the same in the replay
        curved = self._table.midpoint and torch.is_grad_enabled()
        if not (curved and (x.requires_grad or weight.requires_grad)):
            return func(x, weight, *rest, **kwargs)
        call.middle = Midpoint(func, rest, kwargs)
        return call.middle.call(x, weight)

    def _nonlinear(self, form: Form, func: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(form, x.shape, (rest, kwargs), None)
        self.calls.append(call)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return func(x, *rest, **kwargs)
        if x.dtype not in (torch.float32, torch.float64):
            raise GradmonError(_HALF_WHY.format(name=form.name, dtype=x.dtype))
        if form.apart is None and not kwargs.get("inplace"):
            y = self._traced(call, form, func, x, rest, kwargs)
            if self._copying:
                call.keep(x.detach().clone(), y.detach().clone())
            else:
                call.keep(x, y)
            return y
        # Not in place after all: x is wanted later, and on a view autograd would leave no node of the function's own.
        kwargs = {**kwargs, "inplace": False} if kwargs.get("inplace") else kwargs
        before = x.clone()
        y = self._traced(call, form, form.apart or func, before, rest, kwargs)
        call.keep(before, y)
        return x.copy_(y)

    def _traced(self, call: Call, form: Form, func: Any, x: Tensor, rest: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Call the function, and find the nodes between which its derivative lies."""
        if form.whole is not False:
            y = func(x, *rest, **kwargs)
            if form.whole is None:
                form.whole = _is_whole(x, y)
            if form.whole:
                call.inner = call.outer = y.grad_fn
                return y
        entry = x.view_as(x)
        y = func(entry, *rest, **kwargs)
        if y.shape != x.shape:
            raise GradmonError(
                f"A function that is averaged must be elementwise. {form.name} made {y.shape} of {x.shape}."
            )
        call.inner, call.outer = entry.grad_fn, y.grad_fn
        return y


class Replayer(TorchFunctionMode):
    """Compares the watched calls of another forward pass with those of the first, and notes the slopes between them.

    Args:
        table: What to watch.
        calls: The calls of the first forward pass.
        restoring: Whether to take this pass, at the same weights, for what the first one kept.
    """

    def __init__(self, table: Table, calls: list[Call], *, restoring: bool = False) -> None:
        super().__init__()
        self._table, self._calls, self._restoring = table, calls, restoring
        self._watched, self._forms, self._linears = table.watched, table.forms, table.linear
        self._place = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call on, and compare it if it is one to watch."""
        if func not in self._watched:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if "out" in kwargs:
            return func(*args, **kwargs)
        form = self._forms.get(func)
        if form is not None:
            x, rest, named = _input(args, kwargs)
            return self._nonlinear(form, func, x, rest, named)
        if func in self._linears:
            x, weight, _, _ = _operands(args, kwargs)
            call = self._next(self._linears[func], x, (), weight)
            if call.x is not None and not _same(call.x, x):
                raise ReplayError(_OTHER_DATA)
            if call.middle is not None and not self._restoring:
                call.middle.between(x, weight)
        return func(*args, **kwargs)

    def _nonlinear(self, form: Form, func: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._next(form, x, (rest, kwargs), None)
        if call.inner is None:
            return func(x, *rest, **kwargs)
        in_place = form.apart is not None or kwargs.get("inplace")
        before = x.clone() if in_place or self._restoring else x
        y = func(x, *rest, **kwargs)
        if self._restoring:
            call.keep(before, y.clone())
        else:
            call.between(before, y)
        return y

    def _next(self, form: Form, x: Tensor, options: tuple[Any, ...], weight: Tensor | None) -> Call:
        """The call of the first pass that this one must be."""
        place, self._place = self._place, self._place + 1
        if place >= len(self._calls):
            raise ReplayError(f"{_DIFFERS} After {len(self._calls)} calls it now made one more: {form.name}.")
        call = self._calls[place]
        if call.form.key is not form.key:
            raise ReplayError(f"{_DIFFERS} Call {place + 1} was {call.form.name}, and is now {form.name}.")
        if call.shape != x.shape:
            shapes = f"{tuple(call.shape)}, and is now given {tuple(x.shape)}"
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, was given {shapes}.")
        if call.lasting and call.weight is not weight:
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, now has another weight.")
        if call.options != options and _plain(call.options) != _plain(options):
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, now has other options.")
        return call

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            ReplayError: The forward pass ended early.
        """
        if self._place < len(self._calls):
            missing = self._calls[self._place].form.name
            raise ReplayError(f"{_DIFFERS} Call {self._place + 1}, {missing}, is missing now.")


def _input(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The input of a function, and its other arguments, by position and by name."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["input"], (), {name: value for name, value in kwargs.items() if name != "input"}


def _operands(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, list[Any], dict[str, Any]]:
    """The input and the weight of a linear function, and its other arguments, by position and by name."""
    if len(args) > 1:
        x, weight, *rest = args
        return x, weight, rest, kwargs
    named = dict(kwargs)
    x = args[0] if args else named.pop("input")
    return x, named.pop("weight"), [], named


def refuse(table: Table, func: Any) -> None:
    """Refuse a function that hides nonlinearities, or takes their derivatives.

    Raises:
        GradmonError: It is such a function.
    """
    if func in table.refused:
        raise GradmonError(table.refused[func])


def _plain(options: tuple[Any, ...]) -> Any:
    """Options that can be compared: positional and by name, with Python's own defaults of "not in place" left out."""
    if not options:
        return options
    rest, kwargs = options
    return [str(value) for value in rest], {n: str(value) for n, value in kwargs.items() if n != "inplace"}


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_whole(x: Tensor, y: Tensor) -> bool:
    """Whether a single node of autograd's graph leads from y to x."""
    edges = y.grad_fn.next_functions if y.grad_fn is not None else ()
    if len(edges) != 1 or edges[0][0] is None:
        return False
    return (
        edges[0][0] is x.grad_fn if x.grad_fn is not None else edges[0][0].name() == "torch::autograd::AccumulateGrad"
    )
