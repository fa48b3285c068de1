"""One probe: the forward passes that were looked into, the gradients that arrived, and what was made of them.

A forward pass (a `Recording`) leaves a hook at the output of each use of a parameter. When the gradient arrives there,
the examples' gradients are put into a form at once, and as soon as all uses of a parameter have had theirs, the
products that are wanted are made of it and everything is let go.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmon._errors import Unavailable, told
from gradmon._parameters import Weights
from gradmon.per_example._autograd import after_backward, running_backward, version
from gradmon.per_example.arrival import TOO_LARGE, Source, arrival_hook, picked, recomputed, rows_size, source_of
from gradmon.per_example.calls import Tape
from gradmon.per_example.capture import Use
from gradmon.per_example.collected import Collected
from gradmon.per_example.cut import Cut
from gradmon.per_example.forms import Dense, Shares, one
from gradmon.per_example.groups import Group
from gradmon.per_example.guard import Guard
from gradmon.per_example.products import coordinates, inner_products, moments
from gradmon.per_example.recording import Backward, Live, Recording, Wanted, gradient_state
from gradmon.per_example.rows import Changed, Planned
from gradmon.per_example.rules import Rules
from gradmon.per_example.scratch import Scratch
from gradmon.per_example.ways import Ways

_SCRATCH = 1 << 25
"""The most bytes of one intermediate result, if `max_memory` allows it."""


class Recorder:
    """Everything of one probe.

    Args:
        weights: The layout of `w`, and the coordinates that are looked at.
        sampled: The same for moments, where it is another one.
        wanted: What is to be made of the examples' gradients.
        rules: The rules.
        ways: By which way each use is covered; kept from probe to probe.
        check: Whether every use is compared with the slow way.
        max_memory: The most bytes to hold at a time beside what the training holds.
        scratch: Memory for intermediate results, kept from probe to probe; None for new.
        several: Whether several backward passes are expected, whose gradients add up.
        single: Whether there can be only one.
    """

    def __init__(
        self,
        weights: Weights,
        wanted: Wanted,
        rules: Rules,
        ways: Ways,
        *,
        sampled: Weights | None = None,
        check: bool = True,
        max_memory: int = 1 << 28,
        scratch: Scratch | None = None,
        several: bool = False,
        single: bool = False,
    ) -> None:
        self.weights, self.wanted = weights, wanted
        self._sampled = weights if sampled is None else sampled
        self.failure: str | None = None
        self.stray = self.closing = self.closed = False
        self._left: dict[int, tuple[weakref.ref[Tensor] | None, int]] = {}
        self.backwards = 0
        self._kinds = sorted({"cpu", weights.device.type})
        self._rules, self._ways, self._check, self._several = rules, ways, check, several
        self._max_memory, self.single = max_memory, single
        self.scratch = scratch or Scratch(min(_SCRATCH, max_memory // 4) // 4)
        self._live: list[weakref.ref[Live]] = []
        self._late: dict[tuple[str, tuple[Any, ...]], Live] = {}
        self._now: Backward | None = None
        self._group_of: dict[Recording, Group] = {}
        self._kept: dict[int, dict[Group, list[Shares]]] | None = None if single else {}
        self._versions: list[tuple[Tensor, int]] = []
        self._held = self._rows_held = 0
        self._x: list[tuple[Recording, int, Tensor]] = []
        self.collected = Collected(weights, self._sampled)

    def fail(self, reason: str) -> None:
        """Give up: no number of this probe can be trusted."""
        if self.failure is None:
            self.failure = reason
        self._kept = None
        self._versions.clear()
        self._late.clear()
        if self._now is not None:
            self._now.forms.clear()

    def release(self) -> None:
        """Let go of everything: what forward passes have left refers to this object, and it to them, in a circle."""
        self.fail("it is over")
        self._now, self._group_of, self._x, self.collected = None, {}, [], Collected(self.weights, self._sampled)

    def guarded(self) -> Guard:
        """A context for everything that runs inside the training's own passes: nothing gets out of it."""
        return Guard(self._kinds, self.fail)

    def expect(self, recording: Recording, use: Use, planned: Planned, index: int, tape: Tape) -> None:
        """Leave hooks at the outputs of a use, which hold all that its gradient will meet."""
        nodes: dict[Any, list[tuple[int, Source]]] = {}
        for at, output in enumerate(use.outputs):
            node, source = source_of(output)
            nodes.setdefault(node, []).append((at, source))
        late = not self.single and recomputed() and self._ways.unique(recording.course, planned)
        live = Live(use, planned, recording, index, [None] * len(use.outputs), len(nodes), tape, use.places)
        use.outputs = []
        if late and (use.name, tuple(use.positions)) in self._late:
            self.fail("a checkpointed part ran twice before one backward pass")
        elif late:
            # What is going to be computed once more is not kept meanwhile.
            live.use = None
            self._late[use.name, tuple(use.positions)] = live
        for node, places in nodes.items():
            node.register_prehook(arrival_hook(self, live, places))
        self._live.append(weakref.ref(live))

    def again(self, use: Use, tape: Tape) -> None:
        """A use is met again while a checkpointed part is computed once more: now its activations are known."""
        live = self._late.pop((use.name, tuple(use.positions)), None)
        if live is None or self.failure is not None:
            return
        use.places, use.outputs = live.places, []
        live.use, live.tape = use, tape
        if live.waiting == 0:
            with self.guarded():
                self._process(live)

    def arrive(self, live: Live, places: Sequence[tuple[int, Source]], gradients: Sequence[Tensor | None]) -> None:
        """The gradient at some outputs of a use."""
        if self.failure is not None:
            return
        with self.guarded():
            task = running_backward()
            if task is None:
                return
            if live.task is not None and (live.task != task or live.waiting == 0):
                raise Unavailable("a backward pass ran twice through the same graph")
            live.task = task
            if self._now is None or self._now.task != task or self._now.ended:
                self._begin(task)
            for at, source in places:
                gradient = gradients[source.number]
                if gradient is not None and gradient.requires_grad:
                    raise Unavailable("the backward pass is differentiated itself (create_graph=True)")
                live.arrived[at] = source.take(gradients)
            live.waiting -= 1
            if live.waiting == 0 and live.use is not None:
                self._process(live)

    def _begin(self, task: int) -> None:
        if self._now is not None and not self._now.ended:
            raise Unavailable("a backward pass did not finish, or ran inside another one")
        if self.closed:
            raise Unavailable("a backward pass ran after the optimizer had begun its step")
        self._compare_gradients()
        alive = [live for ref in self._live if (live := ref()) is not None and not live.done]
        remaining: dict[int, int] = {}
        for live in alive:
            for position in (p for positions in live.planned.positions for p in positions):
                remaining[position] = remaining.get(position, 0) + 1
        recordings = list(dict.fromkeys(live.recording for live in alive if live.recording is not None))
        self._now = Backward(task, remaining, recordings, len(recordings) == 1)
        after_backward(self._end)

    def _compare_gradients(self) -> None:
        """See whether the gradients of the backward passes so far are still there, to be added to."""
        states = [gradient_state(self.weights.parameters[position], state) for position, state in self._left.items()]
        if states and all(state == "gone" for state in states):
            self._begin_anew()
        elif any(state != "same" for state in states):
            raise Unavailable("gradients were changed between two backward passes of one step")

    def _begin_anew(self) -> None:
        """Forget the backward passes so far: their gradients were thrown away, or reached no parameter."""
        self.backwards = 0
        self._left.clear()
        self._group_of.clear()
        self._held = self._rows_held = 0
        self._versions.clear()
        self._kept = None if self._kept is None else {}
        self.collected.clear()

    def _group(self, recording: Recording) -> Group:
        if recording not in self._group_of:
            assert self._now is not None
            self._group_of[recording] = group = Group(
                self._now.task, recording.number, recording.examples, recording.source
            )
            self.collected.join(group)
        return self._group_of[recording]

    def _end(self) -> None:
        """The backward pass is over: what is still open had no gradient anywhere else."""
        if self._now is None or self._now.ended:
            return
        with self.guarded():
            for live in [live for ref in self._live if (live := ref()) is not None]:
                if live.task == self._now.task and not live.done:
                    if live.use is None:
                        raise Unavailable(f"what `{live.planned.name}` was given was not computed once more")
                    self._process(live)
            for position in list(self._now.forms):
                self._conclude(position)
            self._now.ended = True
            if not self.single and not self.collected.received(self._now.task):
                if self.backwards:
                    raise Unavailable("a backward pass reached no parameter")
                self._begin_anew()
                return
            self.backwards += 1
            self.closed = self.closing
            if self.single:
                self._note_left(self._now.task)
            else:  # after what others do at the end of a backward pass: ranks put the means over all of them there
                after_backward(functools.partial(self._note_left, self._now.task))

    def _note_left(self, task: int) -> None:
        """Note the gradients as a backward pass left them."""
        with self.guarded():
            for position in self.collected.received(task):
                gradient = self.weights.parameters[position].grad
                self._left[position] = (None, 0) if gradient is None else (weakref.ref(gradient), version(gradient))

    def _process(self, live: Live) -> None:
        use, now = live.use, self._now
        assert use is not None
        assert now is not None
        recording = live.recording
        assert recording is not None
        self._group(recording)
        coarsest = torch.float64 if self.wanted.precise and self.weights.device.type != "mps" else torch.float32
        part = Cut(use, live.planned, live.arrived, recording.examples, self.scratch, coarsest)
        self.collected.noted(live.arrived, coarsest)
        try:
            part.check()
            forms, way = self._ways.forms(part, self._rules, (recording.course, live.index), check=self._check)
        except Changed:
            self.stray = True
            raise
        live.done, live.use, live.arrived, live.recording = True, None, [], None
        for key, positions, form in zip(use.keys, live.planned.positions, forms, strict=True):
            for position, shares in self._ways.to_parameters(part, live.tape, key, positions, form, self.weights):
                now.forms.setdefault(position, {}).setdefault(recording, []).append(shares)
            for position in positions:
                self.collected.cover(position, way, now.task)
                now.remaining[position] -= 1
                if now.remaining[position] == 0:
                    self._conclude(position)

    def _conclude(self, position: int) -> None:
        """Make the products of one parameter, all of whose uses have had their gradients."""
        now = self._now
        assert now is not None
        found = now.forms.pop(position, None)
        if found is None:
            return
        forms = {self._group(recording): shares for recording, shares in found.items()}
        budget, wanted = self.scratch.budget, self.wanted
        picks, spots = picked(self.weights, position), picked(self._sampled, position)
        if wanted.example is not None:
            for shares in forms.values():
                self.collected.add_share(position, torch.stack([one(form, wanted.example) for form in shares]).sum(0))
        if wanted.rows:
            if not self.single:
                self._rows_held += rows_size(self.weights, position, list(forms.values()))
                if self._rows_held > self._max_memory:
                    raise Unavailable(TOO_LARGE)
            for group, shares in forms.items():
                self.collected.add_rows(position, group, self._coordinates(position, shares, picks))
        looked_at: dict[Group, list[Shares]] = forms
        if wanted.gram and picks is not None:
            looked_at = {group: list[Shares]([Dense(coordinates(shares, picks))]) for group, shares in forms.items()}
        if wanted.moments:
            same = looked_at is not forms and self._sampled is self.weights
            for group, shares in (looked_at if same else forms).items():
                index = None if same else spots
                if now.alone:
                    self.collected.add_moments(position, group, moments(shares, index, budget))
                else:  # the same examples may come in other forward passes too
                    self.collected.add_rows(position, group, self._coordinates(position, shares, index))
        if wanted.gram:
            self._keep(position, looked_at)
            if not self._several or self._kept is None:
                self.collected.add_products(position, list(looked_at), inner_products(list(looked_at.values()), budget))

    def _coordinates(self, position: int, shares: Sequence[Shares], index: Tensor | None) -> Tensor:
        if index is None:
            shapes = shares[0].shape
            index = torch.arange(math.prod(shapes), device=self.weights.parameters[position].device)
        return coordinates(shares, index)

    def _keep(self, position: int, forms: dict[Group, list[Shares]]) -> None:
        """Keep the forms, in case that another backward pass follows whose gradients are to be added."""
        if self._kept is None:
            return
        size = sum(t.untyped_storage().nbytes() for shares in forms.values() for form in shares for t in form.kept)
        self._held += size
        # Where one backward pass is all there has ever been, little is kept for the case that there are several.
        if self._held > (self._max_memory if self._several else self._max_memory // 8):
            self._kept = None
            self._versions.clear()
            self._held = 0
            if self._several:
                raise Unavailable(
                    f"what several backward passes leave would take more than max_memory, {self._max_memory} bytes: "
                    "allow for more, or look at some coordinates only (mask)"
                )
            return
        self._kept.setdefault(position, {}).update(forms)
        for shares in forms.values():
            self._versions += [(t, version(t)) for form in shares for t in form.kept]

    def gradient(self, position: int, gradient: Tensor, task: int | None = None) -> None:
        """The gradient that a parameter was sent, for comparison.

        Args:
            position: The parameter's position.
            gradient: Its gradient.
            task: The backward pass that sent it; None for the one that runs now.
        """
        if self.failure is not None:
            return
        try:
            if gradient.requires_grad:
                gradient = gradient.detach()
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            now = running_backward() if task is None else task
            self.collected.add_gradient(position, -1 if now is None else now, gradient)
        except Exception as error:
            self.fail(told(error))

    @property
    def task(self) -> int:
        """The last backward pass."""
        return -1 if self._now is None else self._now.task

    def enter(self, recording: Recording, x: Tensor) -> None:
        """Wait for the gradient at the examples' inputs."""
        (node, source), held = source_of(x), weakref.ref(recording)

        def arrived(gradients: Sequence[Tensor | None]) -> None:
            now = held()
            if now is not None and now.recorder.failure is None:
                with now.recorder.guarded():
                    gradient = source.take(gradients)
                    if gradient is not None:
                        now.recorder.note_input(now, gradient)

        node.register_prehook(arrived)

    def note_input(self, recording: Recording, gradient: Tensor) -> None:
        """The gradient at the examples' inputs has arrived."""
        self._x.append((recording, running_backward() or 0, gradient))

    def inputs(self) -> list[tuple[Recording, int, Tensor]]:
        """The gradients that arrived at the examples' inputs, with the passes, forward and backward, they belong to."""
        return self._x

    def finish(self) -> Collected:
        """Everything that was found.

        Raises:
            Unavailable: No number can be trusted.
        """
        with self.guarded():
            if self._now is not None and not self._now.ended:
                raise Unavailable("the backward pass did not finish")
            if self.wanted.gram and (self.backwards > 1 or self._several):
                self._across()
        if self.failure is not None:
            raise Unavailable(self.failure)
        return self.collected

    def _across(self) -> None:
        """The inner products of examples of different backward passes."""
        if self._kept is None:
            raise Unavailable(
                f"several backward passes in one step, and what they leave takes more than max_memory, "
                f"{self._max_memory} bytes: allow for more, or look at some coordinates only (mask)"
            )
        if any(version(tensor) != before for tensor, before in self._versions):
            raise Unavailable("what one backward pass left was overwritten before the next: a buffer is used again")
        self.collected.clear_products()
        for position, forms in self._kept.items():
            product = inner_products(list(forms.values()), self.scratch.budget)
            self.collected.add_products(position, list(forms), product)
