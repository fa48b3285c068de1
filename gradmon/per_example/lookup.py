"""Rows of a table that are looked up by integers of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Lookup, Shares


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
                           "sparse", "per_sample_weights", "include_last_offset", "padding_idx", mode="mean")  # fmt: skip
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
