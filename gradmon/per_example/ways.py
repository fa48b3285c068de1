"""By which way the examples' gradients in a use are had: a rule, a replay, or, slowest, one example after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmon._parameters import Weights
from gradmon._tensors import length, ran_out, wide
from gradmon.per_example.calls import Tape
from gradmon.per_example.cut import Cut, Rule, as_forms
from gradmon.per_example.fallback import Repeated, chained, replay, whole_flows
from gradmon.per_example.forms import Relocated, Shares, one, total
from gradmon.per_example.rows import Course, Planned, Rows
from gradmon.per_example.rules import Rules


class Ways:
    """The ways that were found and compared with the slowest, by course and use; kept from probe to probe."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Course, dict[int, str]] = weakref.WeakKeyDictionary()

    def unique(self, course: Course, planned: Planned) -> bool:
        """Whether a use can be told from all others of its course by its function and parameters."""
        return sum((p.name, p.positions) == (planned.name, planned.positions) for p in course.uses) == 1

    def forms(self, part: Cut, rules: Rules, place: tuple[Course, int], *, check: bool) -> tuple[list[Shares], str]:
        """The examples' gradients in a use, one form for each of its sources, and the name of the way.

        Args:
            part: The use.
            rules: The rules.
            place: Its course, and where in it it is.
            check: Whether to compare with the slowest way, even where the way is known.

        Raises:
            Unavailable: There is no way.
        """
        course, index = place
        names = self._known.setdefault(course, {})
        known = names.get(index)
        part = whole_flows(part)
        ladder = self._ladder(part, rules)
        if known is not None and not check:
            for name, rule in ladder:
                if name == known and (forms := _tried(rule, part)) is not None:
                    return forms, name
        repeated = Repeated(part)
        example = _busiest(part)
        alone, together = repeated.share(example), repeated.share(None)
        for name, rule in ladder:
            forms = _tried(rule, part)
            if forms is not None and _agree(forms, example, alone, together, part):
                if all(length(single) > 0 for single in alone):  # nothing is proved by zeros
                    names[index] = name
                return forms, name
        names[index] = "repeat"
        return repeated.forms(), "repeat"

    def _ladder(self, part: Cut, rules: Rules) -> list[tuple[str, Rule]]:
        func = part.use.func
        rule = rules.get(type(func) if isinstance(func, nn.Module) else func)
        if any(t.is_complex() for t in (*part.use.sources, *part.use.activations)):
            rule = None
        ladder: list[tuple[str, Rule]] = [] if rule is None else [(part.use.name.strip("_"), rule)]
        return [*ladder, ("replay", replay), ("repeat", lambda part: Repeated(part).forms())]

    def to_parameters(
        self, part: Cut, tape: Tape, key: int, positions: Sequence[int], form: Shares, weights: Weights
    ) -> Iterator[tuple[int, Shares]]:
        """The gradients of the parameters behind a source from those of the source.

        Raises:
            Unavailable: What lies between cannot be made again.
        """
        if len(positions) == 1 and id(weights.parameters[positions[0]]) == key:
            yield positions[0], form
            return
        places = tape.relocation(key, positions)
        if places is not None:
            yield positions[0], Relocated(form, places, weights.parameters[positions[0]].shape, part.scratch)
            return
        parameters = [weights.parameters[at].detach() for at in positions]
        evaluate = tape.function(key, positions)

        def pull(rows: Tensor) -> list[Tensor]:
            return _pulled(evaluate, parameters, rows)

        shapes = [parameter.shape for parameter in parameters]
        yield from zip(positions, chained(pull, form, part, shapes), strict=True)


def _pulled(evaluate: Callable[..., Tensor], parameters: list[Tensor], rows: Tensor) -> list[Tensor]:
    """``rows @ d evaluate / d parameters``, one row after the other where they cannot be had together."""
    with torch.enable_grad():
        leaves = [parameter.requires_grad_() for parameter in parameters]
        made = evaluate(*leaves)
        rows = rows.to(made.dtype)
        parts: list[tuple[Any, ...]] = [
            torch.autograd.grad(made, leaves, row.reshape(made.shape), retain_graph=True, allow_unused=True)
            for row in rows
        ]
    return [
        torch.stack([torch.zeros_like(leaf) if part[at] is None else part[at] for part in parts])
        for at, leaf in enumerate(leaves)
    ]


def _tried(rule: Rule, part: Cut) -> list[Shares] | None:
    try:
        found = rule(part)
        return None if found is None else as_forms(found, part)
    except Exception as error:  # a rule may not know a call, and vmap does not know every function
        if ran_out(error):
            raise
        return None


def _busiest(part: Cut) -> int:
    """The example at whose rows most arrived."""
    for owner, flow in zip(part.planned.outputs, part.arrived, strict=True):
        if isinstance(owner, Rows) and flow is not None and flow.numel():
            sizes = owner.split(flow, part.examples).reshape(part.examples, -1).abs().amax(1)
            return int(sizes.nan_to_num(0.0, 0.0, 0.0).argmax())
    return 0


def _agree(forms: Sequence[Shares], example: int, alone: list[Tensor], together: list[Tensor], part: Cut) -> bool:
    """Whether the gradients of one example, and of all together, are what the slowest way gives, up to rounding."""
    types = [flow.dtype for flow in part.arrived if flow is not None]
    types += [tensor.dtype for tensor in part.use.activations if tensor.is_floating_point()]
    tolerance = max([torch.finfo(t).eps for t in types if t.is_floating_point], default=0.0) ** 0.5
    try:
        for form, single, whole in zip(forms, alone, together, strict=True):
            size = max(length(single), length(whole))
            for found, expected in ((one(form, example), single), (total(form, part.scratch.budget), whole)):
                if not length(wide(found) - wide(expected)) <= size * tolerance:
                    return False
    except Exception as error:
        if ran_out(error):
            raise
        return False
    return True
