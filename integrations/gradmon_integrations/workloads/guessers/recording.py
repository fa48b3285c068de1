"""One plain forward pass that finds the layers, how each parameter is used, and what lies between the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmon._batches import tensors
from gradmon_integrations.workloads.guessers.inputs import Inputs
from gradmon_integrations.workloads.guessers.layers import Layer, layer_call
from gradmon_integrations.workloads.guessers.mode import Mode
from gradmon_integrations.workloads.guessers.replay import random_states, same_states
from gradmon_integrations.workloads.guessers.tape import Entry, Tape


@dataclass(eq=False)
class Site:
    """A layer's pre-activation z = W x + b, (B, ...), and what follows it.

    Attributes:
        number: Its place among the layers, in the order of the calls, from 0.
        layer: The call.
        shape: Of z.
        input_shape: Of x.
        like: A tensor of z's type and device, without entries.
        weight: The name of the trainable parameter that is its weight and is guessed here; None for none.
        bias: Likewise.
        following: The first layer in the order of calls that reads something that depends on z by functions alone; None
            where the loss does.
        slope: The product of the slopes of the functions that work entry by entry on z before anything else reads
            it, of z's shape; None where there is no such function.
        value: What the last of them made, of z's shape, where that was asked for; z itself where there is none.
        functions: Those that work entry by entry, each of them all that reads what the one before made, from z on.
        own: Whether slope and value are theirs.
        adjacent: Whether what the last of them makes, or z where there is none, is what the next layer to be called
            reads, or no layer does.
    """

    number: int
    layer: Layer
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    like: Tensor
    weight: str | None = None
    bias: str | None = None
    following: Site | None = None
    slope: Tensor | None = None
    value: Tensor | None = None
    functions: tuple[Any, ...] = ()
    own: bool = False
    adjacent: bool = False
    _read: int | None = None
    _made: int = 0
    _path: list[Entry] = field(default_factory=list)

    @property
    def guessed(self) -> bool:
        """Whether a parameter of it is guessed by its pre-activation."""
        return self.weight is not None or self.bias is not None

    @property
    def bytes(self) -> int:
        """The size of z."""
        return math.prod(self.shape) * self.like.element_size()

    @property
    def input_bytes(self) -> int:
        """The size of x, if it has z's type."""
        return math.prod(self.input_shape) * self.like.element_size()

    def back(self, cotangent: Tensor) -> Tensor:
        """A cotangent at the input of the layer that follows, pulled back to z by the functions in between."""
        if self.following is None or self.following._read is None:
            raise RuntimeError("nothing follows this layer")
        found: dict[int, Tensor] = {self.following._read: cotangent}
        for entry in reversed(self._path):
            made = [found.get(node) for node in entry.outputs]
            for node, part in zip(entry.inputs, entry.pull(made), strict=True):
                if part is not None:
                    found[node] = found[node] + part if node in found else part
        reached = found.get(self._made)
        return cotangent.new_zeros(self.shape) if reached is None else reached


@dataclass
class Structure:
    """What one forward pass found.

    Attributes:
        sites: The layers, in the order of their calls.
        layers: The calls of layers, with their sites, None for one whose rows are no examples.
        direct: The names of the parameters that are guessed directly.
        hidden: The names of those that no function was seen to read.
        loss: What the loss returned.
        random: Whether the pass drew from torch's global generators.
        calls: The functions that were called, see `call_of`.
        layouts: For each call of a function that did, by its number, the strides of the tensors that it was given:
            what is drawn goes by the order of the entries in memory.
    """

    sites: list[Site]
    layers: list[tuple[Site | None, Layer]]
    direct: set[str]
    hidden: set[str]
    loss: Tensor
    random: bool
    calls: list[tuple[Any, ...]]
    layouts: dict[int, list[tuple[int, ...]]]


def call_of(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call as far as it is the same in every step: the function, and what is switched on and off in it."""
    switches = [value for value in args if value is True or value is False]
    switches += [value for value in kwargs.values() if value is True or value is False]
    return (function, *switches)


class Uses:
    """Who reads which parameter.

    Args:
        trainable: The names of the trainable parameters by identity.

    Attributes:
        seen: The names of those that a function was seen to read.
        direct: The names of those that something else than a layer reads.
    """

    def __init__(self, trainable: Mapping[int, str]) -> None:
        self.seen: set[str] = set()
        self.direct: set[str] = set()
        self._trainable = trainable

    def layer(self, layer: Layer, x: Tensor, site: bool) -> tuple[str | None, str | None]:
        """Note a layer, and whether its rows are examples; the names of its weight and bias, where they are trained."""
        trainable = self._trainable
        bias = None if layer.bias is None else trainable.get(id(layer.bias))
        names = trainable.get(id(layer.weight)), bias
        found = {name for name in names if name is not None}
        self.seen |= found
        if not site:
            self.direct |= found
        if id(x) in trainable:
            self.seen.add(trainable[id(x)])
            self.direct.add(trainable[id(x)])
        return names

    def function(self, read: Sequence[Tensor], result: Any) -> None:
        """Note a function, by the tensors that it reads and what it makes."""
        names = {self._trainable[id(tensor)] for tensor in read if id(tensor) in self._trainable}
        if names and any(value.is_floating_point() for value in tensors(result)):
            self.seen |= names
            self.direct |= names


class Recorder:
    """Notes the layers that are called, and who reads which parameter.

    Args:
        trainable: The names of the trainable parameters by identity.
        every: Those of all parameters, frozen ones too.
        examples: B.
        tape: Where the calls between the layers are noted; None to leave them.
        watch: Whether to note which functions draw random numbers.
        inputs: Where to keep the layers' inputs; None to leave them.
    """

    def __init__(
        self,
        trainable: Mapping[int, str],
        every: Mapping[int, str],
        examples: int,
        tape: Tape | None,
        watch: bool,
        inputs: Inputs | None,
    ) -> None:
        self.sites: list[Site] = []
        self.layers: list[tuple[Site | None, Layer]] = []
        self.uses = Uses(trainable)
        self.layouts: dict[int, list[tuple[int, ...]]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._every, self._examples = every, examples
        self._tape, self._watch, self._inputs = tape, watch, inputs
        self._blanks: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _like(self, z: Tensor) -> Tensor:
        """A tensor without entries, the same for all layers: one of each's own would keep the allocator from reuse."""
        return self._blanks.setdefault((z.dtype, z.device), torch.empty(0, dtype=z.dtype, device=z.device))

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that no gradient goes through: there is no more to it than what it draws."""
        return self._watched(function, function, args, kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and note it."""
        return self._watched(self._noted, function, args, kwargs)

    def _watched(self, call: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(call_of(function, args, kwargs))
        inside = (args, kwargs) if call is function else (function, args, kwargs)
        if not self._watch:
            return call(*args, **kwargs) if call is function else call(*inside)
        number, before = len(self.calls) - 1, random_states()
        strides = [tensor.stride() for tensor in tensors((args, kwargs))]
        result = call(*args, **kwargs) if call is function else call(*inside)
        if not same_states(before, random_states()):
            self.layouts[number] = strides
        return result

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = layer_call(function, args, kwargs, self._every)
        if call is None:
            result = function(*args, **kwargs) if self._tape is None else self._tape.call(function, args, kwargs)
            self.uses.function(list(tensors((args, kwargs))), result)
            return result
        x, layer = call
        read = None if self._tape is None else self._tape.read(x)
        z = function(*args, **kwargs)
        batched = layer.batched and z.ndim >= 2 and z.shape[0] == self._examples == x.shape[0]
        names = self.uses.layer(layer, x, batched)
        if batched:
            site = Site(len(self.sites), layer, tuple(z.shape), tuple(x.shape), self._like(z), *names)
            site._read = read
            if self._inputs is not None:
                self._inputs.keep(site.number, x)
            if self._tape is not None:
                site._made = self._tape.start(z, True)
            self.sites.append(site)
            self.layers.append((site, layer))
        else:
            self.layers.append((None, layer))
            if self._tape is not None and read is not None:
                self._tape.entries.append(_opaque(layer, x, read, self._tape.start(z)))
        return z


def _opaque(layer: Layer, x: Tensor, read: int, made: int) -> Entry:
    """A layer whose rows are no examples: on the way, it is one more function."""
    shape = tuple(x.shape)

    def pull(found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return [None if found[0] is None else layer.pull(found[0], shape)]

    return Entry((read,), (made,), pull)


def link(sites: Sequence[Site], tape: Tape) -> None:
    """Find for every layer the one that follows it, the functions in between, and the slope."""
    readers: dict[int, list[Entry]] = {}
    reading: dict[int, list[Site]] = {}
    for entry in tape.entries:
        for node in set(entry.inputs):
            readers.setdefault(node, []).append(entry)
    for site in sites:
        if site._read is not None:
            reading.setdefault(site._read, []).append(site)
    order = {id(entry): number for number, entry in enumerate(tape.entries)}
    for site in sites:
        _slope(site, tape, readers, reading)
        reached, waiting, after = {site._made}, [site._made], list[Site]()
        passed: dict[int, Entry] = {}
        while waiting:
            node = waiting.pop()
            after += reading.get(node, [])
            for entry in readers.get(node, []):
                passed[id(entry)] = entry
                new = [made for made in entry.outputs if made not in reached]
                reached.update(new)
                waiting.extend(new)
        behind = _behind(site, tape, readers, reading)
        if not after:
            site.adjacent = True
            continue
        site.following = min(after, key=lambda other: other.number)
        wanted, path = {site.following._read}, list[Entry]()
        for entry in sorted(passed.values(), key=lambda held: order[id(held)], reverse=True):
            if wanted & set(entry.outputs):
                path.append(entry)
                wanted |= set(entry.inputs)
        site._path = path[::-1]
        site.adjacent = site.following.number == site.number + 1 and site.following._read == behind


def _slope(site: Site, tape: Tape, readers: Mapping[int, list[Entry]], reading: Mapping[int, list[Site]]) -> None:
    node = site._made
    site.value = tape.value(node)
    while not reading.get(node) and tape.readers.get(node) == 1 and len(readers.get(node, [])) == 1:
        entry = readers[node][0]
        if entry.slope is not None:
            site.slope = entry.slope if site.slope is None else entry.slope * site.slope
            site.value = entry.value
        elif not entry.plain:
            return
        node = entry.outputs[0]


def _behind(site: Site, tape: Tape, readers: Mapping[int, list[Entry]], reading: Mapping[int, list[Site]]) -> int:
    """Find the functions behind z; the node of what the last of them makes."""
    node, after = site._made, readers.get(site._made, [])
    while not reading.get(node) and tape.readers.get(node) == 1 and len(after) == 1 and after[0].slope is not None:
        site.functions, node = (*site.functions, after[0].function), after[0].outputs[0]
        after = readers.get(node, [])
    site.own = not any(entry.slope is not None or entry.plain for entry in after)
    return node


def record(
    run: Callable[[], Tensor],
    trainable: Mapping[int, str],
    every: Mapping[int, str],
    examples: int,
    follow: bool,
    values: bool,
    watch: bool,
    inputs: Inputs | None = None,
) -> Structure:
    """Run a model and its loss once, and find its layers.

    Args:
        run: Runs them.
        trainable: The names of the trainable parameters by identity.
        every: Those of all parameters.
        examples: B.
        follow: Whether to find what lies between the layers.
        values: Whether to keep the post-activations.
        watch: Whether to note which functions draw random numbers.
        inputs: Where to keep the layers' inputs; None to leave them.

    Returns:
        What was found. A parameter is guessed at pre-activations if every function that reads it is a layer whose
        output's first dimension counts the examples, and directly otherwise.
    """
    tape = Tape(values) if follow else None
    recorder = Recorder(trainable, every, examples, tape, watch, inputs)
    before = random_states()
    with torch.enable_grad(), Mode(recorder):
        loss = run()
    drawn = not same_states(before, random_states())
    for site in recorder.sites:
        site.weight = None if site.weight in recorder.uses.direct else site.weight
        site.bias = None if site.bias in recorder.uses.direct else site.bias
    if tape is not None:
        link(recorder.sites, tape)
    uses = recorder.uses
    loss, hidden = loss.detach(), set(trainable.values()) - uses.seen
    return Structure(
        recorder.sites, recorder.layers, uses.direct, hidden, loss, drawn, recorder.calls, recorder.layouts
    )
