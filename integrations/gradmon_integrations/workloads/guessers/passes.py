"""Forward passes over one batch that all see the same random numbers and buffers, with tangents or without."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from gradmon._batches import example_count, map_tensors
from gradmon._errors import ArgumentError
from gradmon._parameters import trainable, unwrapped
from gradmon._sandbox import QUIET
from gradmon._snapshot import ModuleState, RandomState, modules_behind
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.layers import layer_call
from gradmon_integrations.workloads.guessers.mode import Mode
from gradmon_integrations.workloads.guessers.recording import Site, Structure, record
from gradmon_integrations.workloads.guessers.replay import alike

SEEDS = 2**32
"""How many seeds torch's generator on the CPU tells apart."""
Inject = Callable[[Site], Tensor | None]
"""From a layer to the tangents of its z, (count, *z.shape), or None for none."""


class Passes:
    """Forward passes of a model and its loss, to be used as a context.

    Args:
        model: The model.
        loss: ``loss(model, batch)``.
        batch: The batch.
        settle: Whether buffers and random states are left as after one pass, instead of as they were found.

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
        self._counts = False
        self._behind: Any = loss
        self._loss, self._batch, self.settle = loss, batch, settle
        self._every = {id(parameter): name for name, parameter in self.model.named_parameters()}
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
            self._random = RandomState()
            modules = [self.model, *modules_behind(self._behind)]
            # Attributes are put back once; between passes only what a pass of an ordinary model depends on.
            self._modules = None if self.settle else ModuleState(modules)
            self._buffers = [(held, held.clone()) for module in modules for held in module.buffers()]
            self._ran = False
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
            if self._modules is not None:
                self._modules.restore()

    def seed(self, generator: torch.Generator | None) -> int:
        """A number from a generator, None for torch's global one: drawn for good, before the first pass."""
        device = None if generator is None else generator.device
        found = int(torch.randint(SEEDS, (), generator=generator, device=device))
        self._random = RandomState()
        return found

    def _rewind(self) -> None:
        for held, value in self._buffers:
            held.data.copy_(value)
        self._random.restore()

    def run(self) -> Tensor:
        """The loss, a scalar or (B,), from the state that was found on entry.

        Raises:
            ArgumentError: `loss` returned something else.
        """
        if self._ran:
            self._rewind()
        self._ran = True
        value = self._loss(self.model, map_tensors(self._batch, lambda tensor: tensor.detach().clone()))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentError("loss", "return a floating-point tensor", getattr(value, "dtype", type(value).__name__))
        if self._counts:
            if value.ndim != 1:
                must = "return one value per example, (B,), or `examples` must be given"
                raise ArgumentError("closure", must, f"shape {tuple(value.shape)}")
            self.examples = len(value)
        if value.numel() == 1:
            return value.reshape(())
        if value.ndim != 1 or value.shape[0] != self.examples:
            must = f"return a scalar or one value per example, ({self.examples},)"
            raise ArgumentError("loss", must, f"shape {tuple(value.shape)}")
        return value

    def record(self, follow: bool, values: bool) -> Structure:
        """Run once, and find the layers; see `record`."""
        if self._counts:
            self.run()
        return record(self.run, self.names, self._every, self.examples, follow, values)

    def tangent(
        self, structure: Structure, inject: Inject, directions: Mapping[str, Tensor], count: int, vectorised: bool
    ) -> Tensor:
        """The directional derivatives of the loss along some tangents at once.

        Args:
            structure: What `record` found.
            inject: The tangents that are added to each layer's z.
            directions: Tangents of parameters, (count, *shape).
            count: How many there are.
            vectorised: Whether to use `torch.vmap`, which shares the plain forward pass between them.

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
                    value, tangent = forward_ad.unpack_dual(self._dual(structure, inject, directions, place))
                except NotImplementedError as error:
                    must = "consist of functions that have a forward-mode derivative"
                    raise ArgumentError("model", must, str(error).partition("\n")[0]) from error
            if not alike(value.detach(), structure.loss):
                _differs("`loss` of another value")
            found.append(torch.zeros_like(value).detach() if tangent is None else tangent.detach())
        return torch.stack(found)

    def _dual(
        self, structure: Structure, inject: Inject, directions: Mapping[str, Tensor], place: Tensor | int
    ) -> Tensor:
        duals = {name: forward_ad.make_dual(self.parameters[name].detach(), v[place]) for name, v in directions.items()}
        by_identity = {id(self.parameters[name]): dual for name, dual in duals.items()}
        injector = _Injector(self._every, structure, self.examples, inject, by_identity, place)
        with torch.enable_grad(), Mode(injector), _swapped(self.model, by_identity):
            value = self.run()
        injector.finish()
        return value

    def visit(self, structure: Structure, look: Callable[[Site, Tensor], None]) -> Tensor:
        """Run once more, and look at each layer's input x as it is called; the loss."""
        value = self._visited(structure, lambda site, x, z: look(site, x), False).detach()
        if not alike(value, structure.loss):
            _differs("`loss` of another value")
        return value

    def tapped(self, structure: Structure, look: Callable[[Site, Tensor], None]) -> Tensor:
        """Run once more, and look at each layer's z as it comes out; the loss."""
        return self._visited(structure, lambda site, x, z: look(site, z), True)

    def _visited(self, structure: Structure, look: Callable[[Site, Tensor, Tensor], None], graph: bool) -> Tensor:
        visitor = _Visitor(self._every, structure.sites, self.examples, look)
        with torch.enable_grad(), Mode(visitor, graph):
            value = self.run()
        visitor.finish()
        return value


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


@contextlib.contextmanager
def _swapped(model: nn.Module, duals: Mapping[int, Tensor]) -> Generator[None]:
    """The modules' parameters replaced: for functions of the caller's own, which no mode sees."""
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    if duals:
        for module in model.modules():
            table: dict[str, Any] = module._parameters
            held += [(table, name, p) for name, p in table.items() if p is not None and id(p) in duals]
    try:
        for table, name, parameter in held:
            table[name] = duals[id(parameter)]
        yield
    finally:
        for table, name, parameter in held:
            table[name] = parameter


def _differs(got: str) -> NoReturn:
    raise ArgumentError("model", "compute the same in every forward pass over a batch", got)


class _Follower:
    """Meets the layers again, in the order in which they were recorded.

    Raises:
        ArgumentError: The model called other layers this time.
    """

    def __init__(self, every: Mapping[int, str], sites: list[Site], examples: int) -> None:
        self._every, self._sites, self._examples, self._met = every, sites, examples, 0

    def _next(self, shape: torch.Size) -> Site:
        site = self._sites[self._met] if self._met < len(self._sites) else None
        if site is None or site.shape != tuple(shape):
            _differs(f"output of shape {tuple(shape)}" if site is None else f"{tuple(shape)} after {site.shape}")
        self._met += 1
        return site

    def finish(self) -> None:
        if self._met != len(self._sites):
            _differs(f"{self._met} layers after {len(self._sites)}")


class _Visitor(_Follower):
    def __init__(
        self,
        every: Mapping[int, str],
        sites: list[Site],
        examples: int,
        look: Callable[[Site, Tensor, Tensor], None],
    ) -> None:
        super().__init__(every, sites, examples)
        self._look = look

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = layer_call(function, args, kwargs, self._every)
        z = function(*args, **kwargs)
        if call is not None and call[1].batched and z.ndim >= 2 and z.shape[0] == self._examples == call[0].shape[0]:
            self._look(self._next(z.shape), call[0], z)
        return z


class _Injector(_Follower):
    def __init__(
        self,
        every: Mapping[int, str],
        structure: Structure,
        examples: int,
        inject: Inject,
        duals: Mapping[int, Tensor],
        place: Tensor | int,
    ) -> None:
        super().__init__({**every, **{id(dual): every[key] for key, dual in duals.items()}}, structure.sites, examples)
        self._layouts, self._calls = structure.layouts, 0
        self._inject, self._duals, self._place = inject, duals, place

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._duals.get(id(value), value)
        if type(value) in (tuple, list) and any(isinstance(part, Tensor) for part in value):
            return type(value)(self._replaced(part) for part in value)
        return value

    def _laid_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a function that draws, in the order in memory that they had at first."""
        strides = self._layouts.get(self._calls)
        self._calls += 1
        found = iter(strides or ())

        def place(tensor: Tensor) -> Tensor:
            wanted = next(found, tensor.stride())
            if wanted == tensor.stride() or len(wanted) != tensor.ndim:
                return tensor
            laid = torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device)
            return laid.copy_(tensor)

        return (args, kwargs) if strides is None else tree_map_only(Tensor, place, (args, kwargs))

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Without tangents; what is written to in place, and returned, keeps its own."""
        originals: dict[int, Tensor] = {}

        def plain(tensor: Tensor) -> Tensor:
            found = forward_ad.unpack_dual(tensor)
            if found.tangent is None:
                return tensor
            originals[id(found.primal)] = tensor
            return found.primal

        args, kwargs = tree_map_only(Tensor, plain, self._laid_out(args, kwargs))
        result = function(*args, **kwargs)
        return originals.get(id(result), result)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._laid_out(args, kwargs)
        if self._duals:
            args = tuple(self._replaced(value) for value in args)
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
        call = layer_call(function, args, kwargs, self._every)
        if call is None:
            return _STAND_INS.get(function, function)(*args, **kwargs)
        x, layer = call
        kept = forward_ad.unpack_dual(x)
        if not self._duals or not any(map(_is_dual, (layer.weight, layer.bias))):
            # One product instead of the two that autograd makes of a tangent that it does not know to be zero.
            replaced = [kept.primal if value is x else value for value in args]
            named = {name: kept.primal if value is x else value for name, value in kwargs.items()}
            z = function(*replaced, **named)
            tangent = None if kept.tangent is None else layer.push(kept.tangent)
        else:
            z, tangent = forward_ad.unpack_dual(function(*args, **kwargs))
        if layer.batched and z.ndim >= 2 and z.shape[0] == self._examples == x.shape[0]:
            y = self._inject(self._next(z.shape))
            if y is not None:
                y = y[self._place]
                tangent = y if tangent is None else tangent + y
        return z if tangent is None else forward_ad.make_dual(z, tangent)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ||v||``, the norm over all dimensions but one."""
    rest = [at for at in range(v.ndim) if at != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=rest, keepdim=True))


_STAND_INS: dict[Any, Callable[..., Any]] = {torch._weight_norm: _weight_norm}  # pyright: ignore[reportPrivateImportUsage]
"""For functions of torch that have no forward-mode derivative, the same in others that have one."""


def _is_dual(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
