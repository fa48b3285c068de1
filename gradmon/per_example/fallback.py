"""The examples' gradients in any use, by making its call again.

`replay` makes the call for each example on its own rows and vectorises the vector-Jacobian product over the examples;
that is right only where the call treats its rows alike, so it is compared with `Repeated` before it is used.
`Repeated` makes the call once more on the whole batch and lets the gradient of one example after the other flow back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmon._errors import Unavailable, told
from gradmon._tensors import ran_out
from gradmon.per_example._autograd import version
from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Dense, Shares
from gradmon.per_example.rows import Rows, Spread


def replay(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """The call on each example's own rows, vectorised over the examples."""
    use = part.use
    if not all(isinstance(o, Rows) and f is not None for o, f in zip(part.planned.outputs, part.arrived, strict=True)):
        return None
    flows = [
        owner.split(flow, part.examples)
        for owner, flow in zip(part.planned.outputs, part.arrived, strict=True)
        if isinstance(owner, Rows) and flow is not None
    ]
    activations, along = list[Tensor](), list[int | None]()
    for tensor, owner in zip(use.activations, part.planned.activations, strict=True):
        part.whole(tensor)  # refuses one that was overwritten
        if not isinstance(owner, (Rows, Spread)):
            return None
        activations.append(
            owner.split(tensor, part.examples).contiguous() if isinstance(owner, Rows) else tensor.clone()
        )
        along.append(0 if isinstance(owner, Rows) else None)

    def one(activations: list[Tensor], flowing: list[Tensor]) -> tuple[Tensor, ...]:
        moved = {id(tensor): piece for tensor, piece in zip(use.activations, activations, strict=True)}

        def outputs(*parameters: Tensor) -> tuple[Tensor, ...]:
            return use.again({**moved, **{id(s): p for s, p in zip(use.sources, parameters, strict=True)}})

        pull: Callable[[Any], tuple[Tensor, ...]] = torch.func.vjp(
            outputs, *(source.clone() for source in use.sources)
        )[1]
        return pull(tuple(flowing))

    every: Any = torch.func.vmap(one, in_dims=(along, 0))

    def made(examples: slice) -> tuple[Tensor, ...]:
        own = [a if at is None else a[examples] for a, at in zip(activations, along, strict=True)]
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that vmap loops over the examples where it knows no better way
            return every(own, [flow[examples] for flow in flows])

    return _forms(part, made, [*activations, *flows])


def _forms(part: Cut, made: Callable[[slice], Sequence[Tensor]], kept: Sequence[Tensor]) -> list[Shares]:
    """One form for each parameter, made at once where there is room for all of them."""
    shapes = [source.shape for source in part.parameters]
    if part.examples * sum(math.prod(shape) for shape in shapes) <= part.scratch.budget:
        return [Dense(part.widened(rows)) for rows in made(slice(0, part.examples))]

    def only(at: int) -> Callable[[slice], Tensor]:
        return lambda examples: part.widened(made(examples)[at]).flatten(1)

    return [part.lazy(only(at), shape, kept) for at, shape in enumerate(shapes)]


class Repeated:
    """A call that is made once more on the whole batch, so that the gradient of any example can be sent back.

    Args:
        part: The use.

    Raises:
        Unavailable: The call cannot be made again.
    """

    def __init__(self, part: Cut) -> None:
        self._part = part
        use = part.use
        self._lost: Tensor | None = None
        # Copies, because an embedding with a maximal norm overwrites its table.
        self._sources = [source.detach().clone().requires_grad_() for source in use.sources]
        replaced = {id(s): leaf for s, leaf in zip(use.sources, self._sources, strict=True)}
        for tensor, before in zip(use.activations, use.versions, strict=True):
            # A copy, because running statistics are overwritten by the call, and in plain order, because some kernels
            # go wrong with channels last. What was overwritten is lost: if it mattered, the result will not be finite.
            copied = tensor.clone(memory_format=torch.contiguous_format)
            if version(tensor) != before:
                if not tensor.is_floating_point():
                    raise Unavailable(f"what `{use.name}` was given was overwritten afterwards")
                self._lost = copied.fill_(math.nan)
            replaced[id(tensor)] = copied
        try:
            with torch.enable_grad():
                self._outputs = use.again(replaced)
        except Exception as error:
            if ran_out(error):
                raise
            raise Unavailable(f"`{use.name}` cannot be called again: {told(error)}") from error

    def own_flows(self) -> list[Tensor | None]:
        """What arrived at each output from elsewhere than from the call's other outputs.

        Where one output is made of another, as h of c in an LSTM cell, what arrives at the latter holds what came by
        the former, which would be counted twice.
        """
        arrived = list(self._part.arrived)
        waiting = [at for at, flow in enumerate(arrived) if flow is not None and self._outputs[at].requires_grad]
        above: dict[int, set[int]] = {at: set() for at in waiting}
        for a in waiting:
            for b in waiting:
                grad: Any = torch.autograd.grad
                if a != b:
                    seed = torch.ones_like(self._outputs[a])
                    if (
                        grad(self._outputs[a], self._outputs[b], seed, retain_graph=True, allow_unused=True)[0]
                        is not None
                    ):
                        above[b].add(a)
        done: list[int] = []
        while waiting:
            at = next(at for at in waiting if above[at] <= set(done))
            waiting.remove(at)
            flow = arrived[at]
            if above[at] and flow is not None:
                outputs = [self._outputs[a] for a in above[at]]
                seeds = [part for a in above[at] if (part := arrived[a]) is not None]
                through = torch.autograd.grad(outputs, self._outputs[at], seeds, retain_graph=True)[0]
                arrived[at] = flow - through
            done.append(at)
        return arrived

    def share(self, example: int | None) -> list[Tensor]:
        """The gradients that one example sends back, or all together for None; one tensor for each parameter."""
        part = self._part
        part.check()
        outputs, seeds = list[Tensor](), list[Tensor]()
        for output, owner, flow in zip(self._outputs, part.planned.outputs, part.arrived, strict=True):
            if flow is None or not output.requires_grad:  # made of activations alone
                continue
            if example is not None and isinstance(owner, Rows):
                flow = owner.alone(flow, example, part.examples)
            elif example is not None:  # a penalty is shared by all alike
                flow = flow / part.examples
            outputs.append(output)
            seeds.append(flow.to(output.dtype))
        found: Sequence[Tensor | None] = [None] * len(self._sources)
        if outputs:
            try:
                found = torch.autograd.grad(outputs, self._sources, seeds, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if ran_out(error):
                    raise
                raise Unavailable(f"`{part.use.name}` has no gradient of its own: {error}") from error
        shares = [
            part.widened(torch.zeros_like(source) if gradient is None else gradient.to_dense())
            for gradient, source in zip(found, self._sources, strict=True)
        ]
        if self._lost is not None and not all(bool(torch.isfinite(share).all()) for share in shares):
            raise Unavailable(f"what `{part.use.name}` was given was overwritten afterwards")
        return shares

    def forms(self) -> list[Shares]:
        """The gradients of all examples, one after the other."""

        def made(examples: slice) -> list[Tensor]:
            shares = [self.share(example) for example in range(examples.start, examples.stop)]
            return [torch.stack(parts) for parts in zip(*shares, strict=True)]

        kept = [flow for flow in self._part.arrived if flow is not None]
        return _forms(self._part, made, [*kept, *self._part.use.activations])


def whole_flows(part: Cut) -> Cut:
    """The use with what arrived at each output only once."""
    if sum(flow is not None for flow in part.arrived) < 2:
        return part
    return replace(part, arrived=Repeated(part).own_flows())


def chained(
    pull: Callable[[Tensor], list[Tensor]], inner: Shares, part: Cut, shapes: Sequence[torch.Size]
) -> list[Shares]:
    """The gradients of parameters from those of something made of them.

    Args:
        pull: From gradients of what was made, (n', *shape), to those of each parameter, (n', *shape).
        inner: The gradients of what was made.
        part: The use.
        shapes: The shapes of the parameters.
    """

    def made(examples: slice) -> list[Tensor]:
        rows = inner.block(examples, slice(0, max(1, inner.shape[0]) if inner.shape else 1))
        return [part.widened(found) for found in pull(rows.reshape(-1, *inner.shape))]

    if part.examples * sum(math.prod(shape) for shape in shapes) <= part.scratch.budget:
        return [Dense(rows) for rows in made(slice(0, part.examples))]
    return [
        part.lazy(lambda examples, at=at: made(examples)[at].flatten(1), shape, inner.kept)
        for at, shape in enumerate(shapes)
    ]
