"""What a forward pass calls: seen once with its graph, and again at other weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient.calls import Call
from gradmon_integrations.workloads.average_gradient.midpoint import Midpoint
from gradmon_integrations.workloads.average_gradient.secants import Secants
from gradmon_integrations.workloads.average_gradient.slopes import Form
from gradmon_integrations.workloads.average_gradient.watching import Table

_HALF_WHY = (
    "The {what} of {name} need float32 or float64. Got {dtype}: its rounding would hide most of the change that a step "
    "makes. Leave autocast and half precision to the base optimizer."
)
_CONSTANT_WHY = (
    "{name} is to be averaged, but returned a tensor without a graph: no gradient arrives there for which a slope "
    "could be. A function without a derivative needs one that is zero, such as `result + 0 * x`."
)
_TRANSFORMED_WHY = (
    "{name} is called inside of a transform of torch.func, such as vmap, where its derivative cannot be replaced. "
    "Write the dimension of the batch out."
)
_DIFFERS = "The closure must do the same whenever it is called: it must have no state of its own that changes."
_OTHER_DATA = (
    "The closure must use the same batch whenever it is called. The input of its first layer was another one when it "
    "was called again: take the batch outside of the closure."
)

_NORMS = frozenset({F.batch_norm, F.instance_norm})
"""Functions that are given statistics to change."""

_FROM_OUTPUT = frozenset({F.elu, F.selu, torch.selu, F.celu, torch.celu})
"""Functions that keep their output for the backward pass where they work in place, and their input elsewhere."""

_func: Any = cast("Any", torch._C)._functorch
_transformed = _func.is_functorch_wrapped_tensor


class ReplayError(GradmonError):
    """The closure did something else when it was called again."""


class Recorder:
    """Told of the watched calls of a forward pass whose graph is kept.

    Args:
        table: What is watched.
        copying: Whether to keep copies of inputs and outputs, because something writes into them later.

    Attributes:
        calls: The calls, in their order.
        copying: As given.
        opaque: Whether a function was called that uses a watched one inside, as part of a loss.
    """

    def __init__(self, table: Table, *, copying: bool) -> None:
        self._table, self._midpoint, self.copying = table, table.midpoint, copying
        self.calls: list[Call] = []
        self.opaque = False
        self._others, self._statistics = 0, list[int]()

    def kind(self) -> tuple[Any, ...]:
        """What tells this forward pass from others: functions and weights in their order, statistics, how much else."""
        calls = [(call.form.key, id(call.weight) if call.lasting else 0) for call in self.calls]
        return (self._others, *self._statistics, *calls)

    def release(self) -> None:
        """Let go of all tensors and nodes."""
        for call in self.calls:
            if call.averaged:
                call.release()
        self.calls = []

    def other(self, function: Any, args: Any) -> None:
        """Refuse what hides nonlinearities, and note what has statistics of its own.

        Args:
            function: What is called.
            args: With what, by position.

        Raises:
            GradmonError: It does.
        """
        self._others += 1
        if function in _NORMS and len(args) > 1:
            self._statistics.append(id(args[1]))
        self.opaque = self.opaque or function is F.multilabel_soft_margin_loss
        self._table.refuse(function)

    def linear(self, form: Form, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note a call of a linear function.

        Args:
            form: What is called.
            function: As it is called.
            args: With what, by position.
            kwargs: And by name.

        Returns:
            What the call returns.

        Raises:
            GradmonError: Its Jacobians are wanted in the middle of the step, and its output is too coarse.
        """
        x, weight = operands(args, kwargs)
        call = Call(form, None, None, weight)
        if not self.calls and not x.requires_grad and not _transformed(x):
            # The data: it must be the same in the replay.
            call.x, call.versions = x, (_version_of(x), 0)
        self.calls.append(call)
        if not self._midpoint:
            return function(*args, **kwargs)
        call.shape = x.shape
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if _transformed(x) or _transformed(weight):
            _refuse_transformed(form, x, weight)
            return function(*args, **kwargs)
        if not (x.requires_grad or weight.requires_grad):
            return function(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
        call.middle = Midpoint(function, list(args[2:]), named)
        z = call.middle.call(x, weight)
        if z.dtype is not torch.float32 and z.dtype is not torch.float64:
            raise GradmonError(_HALF_WHY.format(what="Jacobians", name=form.name, dtype=z.dtype))
        return z

    def nonlinear(self, form: Form, function: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note a call of a function whose derivative is averaged.

        Args:
            form: What is called.
            function: As it is called.
            x: Its input.
            rest: Its other arguments by position.
            kwargs: And by name.

        Returns:
            What the call returns.

        Raises:
            GradmonError: The function is not elementwise, or its input too coarse.
        """
        call = Call(form, x.shape, (rest, kwargs), None)
        self.calls.append(call)
        if not (x.requires_grad and torch.is_grad_enabled()):
            if torch.is_grad_enabled() and _transformed(x):
                _refuse_transformed(form, x)
            return function(x, *rest, **kwargs)
        dtype = x.dtype
        if dtype is not torch.float32 and dtype is not torch.float64:
            raise GradmonError(_HALF_WHY.format(what="slopes", name=form.name, dtype=dtype))
        if form.apart is None and not kwargs.get("inplace"):
            y = self._traced(call, form, function, x, rest, kwargs)
            if self.copying:
                call.keep(x.detach().clone(), y.detach().clone())
            else:
                call.keep(x, y)
            return y
        # Not in place after all: x is wanted later, and on a view autograd would leave no node of the function's own.
        if form.key in _FROM_OUTPUT:
            before, y = x.detach().clone(), function(x.clone(), *rest, **kwargs)
            call.inner = call.outer = y.grad_fn
            call.keep(before, y)
            return x.copy_(y)
        kwargs = {**kwargs, "inplace": False} if kwargs.get("inplace") else kwargs
        before = x.clone()
        y = self._traced(call, form, form.apart or function, before, rest, kwargs)
        call.keep(before, y)
        return x.copy_(y)

    def _traced(self, call: Call, form: Form, func: Any, x: Tensor, rest: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Call the function, and find the nodes between which its derivative lies."""
        if form.whole:
            y = func(x, *rest, **kwargs)
            call.inner = call.outer = y.grad_fn
            return y
        # Called once also where this is not known yet: a checkpoint counts what is saved for the backward pass.
        entry = x.view_as(x)
        y = func(entry, *rest, **kwargs)
        if form.whole is None:
            form.whole = _is_whole(entry, y)
        if y.shape != x.shape:
            raise GradmonError(
                f"A function that is averaged must be elementwise. {form.name} made {y.shape} of {x.shape}."
            )
        if y.grad_fn is None:
            raise GradmonError(_CONSTANT_WHY.format(name=form.name))
        call.inner, call.outer = entry.grad_fn, y.grad_fn
        return y


class Replayer:
    """Compares the watched calls of another forward pass with those of the first, and notes the slopes between them.

    Args:
        calls: The calls of the first forward pass.
        secants: Where slopes of small tensors are worked out together; None to work out each at once.
        restoring: Whether to take this pass, at the same weights, for what the first one kept.
    """

    def __init__(self, calls: list[Call], *, secants: Secants | None = None, restoring: bool = False) -> None:
        self._calls, self._secants, self._restoring = calls, secants, restoring
        self._place = 0

    def other(self, function: Any, args: Any) -> None:
        """Pass over what the first pass let be."""

    def linear(self, form: Form, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compare a call of a linear function.

        Args:
            form: What is called.
            function: As it is called.
            args: With what, by position.
            kwargs: And by name.

        Returns:
            What the call returns.

        Raises:
            ReplayError: The first pass called something else, or had other data.
        """
        x, weight = operands(args, kwargs)
        call = self._next(form, x, None, weight)
        # What the closure itself has written to since cannot be compared.
        if call.x is not None and _version_of(call.x) == call.versions[0] and not _same(call.x, x):
            raise ReplayError(_OTHER_DATA)
        if call.middle is not None and not self._restoring:
            call.middle.between(x, weight)
        return function(*args, **kwargs)

    def nonlinear(self, form: Form, function: Any, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compare a call of a function whose derivative is averaged.

        Args:
            form: What is called.
            function: As it is called.
            x: Its input.
            rest: Its other arguments by position.
            kwargs: And by name.

        Returns:
            What the call returns.
        """
        call = self._next(form, x, (rest, kwargs), None)
        if call.inner is None:
            return function(x, *rest, **kwargs)
        in_place = form.apart is not None or kwargs.get("inplace")
        before = x.clone() if in_place or self._restoring else x
        y = function(x, *rest, **kwargs)
        if self._restoring:
            call.keep(before, y.clone())
        elif in_place or self._secants is None or not self._secants.take(call, before, y):
            call.between(before, y)
        return y

    def _next(self, form: Form, x: Tensor, options: Any, weight: Tensor | None) -> Call:
        """The call of the first pass that this one must be."""
        place, self._place = self._place, self._place + 1
        if place >= len(self._calls):
            raise ReplayError(f"{_DIFFERS} After {len(self._calls)} calls it now made one more: {form.name}.")
        call = self._calls[place]
        if call.form.key is not form.key:
            raise ReplayError(f"{_DIFFERS} Call {place + 1} was {call.form.name}, and is now {form.name}.")
        if call.shape is not None and call.shape != x.shape:
            shapes = f"{tuple(call.shape)}, and is now given {tuple(x.shape)}"
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, was given {shapes}.")
        if call.weight is not weight and call.lasting:
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, now has another weight.")
        if options is not None and _differ(call.options, options):
            raise ReplayError(f"{_DIFFERS} Call {place + 1}, {form.name}, now has other options.")
        return call

    def finish(self) -> bool:
        """Check that nothing is missing; whether all slopes are found, since none of what they need was written to.

        Raises:
            ReplayError: The forward pass ended early.
        """
        if self._place < len(self._calls):
            missing = self._calls[self._place].form.name
            raise ReplayError(f"{_DIFFERS} Call {self._place + 1}, {missing}, is missing now.")
        return self._secants is None or self._secants.finish()


def operands(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The input and the weight of a linear function, given by position or by name."""
    if len(args) > 1:
        return args[0], args[1]
    return args[0] if args else kwargs["input"], kwargs["weight"]


def _refuse_transformed(form: Form, *inputs: Tensor) -> None:
    """Refuse a function inside of a transform, such as vmap, if a gradient of an input is wanted outside of it."""
    for x in inputs:
        while _transformed(x):
            x = _func.get_unwrapped(x)
        if x.requires_grad:
            raise GradmonError(_TRANSFORMED_WHY.format(name=form.name))


def _differ(options: Any, others: Any) -> bool:
    """Whether a function is given other options, by position or by name, than before."""
    try:
        return options != others and _plain(options) != _plain(others)
    except RuntimeError:  # a tensor of several elements is neither equal nor not
        return _plain(options) != _plain(others)


def _plain(options: Any) -> Any:
    """Options that can be compared: tensors, which depend on the weights, and Python's "not in place" are left out."""
    if options is None:
        return None
    rest, kwargs = options
    return [_shown(value) for value in rest], {n: _shown(value) for n, value in kwargs.items() if n != "inplace"}


def _shown(value: Any) -> str:
    return "tensor" if isinstance(value, Tensor) else str(value)


def _version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_whole(x: Tensor, y: Tensor) -> bool:
    """Whether a single node of autograd's graph leads from y to x, which is not a leaf."""
    edges = y.grad_fn.next_functions if y.grad_fn is not None else ()
    return len(edges) == 1 and edges[0][0] is x.grad_fn
