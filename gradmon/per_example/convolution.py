"""Convolutions, and their transposes: per-example weight gradients as products with windows of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradmon._errors import Unavailable
from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Outer, Shares, sparse, taken
from gradmon.per_example.scratch import Scratch, sampled

_CACHED, _LARGE = 1 << 19, 1 << 26
"""How many numbers of windows to hold at a time, where a cache counts and where it does not."""


@dataclass(frozen=True)
class Windows:
    """How positions of one tensor meet windows of the other.

    Attributes:
        kernel: The size of a window.
        stride: The distance of neighbouring windows.
        before: The zeros before the first entry, along each dimension.
        dilation: The distance of the entries within a window.
        groups: Into how many independent groups the channels fall.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def of(self, values: Tensor, positions: Sequence[int]) -> Tensor:
        """The windows of some examples at each position, (m, groups, positions, kernel * channels of a group).

        Args:
            values: (m, channels, *sizes).
            positions: How many windows there are along each dimension.
        """
        reach = [(p - 1) * s + (k - 1) * d + 1 for p, s, k, d in
                 zip(positions, self.stride, self.kernel, self.dilation, strict=True)]  # fmt: skip
        edges = [edge for r, b, size in reversed(list(zip(reach, self.before, values.shape[2:], strict=True)))
                 for edge in (b, r - b - size)]  # fmt: skip
        # Channels last, so that a window is gathered in whole lines.
        padded = functional.pad(values, edges).movedim(1, -1).contiguous()
        strides, count, channels = padded.stride(), len(positions), values.shape[1]
        shape = (len(values), *positions, *self.kernel, channels)
        moved = [strides[0], *(strides[1 + i] * self.stride[i] for i in range(count)),
                 *(strides[1 + i] * self.dilation[i] for i in range(count)), 1]  # fmt: skip
        windows = padded.as_strided(shape, moved)
        per_group = channels // self.groups
        cells = math.prod(self.kernel)
        windows = windows.reshape(len(values), math.prod(positions), cells, self.groups, per_group)
        return windows.permute(0, 3, 1, 2, 4).reshape(len(values), self.groups, math.prod(positions), cells * per_group)


class Convolution:
    """``h_i[r, c, k] = sum_positions left_i[r, position] right_i[c, position * stride + k * dilation - before]``.

    Args:
        left: (n, m, R, *positions), m planes for each example.
        right: (n, m, C, *sizes).
        windows: How they meet.
        scratch: Makes room for parts of (n, R, C / groups * kernel).
    """

    sliceable = True

    def __init__(self, left: Tensor, right: Tensor, windows: Windows, scratch: Scratch) -> None:
        self._left, self._right, self._windows, self._scratch = left, right, windows, scratch
        self.examples = left.shape[0]
        self.shape = torch.Size((left.shape[2], right.shape[2] // windows.groups, *windows.kernel))
        self.kept = [left, right]

    def block(self, examples: slice, rows: slice, *, ordered: bool = True) -> Tensor:
        """The gradients of some examples in some rows, (n', rows * rest)."""
        made = self._windowed(examples, rows)
        if not ordered:
            return made.flatten(1)
        apart = made.reshape(len(made), made.shape[1], math.prod(self.shape[2:]), self.shape[1])
        return apart.transpose(2, 3).flatten(1)

    def _windowed(self, examples: slice, rows: slice) -> Tensor:
        """The gradients with the columns in the order of the windows: first the kernel, then the channels."""
        left, right = self._left[examples], self._right[examples]
        groups = self._windows.groups
        height = self.shape[0] // groups
        first, last = rows.start // height, -(-rows.stop // height)
        positions, planes = left.shape[3:], left.shape[1]
        columns = self.shape[1] * math.prod(self.shape[2:])
        out = self._scratch.get((len(left), (last - first) * height, columns), left)
        # A few examples at a time: their windows stay in the cache.
        most = _LARGE if left.is_cuda else _CACHED
        step = max(1, most // max(1, planes * math.prod(positions) * columns * (last - first)))
        per_group = slice(first * self.shape[1], last * self.shape[1])
        windows = replace(self._windows, groups=last - first)
        for start in range(0, len(left), step):
            some = slice(start, min(start + step, len(left)))
            count = some.stop - some.start
            seen = windows.of(right[some, :, per_group].flatten(0, 1), positions)
            seen = seen.reshape(count, planes, *seen.shape[1:]).transpose(1, 2).flatten(2, 3)
            sent = left[some, :, first * height : last * height]
            sent = sent.reshape(count, planes, last - first, height, -1).permute(0, 2, 3, 1, 4).flatten(3)
            # (count, groups, height, planes * T) times (count, groups, planes * T, columns)
            target = out[some].view(count * (last - first), height, columns)
            torch.bmm(sent.flatten(0, 1), seen.flatten(0, 1), out=target)
        return out[:, rows.start - first * height : rows.stop - first * height]

    def take(self, index: Tensor) -> Tensor:
        """Some coordinates, (n, k)."""
        # The columns are left in the order of the windows: it is cheaper to look elsewhere than to reorder them.
        places = self._scratch.places(index, lambda: self._places(index))
        if self._windows.groups > 1 or not sparse(self, index):
            return taken(self, index, self._scratch.budget, places)
        pattern = self._scratch.pattern(places, self.shape[0], math.prod(self.shape[1:]), self._left.dtype)
        return torch.stack(
            [
                sampled(pattern, left.transpose(0, 1).flatten(1), self._windows.of(right, left.shape[2:]).flatten(0, 2))
                for left, right in zip(self._left, self._right, strict=True)
            ]
        )

    def _places(self, index: Tensor) -> Tensor:
        cells, channels = math.prod(self.shape[2:]), self.shape[1]
        columns = index % (cells * channels)
        return index - columns + columns % cells * channels + torch.div(columns, cells, rounding_mode="floor")

    def gram(self) -> Tensor | None:
        """None: there is no shorter way."""
        return None

    def scaled(self, factor: float) -> Convolution:
        """The gradients times a factor."""
        return Convolution(self._left * factor, self._right, self._windows, self._scratch)


def convolution(part: Cut) -> list[Shares | Tensor | None] | None:
    """``conv1d``, ``conv2d``, ``conv3d``: the gradient that arrived meets windows of the input."""
    given = part.arguments("input", "weight", "bias", "stride", "padding", "dilation", "groups",
                           stride=1, padding=0, dilation=1, groups=1)  # fmt: skip
    planes = _planes(part, given)
    if planes is None:
        return None
    x, flow = planes
    count = x.ndim - 3
    kernel = tuple(given["weight"].shape[2:])
    stride, dilation = _each(given["stride"], count), _each(given["dilation"], count)
    if given["padding"] == "same":
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        before = (0,) * count if given["padding"] == "valid" else _each(given["padding"], count)
    windows = Windows(kernel, stride, before, dilation, int(given["groups"]))
    point = math.prod(kernel) == 1 and not any(before) and set(stride) == {1} and windows.groups == 1
    return _forms(part, given, flow, _pointwise(flow, x, part, given) if point else None, flow, x, windows)


def transposed(part: Cut) -> list[Shares | Tensor | None] | None:
    """``conv_transpose1d``, ``2d``, ``3d``: the input meets windows of the gradient that arrived."""
    given = part.arguments("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
                           stride=1, padding=0, groups=1, dilation=1)  # fmt: skip
    planes = _planes(part, given)
    if planes is None:
        return None
    x, flow = planes
    count = x.ndim - 3
    windows = Windows(
        tuple(given["weight"].shape[2:]),
        _each(given["stride"], count),
        _each(given["padding"], count),
        _each(given["dilation"], count),
        int(given["groups"]),
    )
    return _forms(part, given, flow, None, x, flow, windows)


def _planes(part: Cut, given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The input and the gradient that arrived, (n, m, channels, *sizes); None for calls without a batch dimension."""
    x, weight = given["input"], given["weight"]
    if part.is_parameter(x) or part.flow_dim != 0 or part.flow.ndim != weight.ndim + 1:
        return None
    if not part.is_parameter(weight):  # only the bias is trained
        return part.flow, part.flow
    return None if part.dim(x) != 0 else (part.rows(x), part.flow)


def _forms(
    part: Cut,
    given: dict[str, Any],
    flow: Tensor,
    ready: Shares | None,
    left: Tensor,
    right: Tensor,
    windows: Windows,
) -> list[Shares | Tensor | None]:
    found: list[Shares | Tensor | None] = []
    for source in part.parameters:
        if source is given["weight"]:
            found.append(ready or Convolution(left, right, windows, part.scratch))
        elif source is given["bias"]:
            found.append(flow.sum((1, *range(3, flow.ndim))))
        else:
            raise Unavailable("a convolution with a parameter in an unknown place")
    return found


def _pointwise(left: Tensor, right: Tensor, part: Cut, given: dict[str, Any]) -> Shares | None:
    """A convolution with a kernel of one entry is a matrix product over the positions."""
    if not part.is_parameter(given["weight"]):
        return None
    flat = [values.flatten(3).transpose(2, 3).flatten(1, 2) for values in (left, right)]
    return Outer(flat[0], flat[1], part.scratch, given["weight"].shape)


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
