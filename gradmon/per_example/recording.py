"""What a probe keeps of forward and backward passes while they run."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from gradmon.per_example._autograd import version
from gradmon.per_example.calls import Tape
from gradmon.per_example.capture import Use
from gradmon.per_example.forms import Shares
from gradmon.per_example.rows import Course, Planned


class Receiver(Protocol):
    """A probe: it is told of the uses in a forward pass."""

    failure: str | None
    stray: bool

    def fail(self, reason: str) -> None:
        """Give up."""
        ...

    def guarded(self) -> AbstractContextManager[None]:
        """A context for what runs inside the training's own passes."""
        ...

    def note_input(self, recording: Recording, gradient: Tensor) -> None:
        """The gradient at the examples' inputs has arrived."""
        ...

    def expect(self, recording: Recording, use: Use, planned: Planned, index: int, tape: Tape) -> None:
        """Wait for the gradient at the outputs of a use."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What is to be made of the examples' gradients.

    Attributes:
        gram: Their inner products.
        moments: Mean and variance of each coordinate over the examples.
        rows: The looked-at coordinates themselves.
        example: The whole gradient of one example; None for none.
        precise: Whether to widen everything to float64 first.
    """

    gram: bool = True
    moments: bool = False
    rows: bool = False
    example: int | None = None
    precise: bool = False


@dataclass(eq=False)
class Live:
    """A use whose gradient has not arrived yet; held by the hook at its output, and by nothing else."""

    use: Use | None
    planned: Planned
    recording: Recording | None
    index: int
    arrived: list[Tensor | None]
    waiting: int
    tape: Tape
    places: list[int]
    task: int | None = None
    done: bool = False


@dataclass(eq=False)
class Recording:
    """One forward pass that is looked into.

    Attributes:
        recorder: The probe that it belongs to.
        course: What is expected of it.
        examples: The number of its examples.
        number: The how many-th of its probe it is.
        source: The tensors that the model was called with, and their versions.
    """

    recorder: Receiver
    course: Course
    examples: int
    number: int = 0
    source: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
    tape: Tape | None = None
    count: int = 0

    def note(self, use: Use) -> None:
        """Leave a hook at the outputs of a use."""
        if self.recorder.failure is not None:
            return
        index, self.count = self.count, self.count + 1
        planned = self.course.uses[index] if index < len(self.course.uses) else None
        if planned is None or not planned.fits(use) or self.tape is None:
            self.recorder.stray = True
            self.recorder.fail(f"the forward pass took another course than expected, at `{use.name}`")
            return
        self.recorder.expect(self, use, planned, index, self.tape)

    def finish(self) -> None:
        """The forward pass is over."""
        if self.count != len(self.course.uses) and self.recorder.failure is None:
            self.recorder.stray = True
            self.recorder.fail("the forward pass took another course than expected: it ended early")


@dataclass
class Backward:
    """What came of one backward pass so far."""

    task: int
    remaining: dict[int, int]
    recordings: list[Recording]
    alone: bool
    forms: dict[int, dict[Recording, list[Shares]]] = field(default_factory=dict[int, Any])
    ended: bool = False


def gradient_state(parameter: Tensor, left: tuple[weakref.ref[Tensor] | None, int]) -> str:
    """Whether a gradient is as a backward pass left it, gone (or zero), or something else."""
    now, (before, count) = parameter.grad, left
    if now is None:
        return "gone"
    if before is not None and before() is now and version(now) == count:
        return "same"
    return "changed" if bool(now.any()) else "gone"
