"""The Jacobians of a linear function in the middle of a step: the paper's Eq. 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmon_integrations.workloads.average_gradient.slopes import Function


class Midpoint:
    """One call ``z = f(x, W, ...)`` of a function that is linear in x and in W.

    While both move on straight lines, the average of ``dz/dW`` is that at the mean of x and x', and the average of
    ``dz/dx`` that at the mean of W and W'. The bias's Jacobian does not move.

    Args:
        function: The function.
        rest: Its other arguments, from the bias on.
        named: Those given by name.
    """

    def __init__(self, function: Function, rest: list[Any], named: dict[str, Any]) -> None:
        self._function, self._rest, self._named = function, rest, named
        self._sources: list[Tensor] = []
        self._entries: list[Any] = []
        self._exit: Any = None
        self._middle: list[Tensor] | None = None
        self._gradients: list[Tensor | None] = [None, None]

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """Call it, with nodes in the graph at which its gradients can be replaced.

        Args:
            x: The input.
            weight: W.

        Returns:
            z.
        """
        # Either may be a parameter, which is about to have other values.
        self._sources = [x.detach() if x.is_leaf else x, weight.detach()]
        inner = [source.view_as(source) if source.requires_grad else source for source in (x, weight)]
        self._entries = [source.grad_fn if source.requires_grad else None for source in inner]
        z = self._function(*inner, *self._rest, **self._named)
        if z._is_view():
            z = z.clone()  # writing into a view would take its node out of the graph
        self._exit = z.grad_fn
        return z

    def between(self, x_after: Tensor, weight_after: Tensor) -> None:
        """Note the means of input and weight, before and after the step."""
        pairs = zip(self._sources, (x_after, weight_after), strict=True)
        with torch.inference_mode(False):  # the closure may have it on, and of its tensors there are no gradients
            self._middle = [torch.lerp(before.detach(), after.detach(), 0.5) for before, after in pairs]

    def attach(self) -> None:
        """Put the midpoint's gradients in the place of those found, whenever the graph is run backwards from now on."""
        self._exit.register_hook(self._receive)
        for place, entry in enumerate(self._entries):
            if entry is not None:
                entry.register_hook(lambda inputs, _, place=place: self._replace(inputs, place))

    def _receive(self, inputs: Any, outputs: Any) -> None:
        if self._middle is None or outputs[0] is None:
            self._gradients = [None, None]
            return
        wanted = [place for place, entry in enumerate(self._entries) if entry is not None]
        with torch.enable_grad():
            middle = [part.detach().requires_grad_(place in wanted) for place, part in enumerate(self._middle)]
            z = self._function(*middle, *self._rest, **self._named)
        found = torch.autograd.grad(z, [middle[place] for place in wanted], outputs[0])
        for place, gradient in zip(wanted, found, strict=True):
            self._gradients[place] = gradient

    def _replace(self, inputs: Any, place: int) -> Any:
        gradient, self._gradients[place] = self._gradients[place], None
        return None if gradient is None or inputs[0] is None else (gradient,)

    def release(self) -> None:
        """Let go of all tensors and nodes, which refer to each other in a circle."""
        self._sources, self._entries, self._exit, self._middle = [], [], None, None
        self._rest = []
        self._gradients = [None, None]
