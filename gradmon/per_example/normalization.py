"""Norms with a gain and an offset: what went in is normalised once more, and reduced with what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Shares


def layer_norm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``layer_norm(input, normalized_shape, weight, bias, eps)``."""
    given = part.arguments("input", "normalized_shape", "weight", "bias", "eps", eps=1e-5)
    shape = tuple(given["normalized_shape"])
    return _over_last(part, given, len(shape), lambda x: functional.layer_norm(x, shape, eps=given["eps"]))


def rms_norm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``rms_norm(input, normalized_shape, weight, eps)``."""
    given = part.arguments("input", "normalized_shape", "weight", "eps")
    shape = tuple(given["normalized_shape"])
    # The default is that of the type it was computed in, which may have been a coarser one.
    eps = torch.finfo(given["input"].dtype).eps if given["eps"] is None else given["eps"]
    return _over_last(part, given, len(shape), lambda x: functional.rms_norm(x, shape, eps=eps))


def group_norm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``group_norm(input, num_groups, weight, bias, eps)``."""
    given = part.arguments("input", "num_groups", "weight", "bias", "eps", eps=1e-5)
    return _over_channels(part, given, lambda x: functional.group_norm(x, given["num_groups"], eps=given["eps"]))


def instance_norm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)``."""
    given = part.arguments("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum",
                           "eps", use_input_stats=True, eps=1e-5)  # fmt: skip
    if given["use_input_stats"]:
        return _over_channels(part, given, lambda x: functional.instance_norm(x, eps=given["eps"]))
    return _over_channels(part, given, lambda x: _by_statistics(part, x, given))


def batch_norm(part: Cut) -> Sequence[Shares | Tensor | None] | None:
    """``batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)``.

    In train mode the statistics are those of the whole batch, and an example's share is what flows through its rows.
    """
    given = part.arguments("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
                           training=False, eps=1e-5)  # fmt: skip
    if given["training"]:
        return _over_channels(
            part, given, lambda x: functional.batch_norm(x, None, None, training=True, eps=given["eps"])
        )
    return _over_channels(part, given, lambda x: _by_statistics(part, x, given))


def _by_statistics(part: Cut, x: Tensor, given: dict[str, Any]) -> Tensor:
    mean, variance = (part.whole(given[name]) for name in ("running_mean", "running_var"))
    return functional.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=given["eps"])


def _over_last(
    part: Cut, given: dict[str, Any], count: int, normalize: Callable[[Tensor], Tensor]
) -> Sequence[Shares | Tensor | None] | None:
    """Gain and offset have the shape of the last `count` dimensions."""
    flow, dim = part.flow, part.flow_dim
    if dim is None or dim >= flow.ndim - 1 - count:
        return None
    return _reduced(part, given, flow, tuple(range(1, flow.ndim - count)), normalize)


def _over_channels(
    part: Cut, given: dict[str, Any], normalize: Callable[[Tensor], Tensor]
) -> Sequence[Shares | Tensor | None] | None:
    """Gain and offset have an entry for each channel, along the second dimension."""
    flow = part.flow
    if part.flow_dim == 1:
        return None
    return _reduced(part, given, flow, tuple(d for d in range(1, flow.ndim) if d != 2), normalize)


def _reduced(
    part: Cut, given: dict[str, Any], flow: Tensor, dims: tuple[int, ...], normalize: Callable[[Tensor], Tensor]
) -> Sequence[Shares | Tensor | None] | None:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if part.is_parameter(x):
        return None
    found: list[Shares | Tensor | None] = []
    for source in part.parameters:
        if source is bias:
            found.append(flow.sum(dims) if dims else flow)
        elif source is weight:
            product = flow * part.split(normalize(part.whole(x)))
            found.append(product.sum(dims) if dims else product)
        else:
            return None
    return found
