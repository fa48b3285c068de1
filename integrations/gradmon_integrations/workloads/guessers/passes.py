"""Forward passes over one batch that all see the same random numbers and buffers, with tangents or without."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmon._batches import example_count, map_tensors
from gradmon._behind import behind
from gradmon._errors import ArgumentError
from gradmon._parameters import trainable, unwrapped
from gradmon._sandbox import QUIET
from gradmon._snapshot import ModuleState, RandomState
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.followers import Inject, Injector, Visitor, differs, swapped
from gradmon_integrations.workloads.guessers.inputs import Inputs
from gradmon_integrations.workloads.guessers.mode import Handler, Mode
from gradmon_integrations.workloads.guessers.recording import Site, Structure, record
from gradmon_integrations.workloads.guessers.replay import alike

SEEDS = 2**32
"""How many seeds torch's generator on the CPU tells apart."""


class Passes:
    """Forward passes of a model and its loss, to be used as a context.

    Args:
        model: The model.
        loss: ``loss(model, batch)``.
        batch: The batch.
        settle: Whether buffers and random states are left as after one pass, instead of as they were found.

    Attributes:
        draws: Whether some function is known to draw random numbers.
        expected: How many examples to expect where they are yet to be counted; None to count them first.

    Raises:
        ArgumentError: `model`, `loss` or `batch` is not what it must be.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, settle: bool = False) -> None:
        if not callable(loss):
            raise ArgumentError("loss", "be callable as loss(model, batch)", type(loss).__name__)
        self.parameters = trainable(model)
        self.model = unwrapped(model)
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.examples = example_count(batch)
        self.draws = False
        self._counts = False
        self.expected: int | None = None
        self._counted = False
        self._behind: Any = loss
        self._loss, self._batch, self.settle = loss, batch, settle
        self.every = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._exit = contextlib.ExitStack()

    @staticmethod
    def of(model: nn.Module, closure: Callable[[], Tensor], examples: int | None) -> Passes:
        """The passes of a function that runs the model, left as after one of them; B may be yet to be counted."""
        passes = Passes(model, _Closed(closure), torch.empty(examples or 1), settle=True)
        passes._counts, passes._behind = examples is None, closure
        return passes

    def __enter__(self) -> Passes:
        with contextlib.ExitStack() as stack:
            _prepare()
            self._ran = self._remembered = False
            QUIET.depth += 1
            stack.callback(_loud)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            # The fused kernels have no forward-mode derivative, nor has the encoder's shortcut.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
        if self._ran and (kind is not None or not self.settle):
            self._rewind()
            for held, value in self._tables:
                held.copy_(value)
            if self._modules is not None:
                self._modules.restore()

    def seed(self, generator: torch.Generator | None) -> int:
        """A number from a generator, None for torch's global one: drawn for good, before the first pass."""
        device = None if generator is None else generator.device
        return int(torch.randint(SEEDS, (), generator=generator, device=device))

    def _remember(self) -> None:
        if self._remembered:
            return
        self._remembered = True
        self._random = RandomState()
        around = behind(self._behind)
        modules = [self.model, *around.modules]
        # Attributes are put back once; between passes only what a pass of an ordinary model depends on.
        self._modules = None if self.settle else ModuleState(modules, around.values, around.bindings)
        self._buffers = [(held, held.clone()) for module in modules for held in module.buffers()]
        # Rows of these are scaled down in place by a forward pass.
        tables = [] if self.settle else [part for module in modules for part in module.modules() if _bounded(part)]
        self._tables = [(part.weight.data, part.weight.detach().clone()) for part in tables]

    def _rewind(self) -> None:
        for held, value in self._buffers:
            held.data.copy_(value)
        self._random.restore()

    def run(self) -> Tensor:
        """The loss, a scalar or (B,), from the state that was found before the first pass.

        Raises:
            ArgumentError: `loss` returned something else.
        """
        # No functions of the model: a pass that begins by putting something back is like one that does not.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self._ran:
                self._rewind()
            self._remember()
        self._ran = True
        value = self._loss(self.model, map_tensors(self._batch, lambda tensor: tensor.detach().clone()))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentError("loss", "return a floating-point tensor", getattr(value, "dtype", type(value).__name__))
        if self._counts:
            if value.ndim != 1:
                must = "return one value per example, (B,), or `examples` must be given"
                raise ArgumentError("closure", must, f"shape {tuple(value.shape)}")
            self.examples, self._counted = len(value), True
        if value.numel() == 1:
            return value.reshape(())
        if value.ndim != 1 or value.shape[0] != self.examples:
            must = f"return a scalar or one value per example, ({self.examples},)"
            raise ArgumentError("loss", must, f"shape {tuple(value.shape)}")
        return value

    def record(self, follow: bool, values: bool, inputs: Inputs | None = None) -> Structure:
        """Run once, and find the layers; see `record`."""
        if self._counts and not self._counted:
            if self.expected is None:
                self.run()
            else:
                self.examples = self.expected
        supposed = self.examples
        found = record(self.run, self.names, self.every, supposed, follow, values, self.draws, inputs)
        if self.examples != supposed:
            found = record(self.run, self.names, self.every, self.examples, follow, values, self.draws, inputs)
        if found.random and not self.draws:
            self.draws = True
            # Once more, to see which of the functions it was.
            found = record(self.run, self.names, self.every, self.examples, follow, values, True)
        return found

    def tangent(
        self,
        structure: Structure,
        inject: Inject,
        directions: Mapping[str, Tensor],
        count: int,
        vectorised: bool,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """The directional derivatives of the loss along some tangents at once.

        Args:
            structure: What `record` found.
            inject: The tangents that are added to each layer's z.
            directions: Tangents of parameters, (count, *shape).
            count: How many there are.
            vectorised: Whether to use `torch.vmap`, which shares the plain forward pass between them.
            inputs: Where to keep the layers' inputs, of one that is not vectorised; None to leave them.

        Returns:
            (count,), or (count, B) where the loss is one value per example.

        Raises:
            ArgumentError: Some function has no forward-mode derivative, or the passes differ.
            RuntimeError: `torch.vmap` cannot take some function, or makes another loss of it.
        """
        if vectorised:

            def one(place: Tensor) -> tuple[Tensor, Tensor]:
                def along(unused: Tensor) -> Tensor:
                    return self._dual(structure, inject, directions, place) + 0 * unused

                blank = torch.zeros((), dtype=structure.loss.dtype, device=structure.loss.device)
                value, tangent, *_ = torch.func.jvp(along, (blank,), (blank,))
                return value, tangent

            places = torch.arange(count, device=structure.loss.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                values, tangents = torch.func.vmap(one, randomness="same")(places)
            if not alike(values[0], structure.loss):
                raise RuntimeError("another loss under vmap")
            return tangents
        found: list[Tensor] = []
        for place in range(count):
            with forward_ad.dual_level():
                try:
                    dual = self._dual(structure, inject, directions, place, inputs)
                    value, tangent = forward_ad.unpack_dual(dual)
                except NotImplementedError as error:
                    must = "consist of functions that have a forward-mode derivative"
                    raise ArgumentError("model", must, str(error).partition("\n")[0]) from error
            if not alike(value.detach(), structure.loss):
                differs("`loss` of another value")
            found.append(torch.zeros_like(value).detach() if tangent is None else tangent.detach())
        return torch.stack(found)

    def _dual(
        self,
        structure: Structure,
        inject: Inject,
        directions: Mapping[str, Tensor],
        place: Tensor | int,
        inputs: Inputs | None = None,
    ) -> Tensor:
        duals = self.duals({name: v[place] for name, v in directions.items()})
        injector = Injector(self.every, structure, self.examples, inject, duals, place, inputs)
        value = self.handled(injector, duals)
        injector.finish()
        return value

    def duals(self, directions: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Parameters with tangents, at a dual level, by the parameters' identity."""
        found: dict[int, Tensor] = {}
        for name, tangent in directions.items():
            parameter = self.parameters[name]
            found[id(parameter)] = forward_ad.make_dual(parameter.detach(), tangent)
        return found

    def handled(self, handler: Handler, duals: Mapping[int, Tensor]) -> Tensor:
        """Run once, with somebody who sees every function, and with some parameters replaced; the loss."""
        self._remember()  # with the parameters in their places
        with torch.enable_grad(), Mode(handler), swapped(self.model, duals):
            return self.run()

    def settled(self, random: bool) -> bool:
        """Whether one more plain pass is to leave behind what one leaves: numbers drawn, buffers moved."""
        return self.settle and (random or bool(self._buffers))

    def visit(self, structure: Structure, look: Callable[[Site, Tensor], None]) -> Tensor:
        """Run once more, and look at each layer's input x as it is called; the loss."""
        value = self._visited(structure, lambda site, x, z: look(site, x), False).detach()
        if not alike(value, structure.loss):
            differs("`loss` of another value")
        return value

    def tapped(self, structure: Structure, look: Callable[[Site, Tensor], None]) -> Tensor:
        """Run once more, and look at each layer's z as it comes out; the loss."""
        return self._visited(structure, lambda site, x, z: look(site, z), True)

    def _visited(self, structure: Structure, look: Callable[[Site, Tensor, Tensor], None], graph: bool) -> Tensor:
        visitor = Visitor(self.every, structure.sites, self.examples, look)
        with torch.enable_grad(), Mode(visitor, graph):
            value = self.run()
        visitor.finish()
        return value


def _bounded(module: nn.Module) -> TypeGuard[nn.Embedding | nn.EmbeddingBag]:
    """Whether it is a table whose rows have a largest norm."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None


class _Closed:
    """A function without arguments as a loss."""

    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self._closure = closure

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._closure()


@functools.cache
def _prepare() -> None:
    """What torch imports at the first dual number, without the warning that it gives on its own account."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _loud() -> None:
    QUIET.depth -= 1
