"""Extra passes that leave no trace: weights, gradients, buffers, modes, attributes, hooks and random states."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


class RandomState:
    """The random states as found: torch on the CPU and every CUDA device, numpy, Python, and the model's generators.

    Args:
        model: The model, whose modules may hold generators of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy = np.random.get_state()
        self._python = random.getstate()
        held = [value for module in model.modules() for value in vars(module).values()]
        self._own = [(value, value.get_state()) for value in held if isinstance(value, torch.Generator)]

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._own:
            generator.set_state(state)


class ModuleState:
    """Everything that a forward pass may change on a model: buffers, attributes, modes and the tensors behind them.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        tensors: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            attributes = dict(vars(module))
            self._attributes.append((vars(module), attributes))
            for value in attributes.values():
                if type(value) in (list, dict, set):
                    self._containers.append((value, copy.copy(value)))
            for value in [*attributes.values(), *module.buffers(recurse=False)]:
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.grad_fn is None:
                    tensors[id(value)] = (value, value.detach().clone())
        self._tensors = list(tensors.values())

    def restore(self) -> None:
        """Put back the attributes, and the contents of the tensors, without touching autograd's version counters."""
        for now, before in self._attributes:
            if not _identical(now, before):
                now.clear()
                now.update(before)
        for now, before in self._containers:
            if not _identical(now, before):
                now.clear()
                extend = now.extend if isinstance(now, list) else now.update  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                extend(before)
        for tensor, content in self._tensors:
            tensor.data.copy_(content)


def _identical(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects in the same order; sets are compared as they are."""
    if isinstance(a, set):
        return a == b
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        pairs = zip(cast("dict[Any, Any]", a).items(), cast("dict[Any, Any]", b).items(), strict=True)
        return all(name == other and value is twin for (name, value), (other, twin) in pairs)
    return all(value is twin for value, twin in zip(cast("list[Any]", a), cast("list[Any]", b), strict=True))


class Sandbox:
    """A context in which a model may run forward and backward at any weights, and comes out exactly as it went in.

    Inside, autocast and TF32 are off and compiled models run eagerly, so that differences of gradients mean
    something. Every pass starts from the random states and buffers that were found on entry, and runs on copies of
    the weights, so that layers which change their weights in forward change the copies.

    Args:
        model: The model.
        parameters: Its trainable parameters.
        random: The random states that every pass starts from; None for those found on entry.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], random: RandomState | None = None) -> None:
        self.model = model
        self._start = random
        self.parameters = list(parameters)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Sandbox:
        with contextlib.ExitStack() as stack:
            self._everything = list({id(p): p for p in [*self.parameters, *self.model.parameters()]}.values())
            self._held = [(p, p.data, p.grad, p.requires_grad, p._backward_hooks) for p in self._everything]
            self._found = RandomState(self.model)
            self._modules = ModuleState(self.model)
            stack.callback(self._restore)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {parameter.device.type for parameter in self._everything} | {"cpu"}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_full_precision())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for parameter, _, _, _, hooks in self._held:
                parameter.grad = None
                if hooks:
                    parameter._backward_hooks = None
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _restore(self) -> None:
        for parameter, data, grad, requires_grad, hooks in self._held:
            parameter.data = data
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
            if parameter._backward_hooks is not hooks:
                parameter._backward_hooks = hooks
        self._modules.restore()
        self._found.restore()

    @property
    def random(self) -> RandomState:
        """The random states that every pass starts from."""
        return self._found if self._start is None else self._start

    @contextlib.contextmanager
    def at(self, values: Sequence[Tensor]) -> Generator[None]:
        """The trainable parameters take these values (copied) inside; buffers and random states start as found.

        Args:
            values: One tensor per trainable parameter, of its shape.
        """
        trained = {id(parameter) for parameter in self.parameters}
        frozen = [parameter for parameter in self._everything if id(parameter) not in trained]
        before = [(parameter, parameter.data) for parameter in self._everything]
        self._modules.restore()
        self.random.restore()
        try:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data = value.detach().clone()
            for parameter in frozen:
                parameter.data = parameter.data.clone()
            yield
        finally:
            for parameter, data in before:
                parameter.data = data


@contextlib.contextmanager
def _full_precision() -> Generator[None]:
    """TF32 off on CUDA; elsewhere nothing to do."""
    backends: list[Any] = []
    if torch.cuda.is_initialized():
        cudnn: Any = torch.backends.cudnn
        backends = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
