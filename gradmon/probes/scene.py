"""What the probes of one moment share: the objective, what was asked for, and what has been seen already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._batches import batch_tensors
from gradmon._errors import Unavailable
from gradmon._evidence import GradientMoments, InputGradients, InputSweep, PerExampleGradients
from gradmon._objective import Gradient, Objective
from gradmon._tensors import length, ran_out, wide
from gradmon._types import Batch, Derivative
from gradmon.per_example import TOO_LARGE, Entry, Pass, PerExample, Wanted, find_entry
from gradmon.perturbations.inputs import Ascent, InputSampler
from gradmon.perturbations.weights import Krylov, WeightSampler
from gradmon.probes.memory import Memory
from gradmon.probes.pooling import fits, pooled_pass
from gradmon.team import passes_talk

_EXAMPLES = (PerExampleGradients, GradientMoments)
_INPUTS = (InputGradients, InputSweep)
EXHAUSTED = "out of memory, and also with half of max_memory: given up"
"""Why a kind of evidence is not gathered any more."""
_T = TypeVar("_T")
Probe = Callable[["Scene"], Any]


@dataclass
class Scene:
    """One batch at one w, and the evidence gathered there, each kind once.

    Attributes:
        objective: The objective, inside its sandbox.
        probes: How each kind of evidence is gathered.
        weight_sampler: The perturbations of the weights.
        input_sampler: The perturbations of the inputs.
        derivative: How the gradient's change along a weight perturbation is taken.
        micro_batches: Into how many parts the metrics over batch means divide the batch.
        optimizer: The optimizer whose step is looked at; None for none.
        rates: The learning rates of that step; empty for those that the optimizer has now.
        after: The weights after its step.
        trial: Whether to try a step on copies where `after` is None.
        next_batch: The batch chi' of the next step; None without one.
        input_module: The module whose output is x; None to find x.
        seed: The seed of the samplers.
        needed: The kinds of evidence that will be asked for, so that one pass gathers what can be had together.
        memory: What earlier probes found out.
    """

    objective: Objective
    probes: Mapping[type, Probe]
    weight_sampler: WeightSampler = field(default_factory=Krylov)
    input_sampler: InputSampler = field(default_factory=Ascent)
    derivative: Derivative = "finite"
    micro_batches: int = 8
    optimizer: Optimizer | None = None
    rates: Sequence[float] = ()
    after: Sequence[Tensor] | None = None
    trial: bool = True
    next_batch: Batch | None = None
    input_module: nn.Module | str | None = None
    seed: int = 0
    needed: frozenset[type] = frozenset()
    memory: Memory = field(default_factory=Memory)
    _seen: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of what was seen: an error that is kept refers to the passes that it came from, and they to it."""
        self._seen = {}

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """What `make` returned, or the error it raised, the first time it was asked for under this key."""
        if key not in self._seen:
            try:
                self._seen[key] = make()
            except Exception as error:
                self._seen[key] = error
                if not isinstance(error, Unavailable) and not ran_out(error):
                    raise  # with the way to where it was raised, for the log
        found = self._seen[key]
        if isinstance(found, Exception):
            try:
                raise found.with_traceback(None)  # else it grows with everyone who asks
            finally:
                del found  # which refers to this frame now
        return found

    def get(self, kind: type) -> Any:
        """The evidence of one kind.

        Raises:
            Unavailable: It cannot be had, or the loss or the gradient is not finite.
        """
        self.gradient  # noqa: B018 - nothing else is worth looking at where the gradient is not finite
        return self.once(kind, lambda: self._gathered(kind))

    def _gathered(self, kind: type) -> Any:
        """The evidence of one kind; where memory runs out, with half of it once more, and then never again."""
        exhausted = self.memory.exhausted
        if kind in exhausted:
            raise Unavailable(exhausted[kind])
        try:
            return self._twice(lambda: self.probes[kind](self))
        except Exception as error:
            if not ran_out(error):
                raise
            exhausted[kind] = EXHAUSTED
            raise Unavailable(exhausted[kind]) from error

    def _twice(self, make: Callable[[], _T]) -> _T:
        """What `make` returns; once more with half of the memory where it runs out."""
        try:
            return make()
        except Exception as error:
            if not ran_out(error):
                raise
        self._seen = {
            key: found
            for key, found in self._seen.items()
            if key != "shares" and not (isinstance(found, Exception) and ran_out(found))
        }
        self.memory.relieve()
        return make()

    @property
    def gradient(self) -> Gradient:
        """The batch gradient at w.

        Raises:
            Unavailable: It, or the loss, is not finite.
        """
        return self.once("gradient", lambda: self._twice(self._gradient))

    def _gradient(self) -> Gradient:
        gradient = self._together() or self.objective.gauge()
        finite = all(bool(torch.isfinite(part).all()) for part in gradient.parts)
        if not finite or gradient.loss != gradient.loss or abs(gradient.loss) == float("inf"):
            raise Unavailable("non-finite gradient")
        return gradient

    def _together(self) -> Gradient | None:
        """The gradient from the pass that looks at the examples, if there is going to be one, and it can be made."""
        kinds = [kind for kind in _EXAMPLES if kind in self.needed and kind not in self.memory.exhausted]
        if not kinds:
            return None
        try:
            return self._twice(lambda: self.examples(kinds[0])).gradient
        except Exception as error:
            if ran_out(error):
                self.memory.exhausted.update(dict.fromkeys(kinds, EXHAUSTED))
            elif not isinstance(error, Unavailable):
                raise
            return None

    def examples(self, kind: type) -> Pass:
        """One pass for all kinds of evidence about the examples that are going to be asked for.

        Args:
            kind: `PerExampleGradients` or `GradientMoments`.

        Raises:
            Unavailable: The examples' gradients cannot be told apart, or are not finite.
        """
        kinds = (self.needed | {kind}).intersection(_EXAMPLES)
        team = self.objective.team
        if team is not None and not fits(team, self.objective.weights, self.memory.experience.max_memory):
            kinds -= {PerExampleGradients}
            if kind not in kinds:
                raise Unavailable(TOO_LARGE)
        wanted = Wanted(
            gram=PerExampleGradients in kinds, moments=GradientMoments in kinds, precise=self.memory.precise
        )
        if team is None:
            return self.once(("examples", kinds), lambda: self.shares.run(wanted))
        return self.once(("examples", kinds), lambda: pooled_pass(team, self.objective, self.shares, wanted))

    @property
    def epsilon(self) -> float:
        """By how much, relative to its norm, a gradient can be off.

        The rounding of the coarsest type in use, or, where it is larger, the difference when the gradient is taken once
        more: of a pass that draws from a source of randomness that is not known here, no difference means anything.
        """
        return self.once("epsilon", self._epsilon)

    def _epsilon(self) -> float:
        first = self.gradient.parts
        if self.memory.gap is None:
            again = self.objective.gradient().parts
            size = math.sqrt(sum(length(part) ** 2 for part in first))
            gap = math.sqrt(sum(length(wide(a) - wide(b)) ** 2 for a, b in zip(first, again, strict=True)))
            if not math.isfinite(gap):
                raise Unavailable("the forward pass does not repeat itself")
            self.memory.gap = gap / size if size > 0 else 0.0
        return max(self.objective.epsilon, self.memory.gap)

    @property
    def entry(self) -> Entry:
        """Where the examples' inputs enter.

        Raises:
            Unavailable: They cannot be found.
        """
        entries, batch = self.memory.entries, batch_tensors(self.objective.batch)
        key = tuple((tensor.ndim, tensor.dtype) for tensor in batch)

        def find() -> Entry:
            if key not in entries:
                entries[key] = find_entry(self.objective, self.input_module)
            return entries[key]

        return self.once("entry", lambda: self._agreed("entry", find))

    @property
    def shares(self) -> PerExample:
        """Per-example passes, with the examples' inputs where these are wanted and can be found.

        Raises:
            Unavailable: The examples of several ranks interact.
        """

        def make() -> PerExample:
            talk = None if self.objective.team is None else passes_talk(self.objective.model)
            if talk is not None:
                raise Unavailable(talk)
            try:
                entry = self.entry if not self.needed or self.needed.intersection(_INPUTS) else None
                return self._agreed("shares", lambda: PerExample(self.objective, entry, self.memory.experience))
            except Unavailable:
                return self._agreed("shares", lambda: PerExample(self.objective, None, self.memory.experience))

        return self.once("shares", make)

    def _agreed(self, work: str, make: Callable[[], _T]) -> _T:
        """What `make` returns, unless it fails on some rank."""
        team = self.objective.team
        return make() if team is None else team.together(work, make)[0]

    def generator(self) -> torch.Generator:
        """A fresh source of randomness, the same for every sweep of this scene."""
        return torch.Generator().manual_seed(self.seed % 2**32)
