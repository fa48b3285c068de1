"""The gradients of single examples from the user's own passes, by hooks that are there only while they are wanted."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradmon._batches import example_count, holds_counts, map_tensors, tensors
from gradmon._errors import GradmonError, Unavailable, told
from gradmon._parameters import Weights, unwrapped
from gradmon._sandbox import quiet_depth
from gradmon._types import Batch
from gradmon.masks import Mask
from gradmon.per_example._autograd import here, running_backward, version
from gradmon.per_example.active import CHECKED_EVERY, Experience, by_example
from gradmon.per_example.calls import Tape
from gradmon.per_example.capture import Capture, Entry
from gradmon.per_example.collected import PerExampleResult
from gradmon.per_example.courses import Courses
from gradmon.per_example.hooks import Call, Hook, UnderWay, begun, compiled
from gradmon.per_example.recorder import Recorder
from gradmon.per_example.recording import Recording, Wanted
from gradmon.per_example.repeats import Repeats
from gradmon.per_example.rows import Course


class Listener:
    """Gathers the examples' gradients from forward and backward passes that are made anyway.

    Between `arm` and `disarm` the modules of the model have hooks (once it is known which are called from outside, only
    those); the outermost one that is called is looked into, and the uses of parameters in it have hooks at their
    outputs. At other times there is nothing. Whose rows are whose is found out by some passes of our own, when a module
    is called for the first time, and remembered.

    Args:
        model: The model.
        gram: Whether to gather the inner products of the examples' gradients.
        moments: Whether to gather mean and variance of each coordinate over the examples.
        rows: Whether to gather the looked-at coordinates themselves.
        inputs: Whether to gather the gradients with respect to the examples' inputs.
        mask: The coordinates to look at; None for all.
        moments_mask: Those of moments, if they are others.
        example_dim: The dimension of the tensors that the model is called with that holds the examples; None for the
            first.
        input_module: The module (or its name) whose output is an example's input x; None to find it.
        experience: Rules, bounds, and what earlier probes found out.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> listener = Listener(model)
        >>> listener.arm()
        >>> model(torch.ones(4, 3)).mean().backward()
        >>> found = listener.collect()
        >>> listener.disarm()
        >>> found.gram.shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gram: bool = True,
        moments: bool = False,
        rows: bool = False,
        inputs: bool = False,
        mask: Mask | None = None,
        moments_mask: Mask | None = None,
        example_dim: int | None = None,
        input_module: nn.Module | str | None = None,
        experience: Experience | None = None,
    ) -> None:
        self._model = unwrapped(model)
        self._wanted = Wanted(gram=gram, moments=moments, rows=rows)
        self._mask, self._moments_mask = mask, moments_mask
        inner = self._model.get_submodule(input_module) if isinstance(input_module, str) else input_module
        self._dim, self._dim_given = example_dim or 0, example_dim is not None
        self.experience = experience or Experience()
        self._known = Courses(self._model, self._dim, inputs, inner, self.experience)
        self._ambiguous: list[Tensor] = []
        self._repeats = Repeats(self._dim)
        self._courses: list[tuple[Any, Course, Entry | None]] = []
        self._entered: dict[Recording, Course] = {}
        self._handles: list[RemovableHandle] = []
        self._hooked: list[int] = []
        self._modules: list[nn.Module] = []
        self._outer: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._examples = 0
        self._local = UnderWay()
        self._recorder: Recorder | None = None
        self._laid: tuple[list[int], Weights, Weights | None] | None = None

    @property
    def armed(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def arm(self) -> None:
        """Attach the hooks, and begin anew."""
        self._interrupt()
        if self._recorder is not None:
            self._recorder.release()
        experience = self.experience
        self._modules = list(self._model.modules())
        weights, sampled = self._layouts()
        check = experience.probes % CHECKED_EVERY == 0
        if check:
            self._known.reconsider()
        self._recorder = recorder = Recorder(
            weights,
            self._wanted,
            experience.rules,
            experience.ways,
            sampled=sampled,
            check=check,
            max_memory=experience.max_memory,
            scratch=experience.scratch,
            several=experience.several,
        )
        experience.scratch = recorder.scratch
        self._ambiguous, self._courses, self._entered = [], [], {}
        self._repeats = Repeats(self._dim)
        self._examples = 0
        reason = compiled(self._modules)
        if reason is not None:
            recorder.fail(reason)
        else:
            outer = [module for module in self._modules if module in self._outer]
            self._attach(weights, outer if outer and not check else self._modules)

    def _attach(self, weights: Weights, modules: Sequence[nn.Module]) -> None:
        """Attach the hooks, unless those of the last step are still there."""
        hooked = [*map(id, modules), *map(id, weights.parameters)]
        if self._handles and hooked == self._hooked:
            return
        self._detach()
        self._hooked = hooked
        for position, parameter in enumerate(weights.parameters):
            hook = Hook(functools.partial(self._receive, position))
            self._handles.append(cast("Any", parameter).register_hook(hook))
        for module in modules:
            if isinstance(module, torch.jit.RecursiveScriptModule):  # pyright: ignore[reportPrivateImportUsage]
                continue  # it has no hooks
            self._handles.append(module.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(Hook(self._leave), always_call=True))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _receive(self, position: int, gradient: Tensor) -> None:
        """The gradient of a parameter arrives."""
        if self._recorder is not None and not quiet_depth():
            self._recorder.gradient(position, gradient)

    def _layouts(self) -> tuple[Weights, Weights | None]:
        """The layouts of `w`; the same as long as the same parameters are trained."""
        now = self._trained()
        if self._laid is None or self._laid[0] != now:
            layouts = [
                None if mask is None else Weights(self._model, mask.picks(self._model))
                for mask in (self._mask, self._moments_mask)
            ]
            self._laid = now, layouts[0] or Weights(self._model), layouts[1]
        return self._laid[1], self._laid[2]

    def _trained(self) -> list[int]:
        """The identities of the parameters that are trained."""
        held = (p for module in self._modules for p in cast("Any", module)._parameters.values())
        return [id(parameter) for parameter in held if parameter is not None and parameter.requires_grad]

    def disarm(self) -> None:
        """Take all hooks off, and let everything go."""
        self._detach()
        self._interrupt()
        if self._recorder is not None:
            self._recorder.release()
        self._recorder = self.experience.scratch = None
        self._modules = []
        self._ambiguous, self._courses, self._entered = [], [], {}
        self._repeats = Repeats(self._dim)

    def _interrupt(self) -> None:
        """End what an interrupt has left: it ends a forward pass without any hook being told."""
        while self._calls:
            self._end(self._calls.pop())

    def _end(self, call: Call) -> None:
        if call.close is not None:
            call.close(True)

    def collect(self, batch: Batch | None = None) -> PerExampleResult:
        """What the passes since `arm` have shown.

        Args:
            batch: The batch of the step, or some of its tensors; it settles whether several forward passes saw the same
                examples. None where that is clear.

        Raises:
            Unavailable: No number can be trusted; the reason says why.
        """
        recorder = self._recorder
        if recorder is None:
            raise Unavailable("the model was not listened to")
        experience = self.experience
        experience.probes += 1
        # What goes wrong may be due to a call that has no hook.
        outer, self._outer = self._outer, weakref.WeakSet()
        experience.several = recorder.backwards > 1
        if recorder.stray:
            self._known.forget([(key, course) for key, course, _ in self._courses])
        changed = self._laid is None or self._trained() != self._laid[0]
        if not self._courses and recorder.failure is None and not changed:
            raise Unavailable(
                "no forward pass of the model was seen (a compiled one cannot be seen: give the monitor the loss, "
                "so that it takes passes of its own)"
            )
        collected = recorder.finish()
        experience.coverage = collected.coverage()
        if changed:
            raise Unavailable("which parameters are trained has changed since the last step")
        self._settle(batch)
        wanted = self._wanted
        found = collected.result(self._counts(batch), gram=wanted.gram, moments=wanted.moments, rows=wanted.rows)
        if found.examples < sum(group.examples for group in collected.groups):
            numbers = {group.number for group in collected.groups}
            self._repeats.check([] if batch is None else tensors(batch), found.examples, numbers)
        self._examples = found.examples
        self._known.confirm()
        self._outer = outer
        return found

    def input_gradients(self) -> Tensor:
        """The gradients with respect to the examples' inputs, ``B dL/dx``, (B, ...), after `collect`.

        By way of the model: where the loss itself takes x too, as that of an autoencoder does, it is not seen.

        Raises:
            Unavailable: They cannot be told apart.
        """
        recorder = self._recorder
        if recorder is None or recorder.failure is not None:
            raise Unavailable("the model was not listened to" if recorder is None else str(recorder.failure))
        found = recorder.inputs()
        if len({task for _, task, _ in found}) != len(found) or not found:
            raise Unavailable("the inputs of the examples were not found" if not found else "several forward passes")
        parts = [by_example(flow, self._entered[recording].x, recording.examples) for recording, _, flow in found]
        whole = torch.cat(parts)
        if len(whole) != self._examples:
            raise Unavailable("several forward passes of the same examples")
        return whole * len(whole)

    def _counts(self, batch: Batch | None) -> set[int]:
        """How many examples a batch may hold; nothing if it cannot be told."""
        try:
            return set() if batch is None else {example_count(batch, dim) for dim in {0, self._dim}}
        except GradmonError:
            return set()

    def freeze(self) -> None:
        """The optimizer begins its step: what comes after it does not count, but for the first call of a closure."""
        if self._recorder is not None:
            self._recorder.closing, self._recorder.closed = True, self._recorder.backwards > 0

    def _settle(self, batch: Batch | None) -> None:
        """Make sure which dimension holds the examples, where two could."""
        given = [] if batch is None else list(tensors(batch))
        for seen in self._ambiguous:
            same = (t for t in given if t.shape == seen.shape and t.dtype == seen.dtype)
            if not any(torch.equal(t.detach().to(seen.device), seen) for t in same):
                raise Unavailable(
                    f"the model's input of shape {tuple(seen.shape)} could hold the examples along either of its first "
                    "dimensions: say which by example_dim"
                )

    @property
    def _calls(self) -> list[Call]:
        """The calls under way in this thread, outermost first."""
        return self._local.calls

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a call of a module: if it is the outermost, begin to look into it."""
        recorder = self._recorder
        if torch.compiler.is_compiling() or recorder is None or quiet_depth():
            return None
        calls = self._calls
        while calls and not calls[-1].under_way():
            self._end(calls.pop())
        call = Call(module, here(2))
        calls.append(call)
        if len(calls) == 1:
            self._outer.add(module)
        if len(calls) > 1 or recorder.failure is not None or not torch.is_grad_enabled():
            return None
        if not any(parameter.requires_grad for parameter in recorder.weights.parameters):
            return None  # frozen for this call, as one of two networks is while the other one is trained
        try:
            if running_backward() is not None:
                call.close = self._listen_again(recorder, args, kwargs)
                return None
            return self._listen(recorder, call, module, args, kwargs)
        except Unavailable as missing:
            recorder.fail(missing.reason)
        except Exception as error:
            recorder.fail(told(error))
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a call of a module, also one that failed."""
        calls = self._calls
        if quiet_depth() or not calls or calls[-1].module is not module:
            return
        call = calls.pop()
        if call.close is not None:
            call.close(output is None and sys.exc_info()[0] is not None)

    def _listen_again(self, recorder: Recorder, args: Any, kwargs: Any) -> Callable[[bool], None]:
        """Look into a checkpointed part that is computed once more during the backward pass."""
        inputs = list(tensors((args, kwargs)))
        tapes: list[Tape] = []  # so that the capture is not held by what it calls, in a circle
        capture = Capture(recorder.weights.parameters, inputs, lambda use: recorder.again(use, tapes[0]), first=True)
        tapes.append(capture.tape)
        capture.examples = example_count((args, kwargs), self._dim) if inputs else 0
        return begun(capture, self._model, self.experience.rules)

    def _listen(self, recorder: Recorder, call: Call, module: nn.Module, args: Any, kwargs: Any) -> Any:
        batch = (args, kwargs)
        if not all(parameter.requires_grad for parameter in recorder.weights.parameters):
            raise Unavailable("some of the parameters that are trained were frozen in a forward pass")
        try:
            examples = example_count(batch, self._dim)
        except GradmonError as error:
            raise Unavailable(f"the examples cannot be counted: {error}") from error
        handles = list(self._handles)
        key, course, entry = self._known.of(recorder.weights, module, batch, examples)
        if self._recorder is not recorder:  # the model's own code ended the listening meanwhile
            for handle in handles:
                handle.remove()
            return None
        self._courses.append((key, course, entry))
        first = next(t for t in tensors(batch) if t.ndim > 0)
        if not self._dim_given and first.ndim > 1 and first.shape[0] == first.shape[1] > 1:
            self._ambiguous.append(first.detach().clone())
        self._repeats.note(len(self._courses), list(tensors(batch)), examples)
        source = tuple((weakref.ref(t), version(t)) for t in tensors(batch))
        recording = Recording(recorder, course, examples, number=len(self._courses), source=source)
        self._entered[recording] = course
        replaced: list[tuple[Tensor, Tensor, int]] = []
        inputs = list(tensors(batch))
        capture = Capture(recorder.weights.parameters, inputs, recording.note, examples, self._dim, entry)
        capture.counted = capture.listed = holds_counts(batch, examples)
        recording.tape = capture.tape
        capture.entered = lambda x: recorder.enter(recording, x)
        if entry is not None and entry.position is not None:
            given = inputs[entry.position]
            if not any(given is held for held in (*args, *kwargs.values())):
                entry = None  # inside of a container that belongs to the caller
        if entry is not None and entry.position is not None:
            given = inputs[entry.position]
            x = capture.enter(given, frozenset({entry.position}))
            replaced.append((given, x, version(x)))
            batch = map_tensors(batch, lambda t: x if t is given else t)
        close = begun(capture, self._model, self.experience.rules, entry)

        def finish(failed: bool) -> None:
            close(failed)
            for original, twin, before in replaced:
                if version(twin) != before:  # the model overwrote its input: let the caller see it
                    with torch.no_grad():
                        original.copy_(twin)
            if failed:
                del self._courses[-1]
            elif recorder.failure is None:
                recording.finish()

        call.close = finish
        return batch if replaced else None
