"""What a forward pass does with the parameters: every use of one, as it is called.

A *use* is a call that takes something made of parameters and something made of the batch. Its output has rows, one
or several for each example, and the gradient at these rows is what each example sends to the parameters: the share
convention. A `TorchFunctionMode` sees calls of modules, functions and methods alike, so tied, re-used and
functional parameters need no special care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradmon._batches import map_tensors, tensors

_METADATA_ONLY = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"})
"""Calls that read only shape, type or device of their further arguments."""
_CONSTANT = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
"""Calls whose result does not depend on the contents of their argument."""
_ADDITIVE = frozenset({"add", "add_", "sub", "sub_", "rsub", "__rsub__"})
"""Calls through which a parameter passes unchanged, up to its sign: a penalty added to a loss."""
_SPARSE: dict[Callable[..., Any], int] = {functional.embedding: 6, functional.embedding_bag: 7}
"""The look-ups of integers, and the position of their argument `sparse`."""


@dataclass(frozen=True)
class Call:
    """A call that can be made again on other tensors.

    Attributes:
        func: The function.
        args: Its arguments, with the aliases in the place of the parameters.
        kwargs: Its keyword arguments, likewise.
        activations: The tensors among them that are not made of parameters alone.
        versions: Their versions; one that has changed since was overwritten.
        places: Which of the results are the use's outputs.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    activations: list[Tensor]
    versions: list[int]
    places: list[int]

    def again(self, replaced: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """The outputs with some tensors, by identity, replaced."""
        args, kwargs = map_tensors((self.args, self.kwargs), lambda tensor: replaced.get(id(tensor), tensor))
        results = list(tensors(self.func(*args, **kwargs)))
        return tuple(results[place] for place in self.places)


@dataclass
class Use:
    """One call that consumes parameters.

    Attributes:
        name: The called function.
        sources: What it consumed: the alias it was given, and the parameter, or tensor made of parameters, behind it.
        outputs: The gradient edges of its outputs.
        values: The outputs themselves, detached, as they were when the call returned; then, likewise, the activations.
        call: How to make the call again; None where it overwrites what it is given.
        made: What the sources are made of by other calls than this one, as it was; nothing for parameters themselves.
        origins: The positions in the batch of the tensors that went into it.
    """

    name: str
    sources: list[tuple[Tensor | GradientEdge, Tensor | GradientEdge]]
    outputs: list[GradientEdge]
    values: list[Tensor]
    call: Call | None = None
    made: list[Tensor] = field(default_factory=list[Tensor])
    origins: frozenset[int] = frozenset()

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same when the pass is repeated on as many examples."""
        return (self.name, len(self.sources), [value.shape for value in self.values])

    @property
    def additive(self) -> bool:
        """Whether the parameters' part is only added, so that it does not depend on the examples."""
        return self.name in _ADDITIVE


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
    """Records the uses of some parameters while it is active.

    Args:
        parameters: The trainable parameters.
        inputs: The tensors of the batch, in its order.
        entry: Where x enters, if that is wanted.
        delta: What is added to x, of its shape; None for nothing.
        keep: Whether to copy the uses' outputs.
    """

    parameters: Sequence[Tensor]
    inputs: Sequence[Tensor]
    entry: Entry | None = None
    delta: Tensor | None = None
    keep: bool = False
    uses: list[Use] = field(default_factory=list[Use], init=False)
    embeddings: list[frozenset[int]] = field(default_factory=list[frozenset[int]], init=False)
    x: Use | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self._made_of_parameters: dict[int, Tensor] = {id(p): p for p in self.parameters}
        self._made_of_batch: dict[int, tuple[Tensor, frozenset[int]]] = {
            id(tensor): (tensor, frozenset({position})) for position, tensor in enumerate(self.inputs)
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, record it if it is a use, and note what its outputs are made of."""
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", "")
        relevant = args[:1] if name in _METADATA_ONLY else (args, kwargs)
        given = list({id(tensor): tensor for tensor in tensors(relevant)}.values())
        made = [t for t in given if id(t) in self._made_of_parameters and t.requires_grad]
        origins = frozenset[int]().union(
            *(self._made_of_batch[id(t)][1] for t in given if id(t) in self._made_of_batch)
        )
        passive = {id(t) for t in made}
        active = any(id(t) in self._made_of_batch or (t.requires_grad and id(t) not in passive) for t in given)
        if name.startswith(_CONSTANT):
            return func(*args, **kwargs)
        if not made or not active:
            result = func(*args, **kwargs)
            self._note(_results(name, args, result), origins, active, bool(made))
        else:
            result = self._use(func, name, args, kwargs, made, origins)
        if func in _SPARSE and args and isinstance(args[0], Tensor) and id(args[0]) in self._made_of_batch:
            result = self._embedded(result, self._made_of_batch[id(args[0])][1])
        return result

    def _use(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Tensor],
        origins: frozenset[int],
    ) -> Any:
        aliases: dict[int, Tensor] = {}
        sources: list[tuple[Tensor | GradientEdge, Tensor | GradientEdge]] = []
        for tensor in made:
            if args and tensor is args[0] and _in_place(name):
                # What is overwritten cannot be aliased: a multiplication by one gives it a node of its own instead.
                behind = get_gradient_edge(tensor)
                tensor.mul_(1)
                sources.append((get_gradient_edge(tensor), behind))
            else:
                aliases[id(tensor)] = tensor.view_as(tensor)
                sources.append((aliases[id(tensor)], tensor))
        args, kwargs = map_tensors((args, kwargs), lambda tensor: aliases.get(id(tensor), tensor))
        if func in _SPARSE:  # an alias passes no sparse gradients on
            args = (
                *args[: _SPARSE[func]],
                *((False,) if len(args) > _SPARSE[func] else ()),
                *args[_SPARSE[func] + 1 :],
            )
            kwargs = {**kwargs, "sparse": False} if "sparse" in kwargs else kwargs
        others = {id(tensor): tensor for tensor in tensors((args, kwargs))}
        passive = {id(alias) for alias in aliases.values()}
        activations = [tensor for key, tensor in others.items() if key not in passive]
        versions = [tensor._version for tensor in activations]
        seen = [tensor.detach().clone() if self.keep else tensor.detach() for tensor in activations]
        result = func(*args, **kwargs)
        results = _results(name, args, result)
        places = [place for place, tensor in enumerate(results) if tensor.requires_grad]
        if places:
            outputs = [results[place] for place in places]
            values = [tensor.detach().clone() if self.keep else tensor.detach() for tensor in outputs]
            call = None if _in_place(name) else Call(func, args, kwargs, activations, versions, places)
            edges = [get_gradient_edge(tensor) for tensor in outputs]
            derived = [t.detach().clone() for t in made if self.keep and not isinstance(t, nn.Parameter)]
            self.uses.append(Use(name, sources, edges, [*values, *seen], call, derived, origins))
        self._note(results, origins, active=True, made=False)
        return result

    def _note(self, results: list[Tensor], origins: frozenset[int], active: bool, made: bool) -> None:
        for tensor in results:
            if active:
                self._made_of_batch[id(tensor)] = (tensor, origins)
                self._made_of_parameters.pop(id(tensor), None)
            elif made and tensor.requires_grad:
                self._made_of_parameters[id(tensor)] = tensor

    def _embedded(self, output: Tensor, origins: frozenset[int]) -> Tensor:
        self.embeddings.append(origins)
        call = len(self.embeddings) - 1
        return self.enter(output, origins) if self.entry is not None and self.entry.embedding == call else output

    def enter(self, x: Tensor, origins: frozenset[int] = frozenset()) -> Tensor:
        """Take x as the examples' inputs: add `delta`, and record where its gradient is found."""
        if not x.requires_grad:
            x = x.detach().requires_grad_().clone()  # not a leaf, so that the model may overwrite it
        if self.delta is not None:
            x = x + self.delta
        self._made_of_batch[id(x)] = (x, origins)
        self.x = Use("x", [], [get_gradient_edge(x)], [x.detach().clone()], origins=origins)
        return x


def _in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _results(name: str, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call made or changed."""
    return [args[0]] if name == "__setitem__" else list(tensors(result))
