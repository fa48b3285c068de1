"""One plain forward pass that finds the layers, how each parameter is used, and what lies between the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmon._batches import tensors
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
    _read: int | None = None
    _made: int = 0
    _path: list[Entry] = field(default_factory=list)

    @property
    def guessed(self) -> bool:
        """Whether a parameter of it is guessed by its pre-activation."""
        return self.weight is not None or self.bias is not None

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
        direct: The names of the parameters that are guessed directly.
        hidden: The names of those that no function was seen to read.
        loss: What the loss returned.
        random: Whether the pass drew from torch's global generators.
        layouts: For each call of a function that did, by its number, the strides of the tensors that it was given:
            what is drawn goes by the order of the entries in memory.
    """

    sites: list[Site]
    direct: set[str]
    hidden: set[str]
    loss: Tensor
    random: bool
    layouts: dict[int, list[tuple[int, ...]]]


class Recorder:
    """Notes the layers that are called, and who reads which parameter.

    Args:
        trainable: The names of the trainable parameters by identity.
        every: Those of all parameters, frozen ones too.
        examples: B.
        tape: Where the calls between the layers are noted; None to leave them.
        values: Whether to keep what follows z entry by entry.
    """

    def __init__(
        self, trainable: Mapping[int, str], every: Mapping[int, str], examples: int, tape: Tape | None, values: bool
    ) -> None:
        self.sites: list[Site] = []
        self.seen: set[str] = set()
        self.direct: set[str] = set()
        self.layouts: dict[int, list[tuple[int, ...]]] = {}
        self._calls = 0
        self._trainable, self._every, self._examples = trainable, every, examples
        self._tape, self._values = tape, values
        self._blanks: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _like(self, z: Tensor) -> Tensor:
        """A tensor without entries, the same for all layers: one of each's own would keep the allocator from reuse."""
        return self._blanks.setdefault((z.dtype, z.device), torch.empty(0, dtype=z.dtype, device=z.device))

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that no gradient goes through: there is no more to it than what it draws."""
        return self._watched(lambda: function(*args, **kwargs), args, kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and note it."""
        return self._watched(lambda: self._noted(function, args, kwargs), args, kwargs)

    def _watched(self, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, strides = random_states(), [tensor.stride() for tensor in tensors((args, kwargs))]
        result = call()
        if not same_states(before, random_states()):
            self.layouts[self._calls] = strides
        self._calls += 1
        return result

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = layer_call(function, args, kwargs, self._every)
        if call is None:
            result = function(*args, **kwargs) if self._tape is None else self._tape.call(function, args, kwargs)
            self._note_parameters(args, kwargs, result)
            return result
        x, layer = call
        read = None if self._tape is None else self._tape.read(x)
        z = function(*args, **kwargs)
        names = [None if held is None else self._trainable.get(id(held)) for held in (layer.weight, layer.bias)]
        self.seen.update(name for name in names if name is not None)
        if id(x) in self._trainable:
            self.seen.add(self._trainable[id(x)])
            self.direct.add(self._trainable[id(x)])
        if layer.batched and z.ndim >= 2 and z.shape[0] == self._examples == x.shape[0]:
            site = Site(len(self.sites), layer, tuple(z.shape), tuple(x.shape), self._like(z), names[0], names[1])
            site._read = read
            if self._tape is not None:
                site._made = self._tape.start(z)
                site.value = z.detach().clone() if self._values else None
            self.sites.append(site)
        else:
            self.direct.update(name for name in names if name is not None)
            if self._tape is not None and read is not None:
                self._tape.entries.append(_opaque(layer, x, read, self._tape.start(z)))
        return z

    def _note_parameters(self, args: Any, kwargs: Any, result: Any) -> None:
        held = [value for value in tensors((args, kwargs)) if id(value) in self._trainable]
        if held and any(value.is_floating_point() for value in tensors(result)):
            names = {self._trainable[id(value)] for value in held}
            self.seen |= names
            self.direct |= names


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
        if not after:
            continue
        site.following = min(after, key=lambda other: other.number)
        wanted, path = {site.following._read}, list[Entry]()
        for entry in sorted(passed.values(), key=lambda held: order[id(held)], reverse=True):
            if wanted & set(entry.outputs):
                path.append(entry)
                wanted |= set(entry.inputs)
        site._path = path[::-1]


def _slope(site: Site, tape: Tape, readers: Mapping[int, list[Entry]], reading: Mapping[int, list[Site]]) -> None:
    node = site._made
    while not reading.get(node) and tape.readers.get(node) == 1 and len(readers.get(node, [])) == 1:
        entry = readers[node][0]
        if entry.slope is not None:
            site.slope = entry.slope if site.slope is None else entry.slope * site.slope
            site.value = entry.value
        elif not entry.plain:
            return
        node = entry.outputs[0]


def record(
    run: Callable[[], Tensor],
    trainable: Mapping[int, str],
    every: Mapping[int, str],
    examples: int,
    follow: bool,
    values: bool,
) -> Structure:
    """Run a model and its loss once, and find its layers.

    Args:
        run: Runs them.
        trainable: The names of the trainable parameters by identity.
        every: Those of all parameters.
        examples: B.
        follow: Whether to find what lies between the layers.
        values: Whether to keep the post-activations.

    Returns:
        What was found. A parameter is guessed at pre-activations if every function that reads it is a layer whose
        output's first dimension counts the examples, and directly otherwise.
    """
    tape = Tape(values) if follow else None
    recorder = Recorder(trainable, every, examples, tape, values)
    before = random_states()
    with torch.enable_grad(), Mode(recorder):
        loss = run().detach()
    drawn = not same_states(before, random_states())
    for site in recorder.sites:
        site.weight = None if site.weight in recorder.direct else site.weight
        site.bias = None if site.bias in recorder.direct else site.bias
    if tape is not None:
        link(recorder.sites, tape)
    return Structure(
        recorder.sites, recorder.direct, set(trainable.values()) - recorder.seen, loss, drawn, recorder.layouts
    )
