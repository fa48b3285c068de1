"""The examples' gradients from the training's own passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from gradmon._errors import Unavailable
from gradmon._evidence import GradientMoments, InputGradients, PerExampleGradients
from gradmon._parameters import Weights
from gradmon._tensors import ran_out
from gradmon._types import Batch
from gradmon.masks import Mask
from gradmon.per_example import Listener, PerExampleResult
from gradmon.probes.memory import Memory
from gradmon.probes.per_example import gram_evidence, input_evidence, moments_evidence

LISTENED: frozenset[type] = frozenset({PerExampleGradients, GradientMoments, InputGradients})
"""The evidence that it gathers."""


class PassiveProbe:
    """Listens to the passes of one step at a time.

    Args:
        model: The model.
        needed: The kinds of evidence that will be asked for.
        mask: The coordinates of inner products; None for all.
        moments_mask: The coordinates of which mean and variance are taken; None for all.
        micro_batches: Into how many parts the metrics over batch means divide the batch.
        example_dim: The dimension of the model's inputs that holds the examples; None for the first.
        input_module: The module whose output is an example's input x; None to find it.
        memory: What earlier probes found out.

    Attributes:
        given_up: Why it does not listen any more; None where it does.
    """

    def __init__(
        self,
        model: nn.Module,
        needed: frozenset[type],
        mask: Mask | None,
        moments_mask: Mask | None,
        micro_batches: int,
        example_dim: int | None,
        input_module: nn.Module | str | None,
        memory: Memory,
    ) -> None:
        self._model, self._micro_batches = model, micro_batches
        self._listener = Listener(
            model,
            gram=PerExampleGradients in needed,
            moments=GradientMoments in needed,
            inputs=InputGradients in needed,
            mask=mask,
            moments_mask=moments_mask if moments_mask is not mask else None,
            example_dim=example_dim,
            input_module=input_module,
            experience=memory.experience,
        )
        self._memory, self._short = memory, False
        self.given_up: str | None = None

    def _judged(self, missing: Unavailable) -> Unavailable:
        """Make do with half of the memory where it ran out; where it does so again, listen no more."""
        if not ran_out(missing):
            return missing
        if self._short:
            self.given_up = "out of memory, and also with half of max_memory: given up"
            self._listener.disarm()
            return Unavailable(self.given_up)
        self._short = True
        self._memory.relieve()
        return missing

    @property
    def armed(self) -> bool:
        """Whether the hooks are there."""
        return self._listener.armed

    def arm(self) -> None:
        """Attach the hooks for the coming step, unless it was given up."""
        if self.given_up is None:
            self._listener.arm()

    def disarm(self) -> None:
        """Take the hooks off."""
        self._listener.disarm()

    def freeze(self) -> None:
        """The optimizer begins its step."""
        self._listener.freeze()

    def gather(self, batch: Batch) -> dict[type, Callable[[], Any]]:
        """What the step has shown: for each kind of evidence a function that returns it, or says why there is none."""
        gradients = self._listener.input_gradients
        found: PerExampleResult | Unavailable
        if self.given_up is not None:
            missing = Unavailable(self.given_up)
            return dict.fromkeys(LISTENED, lambda: _raise(missing))
        try:
            found = self._listener.collect(batch)
            self._short = False
        except Unavailable as missing:
            found = self._judged(missing)
        weights = Weights(self._model)

        def result() -> PerExampleResult:
            return _raise(found) if isinstance(found, Unavailable) else found

        return {
            PerExampleGradients: lambda: gram_evidence(result(), weights, self._micro_batches),
            GradientMoments: lambda: moments_evidence(result()),
            InputGradients: lambda: input_evidence(gradients()) if result() else None,
        }


def _raise(missing: Unavailable) -> NoReturn:
    raise missing.with_traceback(None)
