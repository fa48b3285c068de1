"""The gradients of single examples from passes of our own.

``h_i = B * (the part of dL/dw that flows through example i's rows of each use of a parameter)``, so that the mean of
the h_i is exactly the gradient of the batch loss, whatever its reduction, and also where examples interact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradmon._batches import batch_tensors, example_count, holds_counts, replace_tensor
from gradmon._errors import GradmonError, Unavailable, told
from gradmon._objective import Gradient, Objective
from gradmon._tensors import length, ran_out
from gradmon._types import Batch
from gradmon.per_example.capture import Capture, Entry, Use
from gradmon.per_example.collected import PerExampleResult
from gradmon.per_example.groups import Group
from gradmon.per_example.holding import holds
from gradmon.per_example.look import Seen, find_course
from gradmon.per_example.recorder import Recorder
from gradmon.per_example.recording import Recording, Wanted
from gradmon.per_example.rows import Course, Ownership, Rows, Unknown
from gradmon.per_example.rules import RULES, Rules
from gradmon.per_example.scratch import Scratch
from gradmon.per_example.still import Still
from gradmon.per_example.ways import Ways
from gradmon.per_example.whole import whole_modules

CHECKED_EVERY = 100
"""Every how many-th probe is compared with the slowest way."""


@dataclass
class Experience:
    """What earlier probes of a model found out.

    Attributes:
        rules: The rules.
        max_memory: The most bytes to hold at a time beside what the training holds.
        ways: By which way each use is covered.
        courses: The courses of forward passes, by what they were found for.
        coverage: By which way each parameter was covered last.
        probes: How many probes there have been.
        several: Whether the last one saw several backward passes.
        scratch: Memory for intermediate results.
    """

    rules: Rules = field(default_factory=lambda: RULES)
    max_memory: int = 1 << 28
    ways: Ways = field(default_factory=Ways)
    courses: dict[Any, Course] = field(default_factory=dict[Any, Course])
    coverage: dict[str, str] = field(default_factory=dict[str, str])
    probes: int = 0
    several: bool = False
    scratch: Scratch | None = None


@dataclass(frozen=True)
class Pass:
    """What came of one forward and backward pass.

    Attributes:
        gradient: The batch gradient.
        result: The examples' gradients, as far as they were wanted.
        share: The whole gradient h_i of the example that was wanted, one tensor for each parameter; else empty.
    """

    gradient: Gradient
    result: PerExampleResult
    share: list[Tensor]
    _x: Callable[[], tuple[Tensor, Tensor]]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The examples' inputs x, examples first, (B, ...), and ``B dL/dx``.

        Raises:
            Unavailable: The inputs were not asked for, or the rows of x cannot be assigned to examples.
        """
        return self._x()


class PerExample:
    """Per-example passes of one objective: which rows belong to whom is found out once, then used by every pass.

    Args:
        objective: The objective, inside its sandbox.
        entry: Where x enters; None if x is not wanted.
        experience: What earlier probes found out; None for nothing.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """

    def __init__(self, objective: Objective, entry: Entry | None = None, experience: Experience | None = None) -> None:
        self._objective = objective
        self.entry = entry
        self._experience = experience or Experience()
        trained = tuple(id(parameter) for parameter in objective.weights.parameters)
        self._key = (trained, entry, objective.examples == 1)
        known = self._experience.courses.get(self._key)
        if known is not None and not holds(self._look, objective.copied(), objective.examples, known):
            self._course = self._find(few=False)
        else:
            self._course = self._find() if known is None else known
        self._check = self._experience.probes % CHECKED_EVERY == 0
        self._experience.probes += 1

    def _find(self, *, few: bool = True) -> Course:
        objective = self._objective
        batch, examples = objective.copied(), objective.examples
        course = find_course(self._look, batch, examples, few=few)
        if few and not holds(self._look, batch, examples, course):
            course = find_course(self._look, batch, examples, few=False)
        self._experience.courses[self._key] = course
        return course

    def _look(self, batch: Batch, tell: Callable[[Seen], None], still: Still) -> None:
        values = [without_zeros(value) for value in self._objective.base]
        with self._objective.at(values), still:
            capture, _ = self._forward(self._objective.copied(batch), None, lambda use: tell(Seen.of(use)))
        if capture.x is not None:
            tell(Seen("x", [], 1, [capture.x.detach().clone()], [], decided=capture.decided))

    def _forward(
        self, batch: Batch, delta: Tensor | None, note: Callable[[Use], None], recording: Recording | None = None
    ) -> tuple[Capture, Tensor]:
        entry = self.entry
        inputs = batch_tensors(batch)
        capture = Capture(
            self._objective.weights.parameters, inputs, note, example_count(batch), entry=entry, delta=delta
        )
        capture.counted = capture.listed = holds_counts(batch, capture.examples)
        if recording is not None:
            recording.tape = capture.tape
        with contextlib.ExitStack() as stack:
            if entry is not None and entry.position is not None:
                x = capture.enter(inputs[entry.position], frozenset({entry.position}))
                batch = replace_tensor(batch, entry.position, x)
            if entry is not None and entry.module is not None:
                stack.callback(entry.module.register_forward_hook(entering(capture)).remove)
            try:
                with whole_modules(self._objective.model, self._experience.rules, capture), capture:
                    loss = self._objective.evaluate(batch)
            except GradmonError:
                raise
            except Exception as error:
                if ran_out(error):
                    raise
                raise Unavailable(f"the forward pass cannot be looked into: {told(error)}") from error
        return capture, loss

    def run(
        self,
        wanted: Wanted,
        *,
        batch: Batch | None = None,
        values: Sequence[Tensor] | None = None,
        delta: Tensor | None = None,
    ) -> Pass:
        """A forward and backward pass.

        Args:
            wanted: What is to be made of the examples' gradients.
            batch: A batch of as many examples; None for the objective's own.
            values: Other weights.
            delta: What is added to x; examples first, (B, ...).

        Raises:
            Unavailable: The pass took another course than the first ones, or the shares would not add up.
        """
        recorder, gradient, found = self._run(wanted, batch, values, delta)
        if recorder.stray:  # what earlier probes found out holds no longer
            recorder.release()
            self._course = self._find(few=False)
            recorder, gradient, found = self._run(wanted, batch, values, delta)
        try:
            collected = recorder.finish()
            result = collected.result((), gram=wanted.gram, moments=wanted.moments, rows=wanted.rows)
        finally:
            recorder.release()
        self._experience.coverage = collected.coverage()
        self._check = False
        share = [
            collected.shares[position].to(parameter.dtype) * self._objective.examples
            if position in collected.shares
            else torch.zeros_like(parameter)
            for position, parameter in enumerate(self._objective.weights.parameters)
        ]
        return Pass(gradient, result, share if wanted.example is not None else [], found)

    def _run(
        self, wanted: Wanted, batch: Batch | None, values: Sequence[Tensor] | None, delta: Tensor | None
    ) -> tuple[Recorder, Gradient, Callable[[], tuple[Tensor, Tensor]]]:
        objective, experience = self._objective, self._experience
        recorder = Recorder(
            objective.weights,
            wanted,
            experience.rules,
            experience.ways,
            check=self._check,
            max_memory=experience.max_memory,
            single=True,
        )
        recording = Recording(recorder, self._course, objective.examples)
        with objective.at(values):
            shift = None if delta is None else self._along_x(delta)
            with objective.noting():
                capture, loss = self._forward(objective.copied(batch), shift, recording.note, recording)
            recording.finish()
            more = [] if capture.x is None else [capture.x]
            parts = objective.differentiate(loss, more)
            task = recorder.task
            recorder.collected.join_missing(Group(task, 0, objective.examples))
            for position in range(len(objective.weights.parameters)):
                part = parts[position]
                if part is not None:
                    recorder.gradient(position, part, task)
        x = None if capture.x is None else capture.x.detach()
        flow = parts[-1] if more else None
        gradient = objective.collect(loss, parts[: len(objective.weights.parameters)])
        return recorder, gradient, lambda: self._inputs(x, flow)

    def _inputs(self, x: Tensor | None, flow: Tensor | None) -> tuple[Tensor, Tensor]:
        if x is None:
            raise Unavailable("the inputs of the examples were not found")
        found = by_example(x, self._course.x, self._objective.examples)
        if flow is None:
            return found, torch.zeros_like(found)
        return found, by_example(flow, self._course.x, self._objective.examples) * self._objective.examples

    def _along_x(self, delta: Tensor) -> Tensor:
        owner = self._course.x
        return delta.movedim(0, owner.dim) if isinstance(owner, Rows) else delta


def by_example(x: Tensor, owner: Ownership | None, examples: int) -> Tensor:
    """The inputs of each example, (B, ...).

    Raises:
        Unavailable: They cannot be told apart.
    """
    if examples == 1:
        return x if x.ndim and x.shape[0] == 1 else x.unsqueeze(0)
    if not isinstance(owner, Rows) or x.shape[owner.dim] != examples:
        reason = owner.reason if isinstance(owner, Unknown) else "x has several rows per example"
        raise Unavailable(f"the inputs of single examples cannot be told apart: {reason}")
    return x.movedim(owner.dim, 0)


def without_zeros(value: Tensor) -> Tensor:
    """The weights with small positive numbers in the place of zeros, which would hide what depends on what."""
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value) + 0.5
    size = length(value) / max(1, value.numel()) ** 0.5
    return torch.where(value == 0, noise * (0.1 * size if size > 0 else 0.1), value)


def entering(capture: Capture) -> Any:
    """A forward hook of the module whose output is x."""
    seen = 0

    def enter(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 1 or not isinstance(output, Tensor):
            raise Unavailable("`input_module` must be called once and return a tensor")
        return capture.enter(output)

    return enter


def find_entry(objective: Objective, module: nn.Module | str | None = None) -> Entry:
    """Where the examples' inputs x enter the model.

    Args:
        objective: The objective, inside its sandbox.
        module: The module (or its name) whose output is x; None for the first floating tensor of the batch that meets
            a parameter, and where there is none for the output of the first embedding that looks up integers of it.

    Raises:
        Unavailable: The batch holds no such tensor.
    """
    if module is not None:
        return Entry(module=objective.model.get_submodule(module) if isinstance(module, str) else module)
    batch = objective.copied()
    inputs = batch_tensors(batch)
    consumed: set[int] = set()

    def note(use: Use) -> None:
        if any(tensor.numel() > 1 for tensor in (*use.outputs, *use.activations)):
            consumed.update(use.origins)

    with objective.at():
        capture = Capture(objective.weights.parameters, inputs, note)
        with capture:
            objective.evaluate(batch)
    return entry_of(inputs, consumed, capture.embeddings)


def entry_of(inputs: Sequence[Tensor], consumed: set[int], embeddings: Sequence[frozenset[int]]) -> Entry:
    """Where x enters, from what a forward pass consumed.

    Raises:
        Unavailable: There is no such tensor.
    """
    for position, tensor in enumerate(inputs):
        if tensor.is_floating_point() and position in consumed:
            return Entry(position=position)
    whole = {position for position, tensor in enumerate(inputs) if not tensor.is_floating_point()}
    for call, origins in enumerate(embeddings):
        if origins <= whole:
            return Entry(embedding=call)
    seen = "the batch holds no floating-point input"
    if any(tensor.is_floating_point() for tensor in inputs):
        seen = "no call is seen that uses a floating-point tensor of the batch"
    raise Unavailable(f"{seen}, and no embedding consumes its integers")
