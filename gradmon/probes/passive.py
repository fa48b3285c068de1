"""The examples' gradients from the training's own passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from gradmon._errors import Unavailable
from gradmon._evidence import GradientMoments, InputGradients, PerExampleGradients
from gradmon._parameters import Weights
from gradmon._tensors import ran_out
from gradmon._types import Batch
from gradmon.masks import Mask
from gradmon.per_example import TOO_LARGE, Listener, PerExampleResult, Wanted
from gradmon.probes.memory import Memory
from gradmon.probes.per_example import gram_evidence, input_evidence, moments_evidence
from gradmon.probes.pooling import own_part, pooled_inputs, pooled_result
from gradmon.team import Team

LISTENED: frozenset[type] = frozenset({PerExampleGradients, GradientMoments, InputGradients})
"""The evidence that it gathers."""
_USUAL = 32
"""How many examples a rank is taken to have before they have been counted."""
_WHOLE = 1 << 22
"""How many coordinates of the examples of all ranks are exchanged unasked: more take longer than many steps."""


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
        team: The ranks whose examples are put together; None for this process alone.
        fallback: Of several ranks: the coordinates to look at where all of them would take too much memory; None for
            none.

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
        team: Team | None = None,
        fallback: Mask | None = None,
    ) -> None:
        self._model, self._micro_batches, self._team = model, micro_batches, team
        self._wanted = Wanted(gram=PerExampleGradients in needed, moments=GradientMoments in needed)
        self._moments_mask, self._fallback = moments_mask, fallback

        def listen(mask: Mask | None) -> Listener:
            own = self._wanted if team is None else own_part(self._wanted)
            return Listener(
                model,
                gram=own.gram,
                moments=own.moments,
                rows=own.rows,
                inputs=InputGradients in needed,
                mask=mask,
                moments_mask=moments_mask if own.moments and moments_mask is not mask else None,
                example_dim=example_dim,
                input_module=input_module,
                experience=memory.experience,
            )

        self._large = team is not None and Weights(model).total * _USUAL * team.size > _WHOLE
        if mask is None and self._large and fallback is not None:
            mask = fallback
        self._mask, self._listen, self._listener = mask, listen, listen(mask)
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
        self._narrow()
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
        gradients, team = self._listener.input_gradients, self._team
        found: PerExampleResult | Unavailable
        if self.given_up is not None:
            missing = Unavailable(self.given_up)
            return dict.fromkeys(LISTENED, lambda: _raise(missing))
        try:
            found = self._listener.collect(batch) if team is None else self._pooled(team, batch)
            self._short = False
        except Unavailable as missing:
            found = Unavailable(self._judged(missing).reason)  # the other refers to the passes that it came from
            self._large = self._large or TOO_LARGE in missing.reason
        weights = Weights(self._model)

        def result() -> PerExampleResult:
            return _raise(found) if isinstance(found, Unavailable) else found

        return {
            PerExampleGradients: lambda: gram_evidence(result(), weights, self._micro_batches),
            GradientMoments: lambda: moments_evidence(result()),
            InputGradients: lambda: _inputs(team, gradients) if result() else None,
        }

    def _pooled(self, team: Team, batch: Batch) -> PerExampleResult:
        """What the step has shown on all ranks together.

        Raises:
            Unavailable: It has shown nothing that can be trusted, on some rank.
            RankError: It failed on some rank.
        """

        def collect() -> PerExampleResult:
            own = self._listener.collect(batch)
            if own.missing is not None:  # the ranks exchange all of it or nothing
                raise Unavailable(own.missing)
            return own

        own, heard = team.together(
            "passes",
            collect,
            lambda own: {"examples": own.examples, "epsilon": own.epsilon, "resolution": own.resolution},
        )
        team.examples = [int(other["examples"]) for other in heard]
        epsilon, resolution = (max(other[name] for other in heard) for name in ("epsilon", "resolution"))
        own = replace(own, epsilon=epsilon, resolution=resolution)
        mask, sampled = self._mask, self._moments_mask
        weights = Weights(self._model, None if mask is None else mask.picks(self._model))
        self._large = self._large or team.total * weights.total > _WHOLE
        others = None if sampled is None or sampled is mask else Weights(self._model, sampled.picks(self._model))
        return pooled_result(team, own, weights, self._wanted, others)

    def _narrow(self) -> None:
        """Look at some coordinates only, where all of them have taken too much and nobody insists on them."""
        if self._large and self._mask is None and self._fallback is not None:
            self._listener.disarm()
            self._mask = self._fallback
            self._listener = self._listen(self._mask)


def _inputs(team: Team | None, gradients: Callable[[], Tensor]) -> InputGradients:
    if team is None:
        return input_evidence(gradients())

    def found() -> tuple[Tensor, Tensor]:
        own = gradients()
        return own, own

    return pooled_inputs(team, found)


def _raise(missing: Unavailable) -> NoReturn:
    raise Unavailable(missing.reason)  # anew: one that is kept would refer to whoever asks
