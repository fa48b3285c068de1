"""What a forward pass does with the parameters: every use of one, as it is called.

A *use* is a call that takes something made of parameters and something made of the batch. Its output has rows, one
or several for each example, and the gradient at these rows is what each example sends to the parameters: the share
convention. A `TorchFunctionMode` sees calls of modules, functions and methods alike, so tied, re-used and
functional parameters need no special care. Nothing is changed: the graph that is built is the one that would have
been built anyway.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradmon._batches import map_tensors, tensors
from gradmon._sandbox import quiet_depth
from gradmon.per_example._autograd import version
from gradmon.per_example.calls import Surroundings, Tape, in_place, name_of, results
from gradmon.per_example.deciding import NOTHING, Decided, decided, repeats_evenly

_METADATA_ONLY = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"})
"""Calls that read only shape, type or device of their further arguments."""
_CONSTANT = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
"""Calls whose result does not depend on the contents of their argument."""
_ADDITIVE = frozenset({"add", "add_", "sub", "sub_", "rsub", "__rsub__"})
"""Calls through which a parameter passes unchanged, up to its sign: a penalty added to a loss."""
_LOOK_UPS = (functional.embedding, functional.embedding_bag)
_RAGGED = frozenset({"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "repeat_interleave",
                     "_pack_padded_sequence", "pack_padded_sequence", "_pad_packed_sequence"})  # fmt: skip
"""Calls whose results have as many rows as the contents of their arguments say."""
_COUNTING = frozenset({"item", "tolist", "__int__", "__index__", "numpy"})
"""Calls that turn the contents of a tensor into numbers."""
_COMPOSITE: tuple[Callable[..., Any], ...] = (functional.multi_head_attention_forward,)
"""Functions that are looked into, because their parameters' uses are calls of simpler ones."""


@dataclass(eq=False)
class Use:
    """One call that consumes parameters.

    Attributes:
        func: The called function, or the module where a rule is given for its class.
        args: Its arguments, detached, each parameter (or tensor made of parameters) by a stand-in of its own.
        kwargs: Its keyword arguments, likewise.
        sources: The stand-ins of the parameters.
        keys: The identities of the tensors behind them.
        positions: For each of them the positions of the parameters that it is made of.
        activations: The other tensors among the arguments, detached.
        versions: Their versions; one that has changed since was overwritten.
        outputs: The results that have a gradient, as they were returned.
        places: Their positions among all results.
        made: The tensors behind the sources that are no parameters.
        origins: The positions in the batch of the tensors that went into it.
        around: What it takes to make the call again.
        ragged: Whether the number of its rows may depend on the contents of the batch.
        decided: What the batch has chosen before.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[Tensor]
    keys: list[int]
    positions: list[tuple[int, ...]]
    activations: list[Tensor]
    versions: list[int]
    outputs: list[Tensor]
    places: list[int]
    made: list[Tensor]
    origins: frozenset[int]
    around: Surroundings
    ragged: bool = False
    decided: Decided = NOTHING

    @property
    def name(self) -> str:
        """The called function."""
        return name_of(self.func)

    @property
    def additive(self) -> bool:
        """Whether the parameters' part is only added, so that it does not depend on the examples."""
        return self.name in _ADDITIVE

    def again(self, replaced: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """The outputs with some arguments, by identity, replaced."""
        args, kwargs = map_tensors((self.args, self.kwargs), lambda tensor: replaced.get(id(tensor), tensor))
        if in_place(self.name):
            args = (args[0].clone(), *args[1:])
        with self.around:
            if isinstance(self.func, nn.Module):
                held = {name: replaced.get(id(p), p) for name, p in self.func.named_parameters()}
                held |= {name: buffer.clone() for name, buffer in self.func.named_buffers()}
                result = torch.func.functional_call(self.func, held, args, kwargs)
            else:
                result = self.func(*args, **kwargs)
            found = results(self.name, args, result)
        return tuple(found[place] for place in self.places)


@dataclass(frozen=True)
class Entry:
    """Where the examples' inputs x enter.

    Attributes:
        position: The position of a floating tensor in the batch; or
        embedding: the number of the look-up of integers of the batch in an embedding, counted from 0; or
        module: the module whose output is x.
    """

    position: int | None = None
    embedding: int | None = None
    module: nn.Module | None = None


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """Tells of the uses of some parameters while it is active.

    Args:
        parameters: The trainable parameters.
        inputs: The tensors of the batch, in its order.
        note: Told of every use, right after its call.
        examples: The number of examples of the batch; 0 where it is not known.
        dim: The dimension of its tensors that holds them, or else the first.
        entry: Where x enters, if that is wanted.
        delta: What is added to x, of its shape; None for nothing.
        first: Whether to tell of a use before its call is made, because it may never return.
    """

    parameters: Sequence[Tensor]
    inputs: Sequence[Tensor]
    note: Callable[[Use], None]
    examples: int = 0
    dim: int = 0
    entry: Entry | None = None
    delta: Tensor | None = None
    first: bool = False
    embeddings: list[frozenset[int]] = field(default_factory=list[frozenset[int]], init=False)
    x: Tensor | None = field(default=None, init=False)
    entered: Callable[[Tensor], None] | None = field(default=None, init=False)
    off: bool = field(default=False, init=False)
    counted: bool = field(default=False, init=False)
    listed: bool = field(default=False, init=False)
    decided: Decided = field(default=NOTHING, init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.tape = Tape(self.parameters)
        self._depth = quiet_depth()
        self._whole: tuple[nn.Module, Use | None] | None = None
        self._inside = False
        # Weak, so that no activation lives longer than it would otherwise.
        self._made_of_batch: dict[int, tuple[weakref.ref[Tensor], frozenset[int]]] = {}
        self._ragged: dict[int, weakref.ref[Tensor]] = {}
        for position, tensor in enumerate(self.inputs):
            if self._has_examples(tensor):
                self._mark(tensor, frozenset({position}))

    def _has_examples(self, tensor: Tensor) -> bool:
        """Whether a tensor of the batch can hold rows of examples: positions, say, are the same for all of them."""
        sizes = {tensor.shape[d] for d in (0, self.dim) if d < tensor.ndim}
        return self.examples < 2 or any(size % self.examples == 0 for size in sizes)

    def _is_ragged(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> bool:
        """Whether a call's results may have other numbers of rows for other contents of the batch."""
        if name in _COUNTING and any(self._origins(tensor) is not None for tensor in given):
            self.counted = True  # from here on a number of the batch may be the size of anything
        picked = name in ("__getitem__", "index") and any(
            t.dtype in (torch.bool, torch.uint8) for argument in args[1:] for t in tensors(argument)
        )
        return (
            self.counted
            or picked
            or (name in _RAGGED and not repeats_evenly(name, args, kwargs))
            or (name == "where" and len(args) == 1)
            or any((held := self._ragged.get(id(t))) is not None and held() is t for t in given)
        )

    def _mark(self, tensor: Tensor, origins: frozenset[int]) -> None:
        self._made_of_batch[id(tensor)] = (weakref.ref(tensor), origins)
        self.tape.forget(tensor)

    def _origins(self, tensor: Tensor) -> frozenset[int] | None:
        found = self._made_of_batch.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, tell of it if it is a use, and note what its outputs are made of."""
        kwargs = kwargs or {}
        name = name_of(func)
        if self._whole is not None and not self.off and quiet_depth() <= self._depth:
            held = [t for argument in args for t in _in(argument)]
            self._inside = self._inside or name in _COUNTING or self._is_ragged(name, args, kwargs, held)
            self.decided = self.decided.then(decided(name, args, kwargs))
        if name.startswith(_CONSTANT) or self._whole is not None or self.off or quiet_depth() > self._depth:
            return func(*args, **kwargs)
        if func in _COMPOSITE and (opened := _opened(func)) is not None:
            with self:
                return opened(*args, **kwargs)
        relevant = args[:1] if name in _METADATA_ONLY else args
        given = {id(t): t for argument in relevant for t in _in(argument)}
        if kwargs and name not in _METADATA_ONLY:
            given |= {id(t): t for t in tensors(kwargs)}
        return self.call(func, args, kwargs, list(given.values()))

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        """Make a call and note what comes of it.

        Args:
            func: The function, or a module that is to be taken as a whole.
            args: Its arguments.
            kwargs: Its keyword arguments.
            given: The tensors that it depends on.
        """
        name = name_of(func)
        made, others, origins = list[Tensor](), False, frozenset[int]()
        active = False
        for tensor in given:
            held = self._origins(tensor)
            if held is not None:
                active, origins = True, origins | held
            if tensor.requires_grad:
                if self.tape.knows(tensor):
                    made.append(tensor)
                else:
                    others = True
        active = active or others
        if func in _LOOK_UPS and made and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            # Positions that are laid out for every example are not of the batch, but have its rows.
            active = active or args[0].shape[0] == self.examples
        ragged = self._is_ragged(name, args, kwargs, given)
        if active:
            # Where the batch lists plain numbers, any index may be made of them.
            among = decided(name, args, kwargs, lambda t: self.listed or self._origins(t) is not None)
            self.decided = self.decided.then(among)
        if made and active:
            result = self._use(func, name, args, kwargs, made, origins, ragged)
        elif made:
            result = self.tape.record(func, name, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if active:
            for tensor in results(name, args, result):
                self._mark(tensor, origins)
                if ragged:
                    self._ragged[id(tensor)] = weakref.ref(tensor)
        if func in _LOOK_UPS and args and isinstance(args[0], Tensor):
            looked = self._origins(args[0])
            if looked is not None:
                result = self._embedded(result, looked)
        return result

    def _use(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Tensor],
        origins: frozenset[int],
        ragged: bool,
    ) -> Any:
        use = self._begun(func, args, kwargs, made, origins)
        use.ragged = ragged
        if self.first:
            self.note(use)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._finished(use, results(name, args, result))
        return result

    def _begun(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Tensor],
        origins: frozenset[int],
    ) -> Use:
        """A use whose call is about to be made."""
        name = name_of(func)
        overwritten = args[0] if in_place(name) and args and isinstance(args[0], Tensor) else None
        stand_ins: dict[int, Tensor] = {}

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) not in stand_ins:
                alone = tensor.detach()
                stand_ins[id(tensor)] = alone.clone() if tensor is overwritten and name not in _ADDITIVE else alone
            return stand_ins[id(tensor)]

        held_args, held_kwargs = map_tensors((args, kwargs), stand_in)
        keys = [id(tensor) for tensor in made]
        activations = [tensor for key, tensor in stand_ins.items() if key not in set(keys)]
        return Use(
            func=func,
            args=held_args,
            kwargs=held_kwargs,
            sources=[stand_ins.get(id(tensor), tensor) for tensor in made],
            keys=keys,
            positions=[self.tape.positions(tensor) for tensor in made],
            activations=activations,
            versions=[version(tensor) for tensor in activations],
            outputs=[],
            places=[],
            made=[tensor for tensor in made if not isinstance(tensor, nn.Parameter)],
            origins=origins,
            around=Surroundings(name, activations),
            decided=self.decided,
        )

    def _finished(self, use: Use, returned: list[Tensor]) -> None:
        """Tell of a use whose call has been made."""
        use.around.done()
        use.places = [place for place, tensor in enumerate(returned) if tensor.requires_grad]
        use.outputs = [returned[place] for place in use.places]
        if use.places:
            self.note(use)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module for whose class there is a rule is called: it is taken as one use, and not looked into."""
        if self._whole is not None:
            return
        made: list[Tensor] = [p for p in module.parameters() if p.requires_grad and self.tape.knows(p)]
        given = list(tensors((args, kwargs)))
        origins = frozenset[int]().union(*(o for t in given if (o := self._origins(t)) is not None))
        use = self._begun(module, args, kwargs, made, origins) if made else None
        self._inside = self._is_ragged("", (), {}, given)
        self._whole = module, use

    def end(self, module: nn.Module, output: Any) -> None:
        """The call of the module is over."""
        if self._whole is None or self._whole[0] is not module:
            return
        use, self._whole = self._whole[1], None
        returned = list(tensors(output))
        if use is not None:
            use.ragged, use.decided = self._inside, self.decided
            self._finished(use, returned)
        for tensor in returned:
            self._mark(tensor, frozenset() if use is None else use.origins)
            if self._inside:
                self._ragged[id(tensor)] = weakref.ref(tensor)

    def _embedded(self, output: Tensor, origins: frozenset[int]) -> Tensor:
        self.embeddings.append(origins)
        call = len(self.embeddings) - 1
        return self.enter(output, origins) if self.entry is not None and self.entry.embedding == call else output

    def enter(self, x: Tensor, origins: frozenset[int] = frozenset()) -> Tensor:
        """Take x as the examples' inputs: add `delta`, and remember it, so that its gradient can be had."""
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        if x.is_leaf:
            x = x.clone()  # not a leaf, so that the model may overwrite it
        if self.delta is not None:
            x = x + self.delta
        self._mark(x, origins)
        self.x = x
        if self.entered is not None:
            self.entered(x)
            return x
        given = x.clone()  # the model may overwrite it, and x is what it was before
        self._mark(given, origins)
        return given


def _in(argument: Any) -> Iterable[Tensor]:
    return (argument,) if isinstance(argument, Tensor) else tensors(argument)


@functools.cache
def _opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function without its question for overrides, which would come back here without end."""
    names: dict[str, Any] | None = getattr(func, "__globals__", None)
    code = getattr(func, "__code__", None)
    if names is None or code is None or "has_torch_function" not in names:
        return None
    names = {**names, "has_torch_function": _never}
    copy = types.FunctionType(code, names, name_of(func), getattr(func, "__defaults__", None))
    copy.__kwdefaults__ = getattr(func, "__kwdefaults__", None)
    return copy


def _never(tensors: Any) -> bool:
    return False
