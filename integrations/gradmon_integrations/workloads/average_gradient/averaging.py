"""The average gradient of one step: the graph of its loss, and the slopes that later calls of the closure give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmon_integrations.workloads.average_gradient.buffers import Buffers
from gradmon_integrations.workloads.average_gradient.randomness import RandomStates
from gradmon_integrations.workloads.average_gradient.recording import Recorder, Replayer
from gradmon_integrations.workloads.average_gradient.secants import Secants
from gradmon_integrations.workloads.average_gradient.update import Candidate
from gradmon_integrations.workloads.average_gradient.watching import Table, Watch

_HUGE = 1 << 17
"""Parameters of more elements are huge: seeing their gradients come costs less than holding them all."""


class Averaging:
    """A loss with its graph, and the closure that it came from.

    Args:
        closure: Computes the loss.
        loss: The loss at the weights before the step, with its graph, of which one backward pass was taken.
        recorder: What the closure called for it.
        table: What is watched.
        random: The random states that it began with.
        buffers: The buffers that it began with.
        news: Whether modules may be called whose buffers are not known yet.
        secants: Works out slopes together; None where they cannot wait.

    Attributes:
        loss: As given.
        secants: As given, or None where something was found to be written to later.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        loss: Tensor,
        recorder: Recorder,
        table: Table,
        random: RandomStates,
        buffers: Buffers,
        news: bool,
        secants: Secants | None,
    ) -> None:
        self.loss = loss
        self._closure, self._calls, self._table = closure, recorder.calls, table
        self._random, self._buffers, self._news = random, buffers, news
        self.secants = secants

    def prepare(self) -> bool:
        """Make the graph ready for slopes; whether inputs or outputs had to be found again, since they were changed."""
        averaged = [call for call in self._calls if call.averaged]
        written = any(call.written for call in averaged)
        if written:
            self.secants = None
            after = RandomStates(all_kinds=True)
            self.replay(restoring=True)
            after.restore()
        for call in averaged:
            call.attach()
        return written

    def replay(self, *, restoring: bool = False) -> Tensor:
        """Call the closure again, at the weights as they are now; it gives the slopes.

        Args:
            restoring: Whether to take from it what the first call was given, instead.

        Returns:
            The loss there.
        """
        loss, whole = self._replayed(restoring)
        if not whole:
            self.secants = None
            loss, _ = self._replayed(restoring)
        return loss

    def _replayed(self, restoring: bool) -> tuple[Tensor, bool]:
        """The loss, and whether all slopes were found."""
        self._random.restore()
        replayer = Replayer(self._calls, secants=self.secants, restoring=restoring)
        torch.clear_autocast_cache()  # it holds other weights
        with self._buffers.apart(exploring=self._news), torch.no_grad(), Watch(self._table, replayer):
            loss = self._closure()
        return loss, replayer.finish()

    def gradient(self, parameters: Sequence[Tensor], *, last: bool) -> list[Tensor]:
        """The gradient with the slopes of the last replay.

        Args:
            parameters: With respect to these, at the weights before the step.
            last: Whether the graph is not needed any more.

        Returns:
            One tensor per parameter.
        """
        return list(torch.autograd.grad(self.loss, parameters, retain_graph=not last))

    def take_gradient(self, parameters: Sequence[Tensor], candidate: Candidate, *, last: bool) -> None:
        """Hand the gradient to a candidate.

        Args:
            parameters: As for `gradient`.
            candidate: Takes it up. Unless it is the last, it is given those of huge parameters one by one as they are
                found, so that they are never there together, and their memory, just used, serves the next. The last
                one it may write over the weights, and so only when the whole pass is over.
            last: As for `gradient`.
        """
        places = [place for place in candidate.large if not last and parameters[place].numel() > _HUGE]
        zeros: dict[Any, Tensor] = {}

        def take(gradient: Tensor, place: int) -> Tensor:
            candidate.take(place, gradient)
            kind = gradient.dtype, gradient.device
            if kind not in zeros:
                zeros[kind] = gradient.new_zeros(())
            return zeros[kind].expand(gradient.shape)

        # Behind the hooks of others, which may change the gradients.
        handles = [parameters[place].register_hook(partial(take, place=place)) for place in places]
        try:
            gradients = self.gradient(parameters, last=last)
        finally:
            for handle in handles:
                handle.remove()
        candidate.take_small(gradients)
        for place in sorted(set(candidate.large) - set(places), reverse=True):
            candidate.take(place, gradients[place])
            gradients[place] = gradients[place].new_empty(0)


def place(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let parameters have other values, without a copy, and without autograd's taking notice."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
