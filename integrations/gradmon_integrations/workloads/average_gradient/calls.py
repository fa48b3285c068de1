"""A call of a watched function, and what takes its derivative's place when the graph is run backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmon_integrations.workloads.average_gradient.midpoint import Midpoint
from gradmon_integrations.workloads.average_gradient.slopes import NEAR, Form, secant


class Call:
    """One call of a watched function.

    Attributes:
        form: What was called.
        shape: Of its input.
        options: Its other arguments, without tensors.
        weight: The weight of a linear function.
        lasting: Whether the weight is a parameter.
        x: Its input, as it was then; None where no slope is wanted.
        y: Its output, likewise.
        versions: Of the two, to see whether somebody wrote into them later.
        inner: The node that the gradient of x leaves.
        outer: The node that the gradient of y enters; the same one for a function with a node of its own.
        slope: What stands for the derivative; None while that does itself.
        near: 1 where the derivative stands for itself even so, 0 elsewhere; None for 0 everywhere.
        room: Where `near` may be written.
        received: The gradient of y, on its way from `outer` to `inner`.
        middle: For a linear function, its Jacobians at the midpoint, if those are wanted.
    """

    x: Tensor | None = None
    y: Tensor | None = None
    versions = (0, 0)
    inner: Any = None
    outer: Any = None
    middle: Midpoint | None = None
    slope: Tensor | None = None
    near: Tensor | None = None
    room: Tensor | None = None
    received: Tensor | None = None

    def __init__(self, form: Form, shape: torch.Size, options: tuple[Any, ...], weight: Tensor | None) -> None:
        self.form, self.shape, self.options, self.weight = form, shape, options, weight
        # The first question is far quicker than the second, and mostly settles it.
        self.lasting = type(weight) is nn.Parameter or (weight is not None and isinstance(weight, nn.Parameter))

    def keep(self, x: Tensor, y: Tensor) -> None:
        """Keep input and output."""
        # A leaf may be a parameter, which is about to have other values.
        self.x, self.y, self.versions = x.detach() if x.is_leaf else x, y, (x._version, y._version)

    @property
    def averaged(self) -> bool:
        """Whether something is put in the place of its derivative."""
        return self.inner is not None or self.middle is not None

    @property
    def written(self) -> bool:
        """Whether somebody has written into what was kept."""
        return self.x is not None and self.y is not None and (self.x._version, self.y._version) != self.versions

    def attach(self) -> None:
        """Put the slope in the derivative's place whenever the graph is run backwards from now on."""
        if self.middle is not None:
            self.middle.attach()
        elif self.inner is not None:
            self._attach()

    def _attach(self) -> None:
        if self.inner is self.outer:
            self.inner.register_hook(self._replace)
        else:
            self.outer.register_hook(self._receive)
            self.inner.register_hook(self._replace)

    def _receive(self, inputs: Any, outputs: Any) -> None:
        self.received = outputs[0]

    def _replace(self, inputs: Any, outputs: Any) -> Any:
        slope, near = self.slope, self.near
        arriving = outputs[0] if self.inner is self.outer else self.received
        if slope is None or arriving is None or inputs[0] is None:
            return None
        averaged = torch.mul(slope, arriving)
        # At weights 0 and 1 `lerp` returns its ends as they are.
        if near is not None:
            averaged.lerp_(inputs[0], near)
        return (averaged,)

    def between(self, x_after: Tensor, y_after: Tensor) -> None:
        """Note the slope from the input and output that were kept to those after the step."""
        x, y, slope = self.x, self.y, self.form.slope
        if x is None or y is None or slope is None:
            return
        # The closure may have gradients on.
        x, y, x_after, y_after = (tensor.detach() for tensor in (x, y, x_after, y_after))
        moved = torch.sub(x_after, x)
        self.near = _near(moved)
        if slope is secant:
            # The same numbers as `secant`, with one difference of the inputs for both purposes.
            self.slope = torch.sub(y_after, y).div_(moved if self.near is None else moved.add_(self.near))
        else:
            self.slope = slope(x, y, x_after, y_after).clone()
            if self.near is not None:
                self.slope.masked_fill_(self.near.bool(), 0)

    def release(self) -> None:
        """Let go of all tensors and nodes, which refer to each other in a circle."""
        self.x = self.y = self.slope = self.near = self.room = self.received = self.weight = None
        self.inner = self.outer = None
        if self.middle is not None:
            self.middle.release()
            self.middle = None


def _near(moved: Tensor) -> Tensor | None:
    """1 where inputs hardly move, 0 elsewhere; None for 0 everywhere."""
    distances = moved.abs()
    # On other devices a look at a number would have to wait for all that was started before.
    if moved.device.type == "cpu" and moved.numel() and float(distances.min()) > NEAR:
        return None
    return torch.le(distances, NEAR, out=distances)  # as floating-point numbers, since choosing by booleans is slow
