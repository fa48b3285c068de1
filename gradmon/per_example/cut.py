"""A use cut into the examples' rows: what a rule works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon.per_example._autograd import version
from gradmon.per_example.capture import Use
from gradmon.per_example.forms import Dense, Lazy, Shares
from gradmon.per_example.rows import Planned, Rows, Spread, Unknown
from gradmon.per_example.scratch import Scratch


@dataclass(frozen=True)
class Cut:
    """A use, and the gradients that arrived at its outputs, by example.

    Attributes:
        use: The use.
        planned: Whose its rows are.
        arrived: The gradient at each of its outputs; None where nothing depends on it.
        examples: The number B of examples.
        scratch: Where rules make intermediate results.
        coarsest: The type to which activations and gradients are widened, float32 or float64.
    """

    use: Use
    planned: Planned
    arrived: Sequence[Tensor | None]
    examples: int
    scratch: Scratch
    coarsest: torch.dtype = torch.float32

    def widened(self, tensor: Tensor) -> Tensor:
        """A floating-point tensor in at least the type `coarsest`."""
        return tensor.to(torch.promote_types(tensor.dtype, self.coarsest)) if tensor.is_floating_point() else tensor

    @property
    def parameters(self) -> list[Tensor]:
        """What the use was given for its parameters; a rule returns one form for each of them, in this order."""
        return self.use.sources

    def arguments(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """The arguments of the call by name.

        Args:
            names: The names of the positional arguments, in order.
            defaults: What stands for those that were not given; None for the others.
        """
        given = dict(zip(names, self.use.args, strict=False))
        return {**dict.fromkeys(names), **defaults, **given, **self.use.kwargs}

    def is_parameter(self, argument: object) -> bool:
        """Whether an argument is one of `parameters`."""
        return any(argument is source for source in self.use.sources)

    def whole(self, argument: Tensor) -> Tensor:
        """An activation as it was, floating ones in at least float32.

        Raises:
            Unavailable: It has been overwritten since.
        """
        at = self._at(argument)
        if version(argument) != self.use.versions[at]:
            raise Unavailable(f"what `{self.use.name}` was given was overwritten afterwards")
        return self.widened(argument)

    def rows(self, argument: Tensor) -> Tensor:
        """An activation by example, (B, *rows of one example), floating ones in at least float32.

        Raises:
            Unavailable: It has been overwritten, or has no rows.
        """
        owner = self.planned.activations[self._at(argument)]
        if not isinstance(owner, Rows):
            raise Unavailable(f"an argument of `{self.use.name}` has no rows")
        return owner.split(self.whole(argument), self.examples)

    def dim(self, argument: Tensor) -> int | None:
        """The dimension of an activation that holds the examples; None where all share it."""
        owner = self.planned.activations[self._at(argument)]
        return owner.dim if isinstance(owner, Rows) else None

    def _at(self, argument: Tensor) -> int:
        return next(at for at, tensor in enumerate(self.use.activations) if tensor is argument)

    @property
    def flow(self) -> Tensor:
        """The gradient at the only output, by example, (B, *rows of one example), in at least float32.

        Raises:
            Unavailable: There are several outputs, or it has no rows.
        """
        flow = self.arrived[0]
        if len(self.arrived) != 1 or flow is None:
            raise Unavailable(f"`{self.use.name}` has several outputs")
        return self.split(self.widened(flow))

    def split(self, values: Tensor) -> Tensor:
        """A tensor of the shape of the first output by example, (B, *rows of one example).

        Raises:
            Unavailable: The output has no rows.
        """
        owner = self.planned.outputs[0]
        if not isinstance(owner, Rows):
            raise Unavailable(f"`{self.use.name}` has no output with rows")
        return owner.split(values, self.examples)

    @property
    def flow_dim(self) -> int | None:
        """The dimension of the first output that holds the examples."""
        owner = self.planned.outputs[0]
        return owner.dim if isinstance(owner, Rows) else None

    def lazy(self, make: Callable[[slice], Tensor], shape: torch.Size, kept: Sequence[Tensor] = ()) -> Shares:
        """Gradients that are made when they are asked for; at once where there is room for all of them.

        Args:
            make: From a range of examples to their gradients, (n', numel).
            shape: The parameter's shape.
            kept: What `make` holds.
        """
        if self.examples * math.prod(shape) <= self.scratch.budget:
            return Dense(make(slice(0, self.examples)).reshape(self.examples, *shape))
        return Lazy(make, self.examples, shape, self.scratch, kept)

    def check(self) -> None:
        """Refuse rows that cannot be told apart, unless nothing depends on them.

        Raises:
            Unavailable: There are such, or the shares of one and the same penalty meet other outputs.
        """
        if self.use.ragged and self.examples > 1:
            held = [*zip(self.planned.outputs, self.arrived, strict=True),
                    *zip(self.planned.activations, self.use.activations, strict=True)]  # fmt: skip
            for owner, tensor in held:
                if isinstance(owner, Rows) and tensor is not None and tensor.shape[owner.dim] != self.examples:
                    raise Unavailable(f"the number of rows of `{self.use.name}` depends on what the batch holds")
        owners = [o for o, flow in zip(self.planned.outputs, self.arrived, strict=True) if flow is not None]
        for owner, flow in zip(self.planned.outputs, self.arrived, strict=True):
            if isinstance(owner, Unknown) and flow is not None and bool(flow.any()):
                raise Unavailable(f"per-example gradients cannot be had: {owner.reason}")
        if any(isinstance(o, Spread) for o in owners) and not all(isinstance(o, Spread) for o in owners):
            raise Unavailable(f"per-example gradients cannot be had: `{self.use.name}` mixes rows and sums")


Rule = Callable[[Cut], "Sequence[Shares | Tensor | None] | None"]
"""From a cut use to its examples' gradients, for each of its parameters: a form, the gradients themselves, (B, *shape),
or None for zeros. None instead of all of them: the rule does not know such a call. The scale is that of the gradient
that arrived: summed over the examples they give the parameter's gradient."""


def as_forms(found: Sequence[Shares | Tensor | None], part: Cut) -> list[Shares]:
    """What a rule returned as forms.

    Raises:
        ValueError: They do not fit the parameters.
    """
    if len(found) != len(part.parameters):
        raise ValueError(f"a rule for {len(part.parameters)} parameters returned {len(found)} results")
    forms: list[Shares] = []
    for shares, source in zip(found, part.parameters, strict=True):
        if shares is None:
            shares = source.new_zeros(1).expand(part.examples, *source.shape)
        form = Dense(shares) if isinstance(shares, Tensor) else shares
        if form.examples != part.examples or form.shape != source.shape:
            got = (form.examples, *form.shape)
            raise ValueError(f"a rule returned shape {got} for a parameter of shape {tuple(source.shape)}")
        forms.append(form)
    return forms
