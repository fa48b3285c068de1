"""What is made of the examples' gradients of one parameter: inner products, means and variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon._tensors import symmetric, wide
from gradmon.per_example.forms import Outer, Relocated, Shares, chunks, whole


def inner_products(groups: Sequence[Sequence[Shares]], budget: int) -> Tensor:
    """All inner products of the gradients of several groups of examples.

    Args:
        groups: For each group the forms of the parameter's uses, which are added up as gradients.
        budget: The most numbers to be made at once.

    Returns:
        (N, N), N the number of examples of all groups; in the type of the forms, or float64.
    """
    groups = [_merged(forms) for forms in groups]
    found = _products(groups, budget)
    # Squares leave the range of a type long before the numbers do: a large or small loss scale.
    if not 1e-25 <= float(found.trace()) < math.inf:
        size = _largest(groups, budget)
        if 0 < size < math.inf:
            factor = 2.0 ** -math.frexp(size)[1]
            again = _products([[form.scaled(factor) for form in forms] for forms in groups], budget)
            return wide(again) / factor / factor
    return found


def _largest(groups: Sequence[Sequence[Shares]], budget: int) -> float:
    """The largest entry of any gradient."""
    largest = 0.0
    for forms in groups:
        for form in forms:
            for examples, rows in chunks([form], budget):
                largest = max(largest, float(form.block(examples, rows).abs().max()))
    return largest


def _merged(forms: Sequence[Shares]) -> list[Shares]:
    """Matrix products are put one after the other in time: the sum of their gradients is one of the same kind."""
    outer = [form for form in forms if isinstance(form, Outer)]
    if len(outer) != len(forms) or len(forms) < 2:
        return list(forms)
    return [outer[0].beside(outer[1:])]


def _products(groups: Sequence[Sequence[Shares]], budget: int) -> Tensor:
    if len(groups) == 1:
        forms = groups[0]
        single = _inside(forms[0]) if len(forms) == 1 else None
        if single is not None:
            short = single.gram()
            if short is not None:
                return short
            groups = [[single]]
        elif _apart(forms):
            return torch.stack([_products([[_inside(form)]], budget) for form in forms]).sum(0)
    counts = [forms[0].examples for forms in groups]
    total = sum(counts)
    flat = [form for forms in groups for form in forms]
    if all(form.sliceable for form in flat):
        share = budget * counts[0] // max(1, total)
        ordered = len(flat) > 1
        products: Tensor | None = None
        for _, rows in chunks(groups[0], share):
            parts = [_added(forms, slice(0, n), rows, ordered, len(groups) > 1)
                     for forms, n in zip(groups, counts, strict=True)]  # fmt: skip
            part = parts[0] if len(parts) == 1 else torch.cat(parts)
            product = symmetric(part)
            products = product if products is None else wide(products).add_(product)
        if products is not None:
            return products
    found = torch.zeros(total, total, dtype=torch.float64, device=wide(flat[0].kept[0][:0]).device)
    places = [(forms, examples) for forms in groups for examples, _ in chunks(forms, budget // 2)]
    starts = [0]
    for _, examples in places:
        starts.append(starts[-1] + examples.stop - examples.start)
    for a, (forms, examples) in enumerate(places):
        first = _added(forms, examples, whole(forms[0])[1], True, True)
        for b in range(a + 1):
            second = first if a == b else _added(places[b][0], places[b][1], whole(forms[0])[1], True, False)
            product = wide(first @ second.T)
            found[starts[a] : starts[a + 1], starts[b] : starts[b + 1]] = product
            found[starts[b] : starts[b + 1], starts[a] : starts[a + 1]] = product.T
    return found


def _inside(form: Shares) -> Shares:
    """A relocated gradient has the inner products of what was seen."""
    return form.inner if isinstance(form, Relocated) else form


def _apart(forms: Sequence[Shares]) -> bool:
    """Whether several uses saw different numbers of a parameter, so that their gradients are orthogonal."""
    seen = [form for form in forms if isinstance(form, Relocated)]
    if len(seen) != len(forms):
        return False
    counts = torch.zeros(math.prod(forms[0].shape), dtype=torch.int8, device=seen[0].places.device)
    for form in seen:
        counts[form.places] += 1
    return int(counts.max()) <= 1


def _added(forms: Sequence[Shares], examples: slice, rows: slice, ordered: bool, apart: bool) -> Tensor:
    """The sum of several uses' gradients; `apart` from the scratch memory, which the next block overwrites."""
    part = forms[0].block(examples, rows, ordered=ordered)
    if len(forms) == 1:
        return part.clone() if apart else part
    part = part.clone()
    for form in forms[1:]:
        part += form.block(examples, rows, ordered=ordered)
    return part


def coordinates(forms: Sequence[Shares], index: Tensor) -> Tensor:
    """Some coordinates of all examples' gradients, added up over the uses, (n, k)."""
    found = forms[0].take(index)
    for form in forms[1:]:
        found = found + form.take(index)
    return found


@dataclass(frozen=True)
class Moments:
    """Means over examples, and sums of squared deviations from them.

    Attributes:
        count: How many examples.
        means: (k,).
        squares: (k,).
    """

    count: int
    means: Tensor
    squares: Tensor

    @staticmethod
    def of(rows: Tensor) -> Moments:
        """Those of some rows, (n, k)."""
        means = rows.mean(0)
        squares = (rows - means).square_().sum(0)
        largest = float(squares.max()) if squares.numel() else 1.0
        if rows.dtype != torch.float64 and not 1e-25 < largest < math.inf:  # squares leave the range of the type
            return Moments.of(wide(rows))
        return Moments(len(rows), means, squares)

    def with_(self, other: Moments) -> Moments:
        """Those of both groups of examples together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        count = self.count + other.count
        gap = wide(other.means) - wide(self.means)
        means = wide(self.means) + gap * (other.count / count)
        squares = wide(self.squares) + wide(other.squares) + gap.square() * (self.count * other.count / count)
        return Moments(count, means, squares)


def moments(forms: Sequence[Shares], index: Tensor | None, budget: int) -> Moments:
    """The moments of some coordinates, or of all, over one group of examples."""
    if index is not None:
        form = forms[0]
        quick = _sampled(form, index) if len(forms) == 1 and isinstance(form, Outer) and form.light else None
        return Moments.of(coordinates(forms, index)) if quick is None else quick
    found: list[Moments] = []
    pieces = chunks(forms, budget)
    for examples, rows in pieces:
        part = Moments.of(_added(forms, examples, rows, True, False))
        if examples.stop - examples.start < forms[0].examples and found:
            part = found.pop().with_(part)
        found.append(part)
    return _joined(found)


def _sampled(form: Outer, index: Tensor) -> Moments | None:
    """The moments from sums of squares; None where squares leave the range of the type, or a device cannot do it.

    Where nearly all of a square is that of the mean, the variance is taken from the deviations themselves.
    """
    try:
        sums, squares = form.sums(index)
    except RuntimeError:
        return None
    largest = float(squares.max()) if squares.numel() else 1.0
    if not 1e-25 < largest < 1e30:
        return None
    means = sums / form.examples
    deviations = squares - means * sums
    fine = torch.finfo(sums.dtype).eps ** 0.375
    lost = (deviations < squares * fine).nonzero().reshape(-1)
    if lost.numel():
        exact = Moments.of(form.take(index[lost]))
        means[lost], deviations[lost] = exact.means.to(means.dtype), exact.squares.to(means.dtype)
    return Moments(form.examples, means, deviations)


def _joined(parts: Sequence[Moments]) -> Moments:
    """Moments of different coordinates side by side."""
    if len(parts) == 1:
        return parts[0]
    return Moments(parts[0].count, torch.cat([p.means for p in parts]), torch.cat([p.squares for p in parts]))
