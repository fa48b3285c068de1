"""Rows of a table that are looked up by integers of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Shares
from gradmon.per_example.scratch import Scratch


class Lookup:
    """Rows of a table that were looked up: ``h_i[v] = sum_{t: ids_it = v} flow_it``.

    Args:
        ids: (n, T), int64.
        flow: (n, T, D).
        size: The number of rows of the table.
        scratch: Makes room for parts of (n, size, D).
    """

    sliceable = True

    def __init__(self, ids: Tensor, flow: Tensor, size: int, scratch: Scratch) -> None:
        self._ids, self._flow, self._scratch = ids, flow, scratch
        self.examples = ids.shape[0]
        self.shape = torch.Size((size, flow.shape[2]))
        self.kept = [ids, flow]

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * D)."""
        ids, flow = self._ids[examples], self._flow[examples]
        count, width = rows.stop - rows.start, flow.shape[2]
        found = self._scratch.get((len(ids) * count, width), flow).zero_()
        inside = (ids >= rows.start) & (ids < rows.stop)
        place = torch.arange(len(ids), device=ids.device)[:, None] * count + (ids - rows.start)
        found.index_add_(0, place[inside], flow[inside])
        return found.reshape(len(ids), -1)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sum for each pair of example and id that occurs, and both, ordered by id."""
        owner = torch.arange(self.examples, device=self._ids.device)[:, None].expand_as(self._ids)
        found: tuple[Tensor, Tensor] = cast("Any", torch).unique(self._ids * self.examples + owner, return_inverse=True)
        pairs, place = found
        sums = self._flow.new_zeros(pairs.numel(), self.shape[1])
        sums.index_add_(0, place.reshape(-1), self._flow.reshape(-1, self.shape[1]))
        return sums, pairs % self.examples, torch.div(pairs, self.examples, rounding_mode="floor")

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        sums, owner, ids = self._sums()
        width = self.shape[1]
        found = sums.new_zeros(self.examples, index.numel())
        # The picks are sorted: those in the row of one id lie together.
        starts = torch.searchsorted(index, ids * width)
        counts = torch.searchsorted(index, (ids + 1) * width) - starts
        pair = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        within = torch.arange(pair.numel(), device=ids.device) - (counts.cumsum(0) - counts)[pair]
        pick = starts[pair] + within
        found[owner[pair], pick] = sums[pair, index[pick] % width]
        return found

    def gram(self) -> Tensor | None:
        """Ids of a single example count on the diagonal only; the others' sums are laid side by side."""
        sums, owner, ids = self._sums()
        unique = cast("Any", torch).unique_consecutive
        runs: tuple[Tensor, Tensor, Tensor] = unique(ids, return_inverse=True, return_counts=True)
        _, place, holders = runs
        shared = holders[place] > 1
        alone = ~shared
        found = sums.new_zeros(self.examples, self.examples)
        found.diagonal().index_add_(0, owner[alone], sums[alone].square().sum(1))
        columns: Tensor = unique(place[shared], return_inverse=True)[1]
        sums, owner, width = sums[shared], owner[shared], self.shape[1]
        step = max(1, self._scratch.budget // max(1, self.examples * width))
        for start in range(0, int(columns[-1]) + 1 if columns.numel() else 0, step):
            inside = (columns >= start) & (columns < start + step)
            count = min(step, int(columns[-1]) + 1 - start)
            part = self._scratch.get((self.examples, count, width), sums).zero_()
            part[owner[inside], columns[inside] - start] = sums[inside]
            found += part.flatten(1) @ part.flatten(1).T
        return found

    def scaled(self, factor: float) -> Lookup:
        """The gradients times a factor."""
        return Lookup(self._ids, self._flow * factor, self.shape[0], self._scratch)


def embedding(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)``."""
    given = part.arguments("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    ids, weight, padding = given["input"], given["weight"], given["padding_idx"]
    if part.is_parameter(ids) or part.dim(ids) is None or part.dim(ids) != part.flow_dim:
        return None
    looked, flow = part.rows(ids).flatten(1), part.flow.flatten(1, -2)
    if given["scale_grad_by_freq"]:
        flow = flow / torch.bincount(looked.reshape(-1), minlength=len(weight))[looked][:, :, None]
    return [_table(part, looked, flow, weight, padding)]


def embedding_bag(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``embedding_bag`` of bags of equal size, (B, L), by sum or mean."""
    given = part.arguments("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode",
                           "sparse", "per_sample_weights", "include_last_offset", "padding_idx",
                           mode="mean")  # fmt: skip
    ids, weight, padding = given["input"], given["weight"], given["padding_idx"]
    factors = given["per_sample_weights"]
    if ids.ndim != 2 or given["mode"] not in ("sum", "mean") or given["scale_grad_by_freq"] or part.flow_dim != 0:
        return None
    if part.parameters[0] is not weight or len(part.parameters) != 1 or part.dim(ids) != 0:
        return None
    looked, flow = part.rows(ids), part.flow  # (n, m, L), (n, m, D)
    flow = flow[:, :, None, :].expand(*looked.shape, flow.shape[-1])
    if padding is not None:
        padding = padding % len(weight)
    if given["mode"] == "mean":
        counted = torch.ones_like(looked) if padding is None else (looked != padding).long()
        flow = flow / counted.sum(2, keepdim=True).clamp(min=1)[..., None]
    if factors is not None:
        flow = flow * part.rows(factors)[..., None]
    return [_table(part, looked.flatten(1), flow.flatten(1, 2), weight, padding)]


def _table(part: Cut, ids: Tensor, flow: Tensor, weight: Tensor, padding: int | None) -> Shares:
    if padding is not None:
        flow = flow.masked_fill((ids == padding % len(weight))[:, :, None], 0.0)
    return Lookup(ids, flow, len(weight), part.scratch)
