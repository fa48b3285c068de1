"""What is watched among all that a forward pass calls, and the mode that sees it being called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient.slopes import Form, Function, Slope, forms, name_of

LINEAR: tuple[Function, ...] = (
    F.linear,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
"""The functions of an input and a weight, in this order, that are linear in each."""

_NODES = {"relu6": "hardtanh"}
"""Functions of which autograd's node bears another name. ``nn.ReLU6`` calls F.hardtanh itself."""

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


class Table:
    """What to watch.

    Args:
        functions: The functions whose derivatives are averaged, each with its slope.
        midpoint: Whether those of linear functions are, too.

    Attributes:
        curved: The forms of these functions.
        watched: These and the linear functions.
        names: The names of the curved ones' nodes in autograd's graph, in lower case.
        refused: Functions that hide nonlinearities or take their derivatives, and why they are refused.
    """

    def __init__(self, functions: Mapping[Function, Slope], midpoint: bool) -> None:
        self.midpoint = midpoint
        self.curved: dict[Any, Form] = forms(functions)
        self.names = {_NODES.get(form.name, form.name).replace("_", "") for form in self.curved.values()}
        self.watched = {function: Form(function, name_of(function), None, linear=True) for function in LINEAR}
        self.watched |= self.curved
        self.refused: dict[Any, str] = {getattr(torch, name): _FUSED_WHY.format(name=name) for name in _FUSED}
        self.refused[torch.autograd.grad] = _NESTED_WHY

    def refuse(self, function: Any) -> None:
        """Refuse a function.

        Raises:
            GradmonError: It hides nonlinearities, or takes their derivatives.
        """
        if function in self.refused:
            raise GradmonError(self.refused[function])


class Watcher(Protocol):
    """Told of the calls of a forward pass; it makes them, and gives what they return."""

    def linear(self, form: Form, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of a linear function."""
        ...

    def nonlinear(self, form: Form, function: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a function whose derivative is averaged; its other arguments by position and by name."""
        ...

    def other(self, function: Any, args: Any) -> None:
        """A call of any other function, and its arguments by position; it is made afterwards."""
        ...


class Watch(TorchFunctionMode):
    """Tells of the calls of a forward pass, as long as it is active.

    Args:
        table: What to watch.
        watcher: Whom to tell.
    """

    def __init__(self, table: Table, watcher: Watcher) -> None:
        super().__init__()
        self._watched = table.watched
        self._linear, self._nonlinear, self._other = watcher.linear, watcher.nonlinear, watcher.other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call on, and tell of it if it is one to watch."""
        if kwargs is None:
            kwargs = {}
        elif kwargs.get("out") is not None:
            return func(*args, **kwargs)
        form = self._watched.get(func)
        if form is None:
            self._other(func, args)
            return func(*args, **kwargs)
        if form.linear:
            return self._linear(form, func, args, kwargs)
        if args:
            return self._nonlinear(form, func, args[0], args[1:], kwargs)
        first = _first(func, kwargs)
        named = {name: value for name, value in kwargs.items() if name != first}
        return self._nonlinear(form, func, kwargs[first], (), named)


def _first(function: Any, named: Mapping[str, Any]) -> str:
    """The name of a function's first argument, in a call that gives all by name."""
    usual = next((name for name in ("input", "self") if name in named), None)
    return next(iter(inspect.signature(function).parameters)) if usual is None else usual
