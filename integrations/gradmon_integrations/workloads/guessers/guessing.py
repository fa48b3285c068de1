"""A pass in which guesses are made at layers that were found before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from gradmon._batches import tensors
from gradmon._tensors import working
from gradmon_integrations.workloads.guessers.followers import Duals
from gradmon_integrations.workloads.guessers.guesser import guessed
from gradmon_integrations.workloads.guessers.inputs import FREE, Inputs
from gradmon_integrations.workloads.guessers.kept import ChangedError, Kept, kind_of, names_of
from gradmon_integrations.workloads.guessers.layers import layer_call
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.pulls import Pull, applied, slope_of, through
from gradmon_integrations.workloads.guessers.recording import Site, Uses, call_of
from gradmon_integrations.workloads.guessers.settings import Settings
from gradmon_integrations.workloads.guessers.tape import ELEMENTWISE, SUMS, Entry

Take = Callable[[Site, Tensor, Tensor], None]


@dataclass
class _Waiting:
    """A z, or what functions made of it, whose guess waits for the last of them."""

    z: Tensor
    version: int
    site: Site
    left: tuple[Any, ...]
    pulls: tuple[Pull, ...] = ()


class Guesses:
    """Makes guesses as a pass goes along, and sees that the pass is the one that was kept.

    Args:
        passes: Of the model.
        settings: How to estimate.
        kept: What an earlier pass found; None to make no guesses at layers.
        duals: The dual numbers that stand for some parameters.
        noise: Where guesses draw from.
        take: Is given each guess with its layer and the layer's input, where it is not to be injected, in a plain pass.

    Attributes:
        held: Whether guesses and inputs are held.
        made: The guesses, if they are held, with their layers.
        inputs: The layers' inputs, if they are held.
        guessed: How many guesses were made.
        squares: The squared lengths of the guesses of each layer, where they are to be scaled.
    """

    def __init__(
        self,
        passes: Passes,
        settings: Settings,
        kept: Kept | None,
        duals: Mapping[int, Tensor],
        noise: Seeded,
        take: Take | None = None,
    ) -> None:
        self._passes, self._settings, self._kept, self._noise = passes, settings, kept, noise
        self._active, self._needs, self._reach = settings.active, settings.needs, settings.reach
        self._scaled = settings.scaled
        self._calls = 0
        self._changed = False
        self._duals = Duals(passes.every, duals, {} if kept is None else kept.layouts)
        trainable = passes.names
        self._uses = Uses({**trainable, **{id(dual): trainable[key] for key, dual in duals.items()}})
        self._layers = self._met = 0
        self._sites: list[Site] = []
        self._others: list[int] = []
        self.inputs = Inputs(set[int]() if kept is None else kept.written)
        self.made: list[tuple[Site, Tensor]] = []
        self.held, self._take, self.guessed = settings.hold, take, 0
        self.squares: list[Tensor] = []
        self._waiting: dict[int, _Waiting] = {}
        # What may be read only by some functions, or by none, from here on.
        self._watched: dict[int, tuple[weakref.ref[Tensor], frozenset[Any] | None]] = {}
        self._outputs: list[weakref.ref[Tensor] | None] = []

    def _change(self) -> ChangedError:
        self._changed = True  # the model may catch what it does not know
        return ChangedError()

    def _met_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._kept is not None:
            calls = self._kept.calls
            if self._calls >= len(calls) or calls[self._calls] != call_of(function, args, kwargs):
                raise self._change()
            self._calls += 1

    def constant(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that no gradient goes through."""
        self._met_call(function, args, kwargs)
        return self._duals.constant(function, args, kwargs)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function.

        Raises:
            ChangedError: It is not the one that was kept, or a layer is not.
        """
        self._met_call(function, args, kwargs)
        args, kwargs = self._duals.arguments(args, kwargs, True)
        call = layer_call(function, args, kwargs, self._duals.every)
        if call is not None:
            return self._layer(function, args, kwargs, *call)
        if self._waiting and args and id(args[0]) in self._waiting:
            held = self._waiting[id(args[0])]
            if held.left[0] == function:
                del self._waiting[id(args[0])]
                return self._behind(held, function, args, kwargs)
        read = list(tensors((args, kwargs)))
        result = self._duals.other(function, args, kwargs)
        self._uses.function(read, result)
        if self._waiting or self._watched:
            self._see(read, function, result)
        return result

    def _see(self, read: list[Tensor], function: Any, result: Any) -> None:
        """Refuse a function that reads what only others were seen to read."""
        for tensor in read:
            watched = self._watched.get(id(tensor))
            held = self._waiting.get(id(tensor))
            only = watched is not None and watched[0]() is tensor and (watched[1] is None or function in watched[1])
            if (held is not None or only) and any(made.is_floating_point() for made in tensors(result)):
                raise self._change()

    def _layer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, layer: Any
    ) -> Tensor:
        if self._waiting or self._watched:
            self._see([held for held in (x, layer.weight, layer.bias) if held is not None], function, x)
        primal, z, tangent = self._duals.layer(function, args, kwargs, x, layer)
        rows = layer.batched and z.ndim >= 2 and z.shape[0] == x.shape[0]
        if self._kept is None:
            self._uses.layer(layer, x, False)
            return z if tangent is None else forward_ad.make_dual(z, tangent)
        layers = self._kept.layers
        call = layers[self._layers] if self._layers < len(layers) else None
        self._layers += 1
        if call is None or call.kind != kind_of(layer) or call.names != names_of(layer, self._duals.every):
            raise self._change()
        self._uses.layer(layer, x, call.site is not None)
        if call.site is None:
            if rows:
                self._others.append(z.shape[0])
            return z if tangent is None else forward_ad.make_dual(z, tangent)
        if not rows:
            raise self._change()
        site = self._site(primal, z, layer)
        self._order(site, x)
        if self._active is None or not site.guessed:
            self._outputs.append(None)
            return z if tangent is None else forward_ad.make_dual(z, tangent)
        if self.held or self._take is not None:
            self.inputs.keep(site.number, primal)
        return self._at(site, z, tangent)

    def _site(self, x: Tensor, z: Tensor, layer: Any) -> Site:
        """The site that is met, which must be as it was, but for the number of examples."""
        assert self._kept is not None
        if not self._sites:
            examples, held = z.shape[0], self._kept
            if examples > 1 and held.examples == 1:
                raise self._change()
            self._sites = held.sites(examples)
            size = sum(site.bytes + site.input_bytes for site in self._sites if site.guessed)
            self.held = self._take is None and (self._settings.hold or size <= FREE)
        site = self._sites[self._met]
        self._met += 1
        like = site.like
        if (
            site.shape != tuple(z.shape)
            or site.input_shape != tuple(x.shape)
            or like.dtype != z.dtype
            or like.device != z.device
        ):
            raise self._change()
        site.layer = layer
        return site

    def _order(self, site: Site, x: Tensor) -> None:
        """See that the layer before hands over what it was seen to."""
        if self._reach != "next" or site.number == 0:
            return
        before, output = self._sites[site.number - 1], self._outputs[site.number - 1]
        if before.following is site and output is not None and output() is not x:
            raise self._change()

    def _at(self, site: Site, z: Tensor, tangent: Tensor | None) -> Tensor:
        """Inject a guess at z, now or later."""
        site._made, site._path = 0, []
        looks = self._needs != "nothing"
        if site.following is not None:
            site.following._read = 1 if looks and site.functions else 0
        if looks and site.functions:
            found = z if tangent is None else forward_ad.make_dual(z, tangent)
            self._waiting[id(found)] = _Waiting(found, found._version, site, site.functions)
            self._outputs.append(None)
            return found
        if self._needs == "values":
            site.value = z.detach().clone()
        y, found = self._guess(site), z
        if y is not None:
            # Where a function writes to the tangent, the guess is not to change.
            found = forward_ad.make_dual(z, y.clone() if tangent is None else tangent + y)
        if looks and self._reach == "own":
            self._watched[id(found)] = weakref.ref(found), _FUNCTIONS
        self._outputs.append(weakref.ref(found))
        return found

    def _behind(
        self, held: _Waiting, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Inject the guess of a z that waited behind the function that reads it."""
        site, z = held.site, held.z
        read = list(tensors((args[1:], kwargs)))
        if z._version != held.version or read:
            raise self._change()
        x, tangent = forward_ad.unpack_dual(z)
        value, pull = applied(function, x, args[1:], kwargs)
        self._watched[id(z)] = weakref.ref(z), None
        pulls = (*held.pulls, pull)
        tangent = None if tangent is None else pull.along(tangent)
        if len(held.left) > 1:
            found = value if tangent is None else forward_ad.make_dual(value, tangent)
            self._waiting[id(found)] = _Waiting(found, found._version, site, held.left[1:], pulls)
            return found

        def back(made: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if part is None else through(part, reversed(pulls)) for part in made]

        site._path = [Entry((0,), (1,), back)]
        if self._needs == "values":
            site.value = value
        y, found = self._guess(site, pulls), value
        if y is not None:
            y = through(y, pulls)
            found = forward_ad.make_dual(value, y if tangent is None else tangent + y)
        if self._reach == "own":
            self._watched[id(found)] = weakref.ref(found), _FUNCTIONS
        self._outputs[site.number] = weakref.ref(found)
        return found

    def _guess(self, site: Site, pulls: tuple[Pull, ...] = ()) -> Tensor | None:
        """The guess, to be injected; None where it is taken otherwise."""
        assert self._active is not None
        self.guessed += 1
        if self._reach == "own":
            site.slope = slope_of(pulls)
        y = guessed(self._active, site, self._noise)
        site.slope = site.value = None
        site._path = []
        if self._take is not None:
            x = self.inputs.pop(site.number)
            if x is None:
                raise self._written({site.number})
            self._take(site, y, x)
            return None
        if self._scaled:
            self.squares.append(working(y).reshape(site.shape[0], -1).square().sum(-1))
        if self.held:
            self.made.append((site, y))
        return y

    def _written(self, numbers: set[int]) -> ChangedError:
        assert self._kept is not None
        self._kept.written |= numbers
        return self._change()

    def finish(self, value: Tensor) -> None:
        """See that the pass was what it was taken for.

        Raises:
            ChangedError: It was not.
        """
        kept, passes = self._kept, self._passes
        if kept is None:
            if self._changed or self._uses.seen != set(passes.parameters):
                raise self._change()
            return
        examples = passes.examples
        if (
            self._changed
            or self._calls != len(kept.calls)
            or self._layers != len(kept.layers)
            or self._waiting
            or self._uses.direct != kept.direct
            or self._uses.seen != set(passes.parameters) - kept.hidden
            or examples in self._others
            or any(site.shape[0] != examples for site in self._sites[:1])
            or (value.ndim == 1) != kept.apart
            or (self.guessed and value.ndim == 0 and examples > 1)
        ):
            raise self._change()
        written = self.inputs.changed()
        if written:
            raise self._written(written)


_FUNCTIONS = ELEMENTWISE | SUMS
