"""The slopes of secants, worked out while what they are made of is in the processor's cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmon_integrations.workloads.average_gradient.calls import Call
from gradmon_integrations.workloads.average_gradient.slopes import NEAR, secant
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
        self._waiting: dict[Any, list[_Waiting]] = {}
        self._rooms: dict[Any, tuple[Tensor, Tensor]] = {}
        self._intact = True

    def clear(self) -> None:
        """Forget what waits, such as that of a forward pass that failed."""
        self._waiting, self._intact = {}, True

    def take(self, call: Call, x_after: Tensor, y_after: Tensor) -> bool:
        """Take up the input and output of a call, until there are enough of them.

        Args:
            call: The call, of which those before the step are known.
            x_after: Its input after the step.
            y_after: Its output after the step.

        Returns:
            Whether they were taken: they are not where they do not lie in order, cannot wait, or want another slope.
        """
        if torch.is_grad_enabled():  # by the closure
            with torch.no_grad():
                return self.take(call, x_after, y_after)
        x, y, size = call.x, call.y, x_after.numel()
        if x is None or y is None or call.form.slope is not secant or not size:
            return False
        if y_after.is_inference():  # nothing tells whether somebody writes to it
            return False
        if not (x_after.is_contiguous() and y_after.is_contiguous() and x.is_contiguous() and y.is_contiguous()):
            return False
        dtype = x_after.dtype
        if not (dtype is y_after.dtype and dtype is x.dtype and dtype is y.dtype):
            return False
        if size > SMALL:
            if x_after.device.type != "cpu":
                return False
            self._large(call, x, y, x_after, y_after)
            return True
        group = self._waiting.setdefault((x_after.shape, dtype, x_after.device), [])
        group.append(_Waiting(call, x, y, x_after, y_after, (x_after._version, y_after._version)))
        if len(group) * size >= _MOST:
            self._work_out(group)
        return True

    def finish(self) -> bool:
        """Work out what is left; whether nothing that waited was written to, and so all slopes are what they are."""
        for group in self._waiting.values():
            if group:
                self._work_out(group)
        intact, self._intact = self._intact, True
        return intact

    def _work_out(self, group: list[_Waiting]) -> None:
        self._intact = self._intact and all(waiting.intact for waiting in group)
        if self._intact:
            _together(group)
        group.clear()

    def _large(self, call: Call, x: Tensor, y: Tensor, x_after: Tensor, y_after: Tensor) -> None:
        # Later iterations write where the first one did: memory that is given back is slow to get again.
        if call.slope is None or call.slope.dtype is not x.dtype or not call.slope.is_contiguous():
            call.slope = torch.empty_like(x)
        tensors = x, y, x_after, y_after, call.slope
        if x.numel() <= _MOST:
            call.near = self._part(*tensors, call.room)
            call.room = call.room if call.near is None else call.near
            return
        parts = list(zip(*(tensor.view(-1).split(_MOST) for tensor in tensors), strict=True))
        near, call.near = [self._part(a, b, c, d, e, None) for a, b, c, d, e in parts], None
        if any(part is not None for part in near):
            filled = [torch.zeros_like(part[0]) if one is None else one for one, part in zip(near, parts, strict=True)]
            call.near = torch.cat(filled).view(x.shape)

    def _part(
        self, x: Tensor, y: Tensor, x_after: Tensor, y_after: Tensor, slope: Tensor, room: Tensor | None
    ) -> Tensor | None:
        """Write slopes; 1 where the derivative stands for itself, 0 elsewhere, None for 0 everywhere."""
        kind = x.shape, x.dtype
        if kind not in self._rooms:
            if len(self._rooms) == _ROOMS:
                self._rooms.clear()
            self._rooms[kind] = torch.empty_like(x), torch.empty_like(x)
        moved, distances = self._rooms[kind]
        torch.sub(x_after, x, out=moved)
        torch.abs(moved, out=distances)
        near = None
        if not float(distances.min()) > NEAR:
            near = torch.le(distances, NEAR, out=torch.empty_like(x) if room is None else room)
            moved.add_(near)
        torch.sub(y_after, y, out=slope).div_(moved)
        return near


class _Waiting(NamedTuple):
    """A call, and its input and output before and after the step."""

    call: Call
    x: Tensor
    y: Tensor
    x_after: Tensor
    y_after: Tensor
    versions: tuple[int, int]

    @property
    def intact(self) -> bool:
        """Whether nobody has written to those after the step."""
        return (self.x_after._version, self.y_after._version) == self.versions


def _together(group: list[_Waiting]) -> None:
    calls = [waiting.call for waiting in group]
    moved = torch.stack([waiting.x_after for waiting in group])
    moved.sub_(torch.stack([waiting.x for waiting in group]))
    slopes = torch.stack([waiting.y_after for waiting in group])
    slopes.sub_(torch.stack([waiting.y for waiting in group]))
    distances = moved.abs()
    least = [0.0] * len(calls)
    # On other devices a look at numbers would have to wait for all that was started before.
    if moved.device.type == "cpu":
        least = distances.view(len(calls), -1).amin(1).tolist()
    rows = [row for row, distance in enumerate(least) if not distance > NEAR]
    if rows:
        moved.add_(torch.le(distances, NEAR, out=distances))
    for call, slope in zip(calls, slopes.div_(moved).unbind(), strict=True):
        call.slope, call.near = slope, None
    for row in rows:
        calls[row].near = distances[row]
