"""Extra passes that leave no trace: weights, gradients, buffers, modes, attributes, hooks and random states."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmon._behind import Behind
from gradmon._snapshot import ModuleState, RandomState


class _Quiet(threading.local):
    depth = 0


QUIET = _Quiet()
"""Whether a pass of our own runs in this thread."""


def quiet_depth() -> int:
    """How many passes of our own there are around, in this thread: nobody listens to those from outside."""
    return QUIET.depth


class Sandbox:
    """A context in which a model may run forward and backward at any weights, and comes out exactly as it went in.

    Inside, autocast (and its cache of cast weights) and TF32 are off and compiled models run eagerly, so that
    differences of gradients mean something. Every pass starts from the random states and buffers that were found on
    entry, and runs on copies of the weights, so that layers which change their weights in forward change the copies.
    Frozen weights that outweigh the trainable ones tenfold (a backbone under adapters) are not copied, but for those of
    embeddings with a maximal norm.

    Args:
        model: The model.
        parameters: Its trainable parameters.
        others: What else a pass may change: other modules, such as a loss with buffers of its own, and what it holds.
        random: The random states that every pass starts from; None for those found on entry.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        others: Behind | None = None,
        random: RandomState | None = None,
    ) -> None:
        self.model = model
        self._behind = Behind() if others is None else others
        self._others = self._behind.modules
        self._start = random
        self.parameters = list(parameters)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Sandbox:
        self._exit = stack = contextlib.ExitStack()
        try:
            held = [p for module in (self.model, *self._others) for p in module.parameters()]
            self._everything = list({id(p): p for p in [*self.parameters, *held]}.values())
            self._frozen = self._copied()
            self._held = [(p, p.data, p.grad, p.requires_grad, p._backward_hooks) for p in self._everything]
            self._found = RandomState()
            self._modules = ModuleState([self.model, *self._others], self._behind.values, self._behind.bindings)
            stack.callback(self._restore)
            stack.callback(_loud, QUIET.depth)
            QUIET.depth += 1
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {parameter.device.type for parameter in self._everything} | {"cpu"}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
            stack.enter_context(full_precision())
            if packing_hook() is not None:
                stack.enter_context(unpacked())
            stack.enter_context(_without_cache())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for parameter, _, _, _, hooks in self._held:
                parameter.grad = None
                if hooks:
                    parameter._backward_hooks = None
            return self
        except BaseException:  # also an interrupt: nobody is going to call __exit__
            stack.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _copied(self) -> list[nn.Parameter]:
        """The frozen parameters that every pass gets copies of."""
        trained = {id(parameter) for parameter in self.parameters}
        frozen = [parameter for parameter in self._everything if id(parameter) not in trained]
        if sum(p.numel() for p in frozen) <= 10 * sum(p.numel() for p in self.parameters):
            return frozen
        modules = [module for root in (self.model, *self._others) for module in root.modules()]
        limited = [p for m in modules if getattr(m, "max_norm", None) is not None for p in m.parameters(recurse=False)]
        return [parameter for parameter in limited if id(parameter) not in trained]

    def _restore(self) -> None:
        try:
            self._put_back()
        except BaseException:  # an interrupt: half of it is not enough
            self._put_back()
            raise

    def _put_back(self) -> None:
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
        before = [(parameter, parameter.data) for parameter in self._everything]
        self._modules.restore()
        self.random.restore()
        try:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data = value.detach().clone()
            for parameter in self._frozen:
                parameter.data = parameter.data.clone()
            yield
        finally:
            for parameter, data in before:
                parameter.data = data


def _loud(depth: int) -> None:
    QUIET.depth = depth


def unpacked() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors are saved as they are, also inside a checkpointed part, which counts its own."""
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor.detach()  # else what a function saves of its own result would keep it alive


def packing_hook() -> Any:
    """What packs tensors here when they are saved for the backward pass; None if they are saved as they are."""
    hooks = cast("Any", torch._C)._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


@contextlib.contextmanager
def _without_cache() -> Generator[None]:
    """No parametrised weight is taken from a cache that was filled at other weights, or left there."""
    from torch.nn.utils import parametrize

    state: Any = parametrize
    enabled, state._cache_enabled = state._cache_enabled, 0
    try:
        yield
    finally:
        state._cache_enabled = enabled


@contextlib.contextmanager
def full_precision() -> Generator[None]:
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
