"""What the calls of a model's modules do with the parameters, found out when a module is called for the first time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gradmon._batches import example_count, holds_counts, map_tensors, tensors
from gradmon._errors import GradmonError, Unavailable, told
from gradmon._parameters import Weights
from gradmon._sandbox import Sandbox
from gradmon._tensors import ran_out
from gradmon._types import Batch
from gradmon.per_example.active import Experience, entry_of, without_zeros
from gradmon.per_example.capture import Capture, Entry, Use
from gradmon.per_example.holding import holds
from gradmon.per_example.hooks import begun
from gradmon.per_example.look import Seen, find_course
from gradmon.per_example.rows import Course
from gradmon.per_example.still import Still


class Courses:
    """The courses of the calls of a model's modules.

    Args:
        model: The model.
        dim: The dimension of the tensors that a module is called with that holds the examples.
        inputs: Whether the examples' inputs are wanted.
        input_module: The module whose output is an example's input x; None to find it.
        experience: Rules, and what earlier probes found out.
    """

    def __init__(
        self, model: nn.Module, dim: int, inputs: bool, input_module: nn.Module | None, experience: Experience
    ) -> None:
        self._model, self._dim, self._inputs, self._input_module = model, dim, inputs, input_module
        self._experience = experience
        self._refused: dict[Any, str] = {}
        self._strays: dict[Any, int] = {}

    def of(self, weights: Weights, module: nn.Module, batch: Batch, examples: int) -> tuple[Any, Course, Entry | None]:
        """The course of a call, found out if it is not known yet."""
        inputs = list(tensors(batch))
        trained = tuple(id(parameter) for parameter in weights.parameters)
        key = (trained, id(module), examples == 1, tuple(t.ndim for t in inputs), self._inputs)
        if key in self._refused:
            raise Unavailable(self._refused[key])
        entries: dict[Any, Any] = self._experience.courses
        entry: Entry | None = entries.get((key, "entry"))
        known: Course | None = entries.get(key)
        if known is None or known.chosen is not None:
            try:
                if known is None:
                    entry = self._find_entry(weights, module, batch) if self._inputs else None
                few = key not in self._strays
                entries[key] = self._look(weights, module, batch, examples, entry, few=few, known=known)
                entries[key, "entry"] = entry
            except Unavailable as missing:
                self._refused[key] = missing.reason
                raise
        return key, entries[key], entry

    def _find_entry(self, weights: Weights, module: nn.Module, batch: Batch) -> Entry | None:
        if self._input_module is not None:
            return Entry(module=self._input_module)
        consumed: set[int] = set()

        def note(use: Use) -> None:
            if any(tensor.numel() > 1 for tensor in (*use.outputs, *use.activations)):
                consumed.update(use.origins)

        with Sandbox(self._model, weights.parameters) as sandbox, sandbox.at([p.data for p in weights.parameters]):
            args, kwargs = _copied(batch)
            inputs = list(tensors((args, kwargs)))
            with (capture := Capture(weights.parameters, inputs, note)):
                module(*args, **kwargs)
        try:
            return entry_of(inputs, consumed, capture.embeddings)
        except Unavailable:
            return None

    def _look(
        self,
        weights: Weights,
        module: nn.Module,
        batch: Batch,
        examples: int,
        entry: Entry | None,
        *,
        few: bool,
        known: Course | None,
    ) -> Course:
        values = [without_zeros(parameter.data) for parameter in weights.parameters]
        with Sandbox(self._model, weights.parameters) as sandbox:

            def run(batch: Batch, tell: Callable[[Seen], None], still: Still) -> None:
                args, kwargs = _copied(batch)
                inputs = list(tensors((args, kwargs)))
                count = example_count((args, kwargs), self._dim)

                def note(use: Use) -> None:
                    tell(Seen.of(use))

                capture = Capture(weights.parameters, inputs, note, count, self._dim, entry)
                capture.listed = holds_counts((args, kwargs), count)
                if entry is not None and entry.position is not None:
                    given = inputs[entry.position]
                    x = capture.enter(given, frozenset({entry.position}))
                    args, kwargs = map_tensors((args, kwargs), lambda t: x if t is given else t)
                try:
                    with sandbox.at(values), still:
                        close = begun(capture, self._model, self._experience.rules, entry)
                        try:
                            module(*args, **kwargs)
                        finally:
                            close(False)
                except GradmonError:
                    raise
                except Exception as error:
                    if ran_out(error):
                        raise
                    raise Unavailable(f"the forward pass cannot be looked into: {told(error)}") from error
                if capture.x is not None:
                    tell(Seen("x", [], 1, [capture.x.detach().clone()], [], decided=capture.decided))

            found = find_course(run, batch, examples, self._dim, few=few) if known is None else known
            if (few or known is not None) and not holds(run, batch, examples, found, self._dim):
                return find_course(run, batch, examples, self._dim, few=False)
            return found

    def reconsider(self) -> None:
        """Look again at what was given up."""
        self._refused.clear()

    def confirm(self) -> None:
        """The courses held."""
        self._strays.clear()

    def forget(self, courses: Sequence[tuple[Any, Course]]) -> None:
        """What was found out about forward passes holds no longer; one that never repeats itself is given up."""
        for key, course in courses:
            if self._experience.courses.get(key) is course:
                del self._experience.courses[key]
            self._strays[key] = self._strays.get(key, 0) + 1
            if self._strays[key] > 2:
                self._refused[key] = "the forward pass does not repeat itself"


def _copied(batch: Batch) -> Batch:
    return map_tensors(batch, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
