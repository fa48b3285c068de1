"""A call of a watched function, and what takes its derivative's place when the graph is run backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmon_integrations.workloads.average_gradient.midpoint import Midpoint
from gradmon_integrations.workloads.average_gradient.slopes import NEAR, Form, resting, secant


class Call:
    """One call of a watched function.

    Attributes:
        form: What was called.
        shape: Of its input; None where that of another call may be another.
        options: Its other arguments, without tensors.
        weight: The weight of a linear function.
        x: Its input, as it was then; None where no slope is wanted.
        y: Its output, likewise.
        versions: Of the two, to see whether somebody wrote into them later.
        inner: The node that the gradient of x leaves.
        outer: The node that the gradient of y enters; the same one for a function with a node of its own.
        slope: What stands for the derivative; None while that does itself.
        near: 1 where the derivative stands for itself even so, 0 elsewhere; None for 0 everywhere.
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
    received: Tensor | None = None

    def __init__(self, form: Form, shape: torch.Size | None, options: Any, weight: Tensor | None) -> None:
        self.form, self.shape, self.options, self.weight = form, shape, options, weight

    @property
    def lasting(self) -> bool:
        """Whether the weight is a parameter: others are made anew in each forward pass."""
        weight = self.weight
        # The last question takes far longer than the others, which mostly settle it.
        return weight is not None and (type(weight) is nn.Parameter or isinstance(weight, nn.Parameter))

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
        if self.inner is None:
            if self.middle is not None:
                self.middle.attach()
            return
        if self.inner is not self.outer:
            self.outer.register_hook(self._receive)
        self.inner.register_hook(self._replace)

    def _receive(self, inputs: Any, outputs: Any) -> None:
        self.received = outputs[0]

    def _replace(self, inputs: Any, outputs: Any) -> Any:
        # The slope of one replay serves one backward pass, and is written over there.
        averaged, self.slope = self.slope, None
        arriving = outputs[0] if self.inner is self.outer else self.received
        if averaged is None or arriving is None or inputs[0] is None:
            return None
        averaged.mul_(arriving)
        # At weights 0 and 1 `lerp` returns its ends as they are, if both are finite: a derivative may not be. On other
        # devices a look at a number would have to wait for all that was started before.
        if self.near is not None and not (self.near.is_cpu and float(self.near.sum()) == 0):
            averaged.lerp_(inputs[0], self.near)
        return (averaged,)

    def between(self, x_after: Tensor, y_after: Tensor) -> None:
        """Note the slope from the input and output that were kept to those after the step."""
        x, y, slope = self.x, self.y, self.form.slope
        if x is None or y is None or slope is None:
            return
        # The closure may have gradients on, or inference, whose tensors cannot be written to later.
        with torch.inference_mode(False), torch.no_grad():
            x, y = x.detach(), y.detach()
            moved = torch.sub(x_after, x)
            if slope is secant:
                # The same numbers as `secant`, with one difference of the inputs for both purposes.
                self.near = resting(moved)
                found = torch.sub(y_after, y).div_(moved.add_(self.near))
            else:
                near = moved.abs_() <= NEAR
                self.near = near.to(moved.dtype)
                found = slope(x, y, x_after.detach(), y_after.detach()).clone().masked_fill_(near, 0)
            self.slope = found.to(x.dtype)  # that of the gradient that it becomes

    def release(self) -> None:
        """Let go of all tensors and nodes, which refer to each other in a circle."""
        if self.middle is not None:
            self.middle.release()
        self.x = self.y = self.inner = self.outer = self.slope = self.near = self.received = None
