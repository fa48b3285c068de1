"""What a probe found about the examples' gradients, put together and compared with the gradients themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradmon._errors import Unavailable
from gradmon._parameters import Weights
from gradmon._tensors import wide
from gradmon.per_example.groups import Group, owners_of
from gradmon.per_example.products import Moments

_TOGETHER = 8
"""How many parameters' inner products are added in their own type before they are added to the others in float64."""


@dataclass(frozen=True)
class PerExampleResult:
    """The examples' gradients, as far as they were wanted.

    Attributes:
        examples: Their number B.
        gram: ``h_i . h_j``, (B, B), float64, reweighted under a mask; None if it was not wanted.
        rows: The looked-at coordinates, (B, k); None if they were not wanted.
        means: Their means, (k,), float64; None if moments were not wanted.
        variances: Their unbiased variances, (k,), float64; NaN for a batch of one.
        seen: Which of them are not zero for all examples, (k,), bool.
        epsilon: The relative rounding error of one number in the passes.
        resolution: The relative rounding error of an inner product of two gradients of norm 1.
        missing: Why there are no means and variances, although they were wanted.
    """

    examples: int
    gram: Tensor | None
    rows: Tensor | None
    means: Tensor | None
    variances: Tensor | None
    seen: Tensor | None
    epsilon: float
    resolution: float
    missing: str | None = None


class Collected:
    """What has been found so far, by parameter and group of examples, at the scale of the gradients that arrived.

    Args:
        weights: The layout of `w`, and the coordinates that are looked at.
        sampled: The same for moments.
    """

    def __init__(self, weights: Weights, sampled: Weights) -> None:
        self._weights, self._sampled = weights, sampled
        self._groups: dict[Group, None] = {}
        self._products: dict[tuple[Group, Group], Tensor] = {}
        self._rows: dict[int, dict[Group, Tensor]] = {}
        self._moments: dict[int, Moments] = {}
        self._made: dict[int, set[int]] = {}
        self.shares: dict[int, Tensor] = {}
        self._ways: dict[int, dict[str, None]] = {}
        self._partial: dict[tuple[Group, Group], tuple[Tensor, int]] = {}
        self._sent: dict[tuple[int, int], tuple[Tensor, Tensor | float]] = {}
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor | float]] = {}
        self._received: dict[tuple[int, int], tuple[Tensor | float, Tensor | float, Tensor | float]] = {}
        self.epsilon = 0.0
        self.work_epsilon = 0.0

    def noted(self, arrived: Sequence[Tensor | None], coarsest: torch.dtype) -> None:
        """Note the types in which gradients arrive and products are made of them."""
        for gradient in arrived:
            if gradient is not None:
                self.epsilon = max(self.epsilon, _epsilon(gradient.dtype))
                self.work_epsilon = max(self.work_epsilon, _epsilon(torch.promote_types(gradient.dtype, coarsest)))

    def join(self, group: Group) -> None:
        """Count the examples of a forward pass."""
        self._groups[group] = None

    @property
    def groups(self) -> Collection[Group]:
        """The examples of the forward passes of which gradients arrived."""
        return self._groups

    def join_missing(self, group: Group) -> None:
        """Count the examples of a forward pass of whose uses none had a gradient."""
        if not self._groups:
            self.join(group)

    def cover(self, position: int, way: str, task: int) -> None:
        """Note by which way the gradients of a parameter were had, in which backward pass."""
        self._ways.setdefault(position, {})[way] = None
        self._made.setdefault(position, set()).add(task)

    def coverage(self) -> dict[str, str]:
        """By which way each parameter is covered: ``"linear"``, ``"replay"``, ``"repeat"``, ..., or ``"unused"``."""
        names = self._weights.names
        return {name: " + ".join(self._ways.get(at, {})) or "unused" for at, name in enumerate(names)}

    def add_products(self, position: int, groups: Sequence[Group], product: Tensor) -> None:
        """Add the inner products of one parameter's gradients, (N, N) for the examples of some groups."""
        factor = self._factor(position)
        if len(groups) == 1:
            self._add_block((groups[0], groups[0]), product, factor)
            self._add_sent((position, groups[0].task), product.sum(), product.trace())
            return
        sizes = [group.examples for group in groups]
        for a, own in zip(groups, torch.split(product, sizes), strict=True):
            for b, block in zip(groups, torch.split(own, sizes, dim=1), strict=True):
                self._add_block((a, b), block, factor)
                if a.task == b.task:
                    self._add_sent((position, a.task), block.sum(), block.trace() if a is b else 0.0)

    def _add_sent(self, key: tuple[int, int], size: Tensor, trace: Tensor | float) -> None:
        """Note the squared norm of a sum of gradients, and the sum of their squared norms, for comparison."""
        before = self._sent.get(key)
        self._sent[key] = (size, trace) if before is None else (before[0] + size, before[1] + trace)

    def _add_block(self, pair: tuple[Group, Group], block: Tensor, factor: float) -> None:
        """Add inner products: a few in their own type, which is several times faster, and these in float64."""
        partial, count = self._partial.get(pair, (None, 0))
        if partial is None:
            partial = block if factor == 1.0 else block * factor
        else:
            partial = torch.add(partial, block, alpha=factor)
        self._partial[pair] = partial, count + 1
        if count + 1 == _TOGETHER:
            self._add_partial(pair)

    def _add_partial(self, pair: tuple[Group, Group]) -> None:
        partial = wide(self._partial.pop(pair)[0])
        total = self._products.get(pair)
        self._products[pair] = partial if total is None else partial + total

    def _factor(self, position: int) -> float:
        """How much a looked-at coordinate of a parameter counts in inner products."""
        picks = self._weights.picks
        return 1.0 if picks is None else self._weights.sizes[position] / max(1, picks[position].numel())

    def clear(self) -> None:
        """Forget everything: the gradients were thrown away."""
        for table in (self._groups, self._rows, self._moments, self._ways, self._sums, self._received, self._made,
                      self.shares):  # fmt: skip
            table.clear()
        self.clear_products()

    def received(self, task: int) -> list[int]:
        """The positions of the parameters that a backward pass sent a gradient."""
        return [position for position, sent_by in self._received if sent_by == task]

    def clear_products(self) -> None:
        """Forget the inner products, because they are going to be added anew."""
        self._products.clear()
        self._partial.clear()
        self._sent.clear()

    def add_rows(self, position: int, group: Group, rows: Tensor) -> None:
        """Add the looked-at coordinates of one parameter's gradients, (n, k)."""
        self._rows.setdefault(position, {})[group] = rows
        self._sum(position, group.task, rows.sum(0), _square(rows.reshape(-1)))

    def add_moments(self, position: int, group: Group, found: Moments) -> None:
        """Add the moments of one parameter's gradients."""
        before = self._moments.get(position)
        self._moments[position] = found if before is None else before.with_(found)
        squares = wide(found.squares).sum() + wide(found.means).square().sum() * found.count
        self._sum(position, group.task, found.means * found.count, squares)

    def add_share(self, position: int, share: Tensor) -> None:
        """Add one parameter's whole gradient of the example that is looked at."""
        self.shares[position] = share

    def _reached_by_rows(self) -> Iterable[tuple[int, int]]:
        """The parameters, and the backward passes, from which examples' gradients were made."""
        return ((position, task) for position, tasks in self._made.items() for task in tasks)

    def _sum(self, position: int, task: int, total: Tensor, squares: Tensor | float) -> None:
        """Add a sum of gradients, and the sum of their squared norms, for comparison."""
        before = self._sums.get((position, task))
        self._sums[position, task] = (total, squares) if before is None else (before[0] + total, before[1] + squares)

    def add_gradient(self, position: int, task: int, gradient: Tensor) -> None:
        """Note what a parameter was sent as a whole by one backward pass."""
        self.epsilon = max(self.epsilon, _epsilon(gradient.dtype))
        flat = gradient.reshape(-1)
        seen = sampled = size = _square(flat)
        if self._weights.picks is not None:
            seen = _square(flat.index_select(0, self._weights.picks[position]))
        if self._sampled is self._weights:
            sampled = seen
        elif self._sampled.picks is not None:
            sampled = _square(flat.index_select(0, self._sampled.picks[position]))
        self._received[position, task] = size, seen, sampled

    def check(self) -> None:
        """Make sure that no gradient took a way that was not seen: all shares together are what was sent.

        Raises:
            Unavailable: They are not, for some parameter.
        """
        received = list(self._received.items())
        for (position, task), _ in received:
            if task not in self._made.get(position, ()):
                name = self._weights.names[position]
                raise Unavailable(f"no call is seen that uses `{name}`, although the loss depends on it")
        for position, task in {*self._reached_by_rows()}:
            if (position, task) not in self._received:
                raise Unavailable(f"`{self._weights.names[position]}` was sent no gradient")
        flat = _read([size for _, sizes in received for size in sizes])
        table = [flat[at : at + 3] for at in range(0, len(flat), 3)]
        everything = sum(size for size, _, _ in table)
        if not math.isfinite(everything):
            raise Unavailable("non-finite gradient")
        added = zip(
            _read(_square(total) for total, _ in self._sums.values()),
            _read(squares for _, squares in self._sums.values()),
            strict=True,
        )
        sums = dict(zip(self._sums, added, strict=True))
        traces = zip(
            _read(size for size, _ in self._sent.values()), _read(t for _, t in self._sent.values()), strict=True
        )
        sent = dict(zip(self._sent, traces, strict=True))
        counts: dict[int, int] = {}
        for group in self._groups:
            counts[group.task] = counts.get(group.task, 0) + group.examples
        fine = max(self.epsilon, self.work_epsilon)
        tolerance = 4 * max(16 * self.epsilon, self.work_epsilon**0.5)
        for (key, _), (_, seen, sampled) in zip(received, table, strict=True):
            # A squared norm from inner products has their rounding errors, that of a sum has the squares of its own.
            looked = (sums.get(key), sampled, (64 * fine) ** 2), (sent.get(key), seen, 64 * fine)
            for found, expected, error in looked:
                if found is None:
                    continue
                size, trace = found
                rounding = error * counts.get(key[1], 0) * trace + (64 * fine) ** 2 * everything
                if not abs(size - expected) <= tolerance * max(size, expected) + rounding:
                    name = self._weights.names[key[0]]
                    raise Unavailable(f"the examples' gradients of `{name}` do not add up to its batch gradient")

    def result(self, counts: Collection[int], *, gram: bool, moments: bool, rows: bool) -> PerExampleResult:
        """Everything put together, at the scale of the shares: their mean is the batch gradient.

        Args:
            counts: The number of examples of the batch, if it is known (or what it may be); it tells whether several
                forward passes before one backward pass saw the same examples.
            gram: Whether inner products are wanted.
            moments: Whether means and variances are wanted.
            rows: Whether the coordinates are wanted.

        Raises:
            Unavailable: Something is not finite, does not add up, or the passes do not fit the batch.
        """
        self.check()
        groups = sorted(self._groups, key=lambda group: group.number)
        if not groups:
            raise Unavailable("no backward pass through the model was seen")
        owner, examples = owners_of(groups, counts, self._reached())
        weights = self._weights
        matrix: Tensor | None = None
        if gram:
            matrix = self._folded(groups, owner, examples)
            matrix = (matrix + matrix.T).mul_(examples**2 / 2)
        means: Tensor | None = None
        squares: Tensor | None = None
        missing: str | None = None
        if moments:
            try:
                pairs = [self._pair(position, groups, owner, examples) for position in range(len(weights.sizes))]
                means = wide(torch.cat([pair.means for pair in pairs])).mul_(examples)
                squares = wide(torch.cat([pair.squares for pair in pairs]))
            except Unavailable as error:  # which says nothing against inner products and rows
                if not gram and not rows:
                    raise
                missing = error.reason
        kept: Tensor | None = None
        if rows:
            held = _held(weights)
            parts = [
                part if (part := self._joined(position, groups, owner, examples, k)) is not None
                else torch.zeros(examples, k) for position, k in enumerate(held)
            ]  # fmt: skip
            kept = torch.cat([part.to(weights.device, weights.dtype) for part in parts], dim=1) * examples
        if any(t is not None and not math.isfinite(float(t.sum())) for t in (matrix, means, squares, kept)):
            raise Unavailable("non-finite gradient")
        return PerExampleResult(
            examples=examples,
            gram=matrix,
            rows=kept,
            means=means,
            # 0 / 0 for a batch of one
            variances=None
            if squares is None
            else squares * (examples**2) / (examples - 1 if examples > 1 else math.nan),
            seen=None if means is None or squares is None else (squares > 0) | (means != 0),
            epsilon=max(self.epsilon, weights.epsilon),
            resolution=self.work_epsilon,
            missing=missing,
        )

    def _reached(self) -> dict[int, set[int]]:
        """The positions of the parameters that each backward pass reached."""
        found: dict[int, set[int]] = {}
        for position, task in self._received:
            found.setdefault(task, set()).add(position)
        return found

    def _pair(self, position: int, groups: Sequence[Group], owner: Tensor, examples: int) -> Moments:
        """The moments of one parameter's gradients; zeros where none arrived."""
        k = _held(self._sampled)[position]
        rows = self._joined(position, groups, owner, examples, k)
        found = self._moments.get(position) if rows is None else Moments.of(rows)
        if found is None:
            zeros = torch.zeros(
                k, dtype=torch.float64, device=wide(self._weights.parameters[position].detach().reshape(-1)[:0]).device
            )
            return Moments(examples, zeros, zeros)
        # Examples of whose passes nothing arrived have zeros.
        missing = examples - found.count
        if missing < 0 or (rows is not None and position in self._moments):
            raise Unavailable("several backward passes of the same examples leave no mean and variance of coordinates")
        zeros = torch.zeros_like(found.means)
        return found if missing == 0 else found.with_(Moments(missing, zeros, zeros))

    def _joined(self, position: int, groups: Sequence[Group], owner: Tensor, examples: int, k: int) -> Tensor | None:
        """The coordinates of one parameter's gradients, (B, k); None where none are held."""
        held = self._rows.get(position)
        if held is None:
            return None
        like = next(iter(held.values()))
        if len(groups) == 1:
            return like
        parts = [held[group] if group in held else like.new_zeros(group.examples, k) for group in groups]
        return like.new_zeros(examples, k).index_add_(0, owner.to(like.device), torch.cat(parts))

    def _folded(self, groups: Sequence[Group], owner: Tensor, examples: int) -> Tensor:
        """The inner products of the batch's examples from those of the groups'."""
        for pair in list(self._partial):
            self._add_partial(pair)
        if len(groups) == 1 and examples == groups[0].examples:
            found = self._products.get((groups[0], groups[0]))
            return torch.zeros(examples, examples, dtype=torch.float64, device=owner.device) if found is None else found
        rows = [
            torch.cat(
                [
                    self._products.get(
                        (a, b), torch.zeros(a.examples, b.examples, dtype=torch.float64, device=owner.device)
                    )
                    for b in groups
                ],
                dim=1,
            )
            for a in groups
        ]
        whole = torch.cat(rows)
        if examples == len(whole):
            return whole
        half = whole.new_zeros(examples, len(whole)).index_add_(0, owner, whole)
        return whole.new_zeros(examples, examples).index_add_(1, owner, half)


@functools.cache
def _epsilon(dtype: torch.dtype) -> float:
    """The relative rounding error of a type."""
    return torch.finfo(dtype).eps


def _read(scalars: Iterable[Any]) -> list[float]:
    """Some scalars as numbers, read from a device all at once."""
    found = list(scalars)
    if all(not isinstance(value, Tensor) or value.device.type == "cpu" for value in found):
        return [float(value) for value in found]
    device = next(value.device for value in found if isinstance(value, Tensor) and value.device.type != "cpu")
    stacked: Any = torch.stack([torch.as_tensor(value).to(device, torch.float64) for value in found])
    return stacked.tolist()


def _held(weights: Weights) -> list[int]:
    """How many coordinates of each parameter are looked at."""
    return weights.sizes if weights.picks is None else [pick.numel() for pick in weights.picks]


def _square(vector: Tensor) -> Tensor | float:
    """The squared norm, float64; without overflow on the way."""
    if vector.device.type == "cpu" and vector.dtype == torch.float32:
        size = float(torch.dot(vector, vector))
        if 1e-25 < size < 1e30:  # much faster, where squares stay within the range of the type
            return size
    norm = cast("Any", torch.linalg).vector_norm
    if vector.device.type == "mps":
        return wide(norm(vector.float())).square()
    return norm(vector, dtype=torch.float64).square()
