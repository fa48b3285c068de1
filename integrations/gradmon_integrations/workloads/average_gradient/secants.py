"""The slopes of secants, worked out while what they are made of is in the processor's cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gradmon_integrations.workloads.average_gradient.calls import Call
from gradmon_integrations.workloads.average_gradient.slopes import resting, secant
from gradmon_integrations.workloads.average_gradient.update import SMALL

_MOST = 1 << 16
"""So many elements are worked on at a time, and so many wait at most."""
_ROOMS = 8
"""So many shapes have rooms to work in."""


class Secants:
    """Works out the slopes of secants: those of small tensors of one shape together, those of large ones in parts.

    They are the same, bit by bit, as those that `Call.between` works out.
    """

    def __init__(self) -> None:
        self._waiting: dict[Any, _Group] = {}
        self._rooms: dict[Any, Tensor] = {}
        self._intact = True

    def clear(self) -> None:
        """Forget what waits, such as that of a forward pass that failed."""
        self._waiting, self._intact = {}, True

    def take(self, call: Call, x_after: Tensor, y_after: Tensor) -> bool:
        """Take up the input and output of a call, until there are enough of them.

        Args:
            call: The call, of which those before the step are known.
            x_after: Its input after the step, of the shape of that before.
            y_after: Its output after the step.

        Returns:
            Whether they were taken: they are not where they do not lie in order, cannot wait, or want another slope.
        """
        if call.form.slope is not secant or not x_after.is_contiguous():
            return False
        dtype = x_after.dtype
        kind = call.shape, dtype, x_after.device
        group = self._waiting.get(kind)
        if group is None:
            group = self._waiting[kind] = _Group(x_after.numel())
        if group.size > SMALL:
            return self._large(call, x_after, y_after)
        if y_after.dtype is not dtype or not group.size:
            return False
        try:
            group.versions += x_after._version, y_after._version
        except RuntimeError:  # a tensor of inference mode: nothing tells whether somebody writes to it
            return False
        group.after += x_after, y_after
        group.calls.append(call)
        if len(group.calls) == group.most:
            self._work_out(group)
        return True

    def finish(self) -> bool:
        """Work out what is left; whether nothing that waited was written to, and so all slopes are what they are."""
        for group in self._waiting.values():
            if group.calls:
                self._work_out(group)
        intact, self._intact = self._intact, True
        return intact

    def _work_out(self, group: _Group) -> None:
        self._intact = self._intact and [tensor._version for tensor in group.after] == group.versions
        if self._intact:
            with torch.no_grad():
                _together(group)
        group.clear()

    def _large(self, call: Call, x_after: Tensor, y_after: Tensor) -> bool:
        """Work out the slopes of a large tensor on the CPU, if everything lies in order; whether it did."""
        x, y = cast("Tensor", call.x), cast("Tensor", call.y)
        if not x_after.is_cpu or x_after.is_inference() or y_after.is_inference():
            return False
        if not (x.is_contiguous() and y.is_contiguous() and y_after.is_contiguous()):
            return False
        if not x_after.dtype is y_after.dtype is x.dtype is y.dtype:
            return False
        with torch.no_grad():
            call.slope = torch.empty_like(x)
            # Later iterations write where the first one did: memory that is given back is slow to get again.
            if call.near is None or call.near.dtype is not x.dtype or not call.near.is_contiguous():
                call.near = torch.empty_like(x)
            tensors = x, y, x_after, y_after, call.slope, call.near
            if x.numel() <= _MOST:
                self._part(*tensors)
            else:
                for part in zip(*(tensor.view(-1).split(_MOST) for tensor in tensors), strict=True):
                    self._part(*part)
        return True

    def _part(self, x: Tensor, y: Tensor, x_after: Tensor, y_after: Tensor, slope: Tensor, near: Tensor) -> None:
        """Write slopes, and where the derivative stands for itself."""
        kind = x.shape, x.dtype
        if kind not in self._rooms:
            if len(self._rooms) == _ROOMS:
                self._rooms.clear()
            self._rooms[kind] = torch.empty_like(x)
        moved = torch.sub(x_after, x, out=self._rooms[kind])
        moved.add_(resting(moved, out=near))
        torch.sub(y_after, y, out=slope).div_(moved)


class _Group:
    """Calls of one shape that wait, and their inputs and outputs in turn after the step.

    Args:
        size: Of how many elements each is.
    """

    __slots__ = ("after", "calls", "most", "size", "versions")

    def __init__(self, size: int) -> None:
        self.size, self.most = size, -(-_MOST // max(size, 1))
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self.calls: list[Call] = []
        self.after: list[Tensor] = []
        self.versions: list[int] = []


def _together(group: _Group) -> None:
    before = torch.stack([cast("Tensor", tensor) for call in group.calls for tensor in (call.x, call.y)])
    differences = torch.stack(group.after)
    if before.dtype is not differences.dtype:
        for call, x_after, y_after in zip(group.calls, group.after[::2], group.after[1::2], strict=True):
            call.between(x_after, y_after)
        return
    moved, slopes = differences.sub_(before).unflatten(0, (-1, 2)).unbind(1)
    near = resting(moved)
    slopes.div_(moved.add_(near))
    # On other devices a look at numbers would have to wait for all that was started before.
    found = near.view(len(near), -1).amax(1).tolist() if near.is_cpu else [1.0] * len(near)
    for row, (call, slope) in enumerate(zip(group.calls, slopes.unbind(), strict=True)):
        call.slope, call.near = slope, near[row] if found[row] else None
