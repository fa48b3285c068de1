"""The gradients of single examples as shares of the batch gradient.

``h_i = B * (the part of dL/dw that flows through example i's rows of each use of a parameter)``, so that the mean of
the h_i is exactly the gradient of the batch loss, whatever its reduction, and also where examples interact.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradmon._batches import batch_tensors, replace_tensor
from gradmon._errors import GradmonError, Unavailable
from gradmon._objective import Gradient, Objective, dense
from gradmon._tensors import length, wide
from gradmon._types import Batch
from gradmon.per_example.capture import Capture, Entry, Use
from gradmon.per_example.replay import RULES, cut, replay
from gradmon.per_example.rows import Ownership, Rows, Spread, Still, Unknown, find_owners


class Pass:
    """One forward and backward pass, from which the shares of single examples can be read while it is open.

    Attributes:
        gradient: The batch loss and its gradient.
    """

    def __init__(self, objective: Objective, capture: Capture, owners: list[list[Ownership]], loss: Tensor) -> None:
        parameters = objective.weights.parameters
        self._objective = objective
        self._examples = objective.examples
        self._uses = capture.uses
        self._owners = owners
        edges = [edge for use in self._uses for edge in use.outputs]
        last = capture.x.outputs if capture.x is not None else []
        found: list[Tensor | None] = [None] * (len(parameters) + len(edges) + len(last))
        if loss.requires_grad:
            found = _differentiate([loss], [*parameters, *edges, *last])
        self.gradient: Gradient = objective.collect(loss, found[: len(parameters)])
        flowing = iter(found[len(parameters) : len(parameters) + len(edges)])
        self._flows = [[next(flowing) for _ in use.outputs] for use in self._uses]
        self._targets = [[self._behind(behind) for _, behind in use.sources] for use in self._uses]
        self._x = None if capture.x is None else (capture.x.values[0], found[-1], owners[-1][0])

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The examples' inputs x, examples first, (B, ...), and ``B dL/dx``.

        Raises:
            Unavailable: The inputs were not asked for, or the rows of x cannot be assigned to examples.
        """
        if self._x is None:
            raise Unavailable("the inputs of the examples were not found")
        value, flow, owner = self._x
        x = self._by_example(value, owner)
        return x, torch.zeros_like(x) if flow is None else self._by_example(flow, owner) * self._examples

    def _behind(self, behind: Tensor | GradientEdge) -> list[int]:
        """The positions of the parameters that something is made of."""
        parameters = self._objective.weights.parameters
        for position, parameter in enumerate(parameters):
            if behind is parameter:
                return [position]
        shape = torch.ones_like(behind) if isinstance(behind, Tensor) else None
        if shape is None:
            return list(range(len(parameters)))
        found = _differentiate([behind], parameters, [shape])
        return [position for position, part in enumerate(found) if part is not None]

    def _by_example(self, tensor: Tensor, owner: Ownership) -> Tensor:
        if isinstance(owner, Spread):
            return tensor if tensor.ndim and tensor.shape[0] == 1 else tensor.unsqueeze(0)
        if not isinstance(owner, Rows) or tensor.shape[owner.dim] != self._examples:
            reason = owner.reason if isinstance(owner, Unknown) else "x has several rows per example"
            raise Unavailable(f"the inputs of single examples cannot be told apart: {reason}")
        return tensor.movedim(owner.dim, 0)

    def share(self, example: int | None, uses: Sequence[int] | None = None) -> list[Tensor]:
        """The gradient h_i of one example, or the sum of all shares for None; one tensor per parameter.

        Args:
            example: The example.
            uses: Only what flows through these uses; None for all.

        Raises:
            Unavailable: The rows of some use cannot be assigned to examples.
        """
        parameters = self._objective.weights.parameters
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for place in range(len(self._uses)) if uses is None else uses:
            use, targets = self._uses[place], self._targets[place]
            pieces = self._pieces(place, example)
            for piece, (_, behind), positions in zip(pieces, use.sources, targets, strict=True):
                if piece is not None:
                    self._add(total, piece, behind, positions)
        return total

    def _pieces(self, place: int, example: int | None) -> Sequence[Tensor | None]:
        """The share of one example in one use, for each of its sources."""
        use, outputs, seeds = self._uses[place], list[GradientEdge](), list[Tensor]()
        for edge, owner, flow in zip(use.outputs, self._owners[place], self._flows[place], strict=False):
            if flow is None or (isinstance(owner, Unknown) and not bool(flow.any())):
                continue
            outputs.append(edge)
            seeds.append(_restrict(flow, owner, example, self._examples))
        aliases = [alias for alias, _ in use.sources]
        if not outputs:
            return [None] * len(aliases)
        # Some kernels end the process where the weights' gradient is wanted without the input's (group_norm, memory
        # in channels-last order): there the input's is asked for too, and not used.
        more = use.call.activations if use.call is not None and use.name == "group_norm" else []
        return _differentiate(outputs, [*aliases, *(a for a in more if a.requires_grad)], seeds)[: len(aliases)]

    def _add(self, total: list[Tensor], piece: Tensor, behind: Tensor | GradientEdge, positions: list[int]) -> None:
        parameters = self._objective.weights.parameters
        if len(positions) == 1 and behind is parameters[positions[0]]:
            total[positions[0]] += dense(piece, parameters[positions[0]])
            return
        chosen = [parameters[position] for position in positions]
        parts = _differentiate([behind], chosen, [piece])
        for position, part in zip(positions, parts, strict=True):
            if part is not None:
                total[position] += dense(part, parameters[position])

    def rows(self) -> Tensor:
        """The looked-at coordinates of every example's gradient, (B, k).

        Raises:
            Unavailable: The rows of some use cannot be assigned to examples.
        """
        weights = self._objective.weights
        sizes = [held for _, held, _ in weights.coordinates.segments]
        blocks = [
            parameter.new_zeros(self._examples, held) for parameter, held in zip(weights.parameters, sizes, strict=True)
        ]
        slow = [place for place in range(len(self._uses)) if not self._replayed(place, blocks)]
        for example in range(self._examples) if slow else ():
            for position, part in enumerate(self.share(example, slow)):
                blocks[position][example] += weights.pick_one(position, part.reshape(1, -1))[0]
        return torch.cat([block.to(weights.device, weights.dtype) for block in blocks], dim=1)

    def _replayed(self, place: int, blocks: list[Tensor]) -> bool:
        """Add the shares of all examples in one use at once; False, and nothing added, where that cannot be trusted."""
        use, weights = self._uses[place], self._objective.weights
        if any(len(positions) != 1 or behind is not weights.parameters[positions[0]]
               for positions, (_, behind) in zip(self._targets[place], use.sources, strict=True)):  # fmt: skip
            return False
        positions = [targets[0] for targets in self._targets[place]]
        example = self._examples // 2
        try:
            part = cut(use, self._owners[place], self._flows[place], self._examples, example)
            if part is None:
                return False
            picks = [None if weights.picks is None else weights.picks[position] for position in positions]
            found = RULES.get(part.call.func, replay)(part, picks)
        except (RuntimeError, ValueError, TypeError, AssertionError):  # vmap does not know every function
            return False
        if found is None:
            return False
        together, alone = self._pieces(place, None), self._pieces(place, example)
        for shares, whole, one in zip(found, together, alone, strict=True):
            if whole is None or one is None:
                return False
            size = shares.length / self._examples**0.5
            if not _agrees(shares.total / self._examples, whole, size) or not _agrees(shares.one, one, size):
                return False
        for shares, position in zip(found, positions, strict=True):
            blocks[position] += shares.rows
        return True

    def check(self) -> None:
        """Make sure that no gradient took a way that was not seen: all shares together are the batch gradient.

        Raises:
            Unavailable: They are not, for some parameter.
        """
        weights = self._objective.weights
        seen = {position for targets in self._targets for positions in targets for position in positions}
        for position, name in enumerate(weights.names):
            if position not in seen and position not in self.gradient.unused:
                raise Unavailable(f"no call is seen that uses `{name}`, although the loss depends on it")
        whole = math.sqrt(sum(length(part) ** 2 for part in self.gradient.parts))
        for name, part, share in zip(weights.names, self.gradient.parts, self.share(None), strict=True):
            epsilon = torch.finfo(part.dtype).eps
            size, gap = length(part), length(wide(share) - wide(part))
            # A gradient that cancels is rounding error, of the size of what was added up; it is never all zero.
            if gap > size * epsilon**0.5 and (gap > 8 * epsilon * whole or not bool(share.any())):
                raise Unavailable(f"the examples' gradients of `{name}` do not add up to its batch gradient")


def _without_zeros(value: Tensor) -> Tensor:
    """The weights with small positive numbers in the place of zeros, which would hide what depends on what."""
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value) + 0.5
    size = length(value) / max(1, value.numel()) ** 0.5
    return torch.where(value == 0, noise * (0.1 * size if size > 0 else 0.1), value)


def _agrees(found: Tensor, expected: Tensor, size: float) -> bool:
    """Whether two gradients are the same up to rounding, at the size of what was added up."""
    return length(wide(found) - wide(dense(expected, found))) <= size * torch.finfo(found.dtype).eps ** 0.5


def _differentiate(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    seeds: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """`torch.autograd.grad` on a graph that is kept, with edges in the place of tensors."""
    grad: Any = torch.autograd.grad  # its types know no mixture of tensors and edges
    try:
        return list(grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Unavailable(f"the backward pass cannot be taken in parts: {error}") from error


def _restrict(flow: Tensor, owner: Ownership, example: int | None, examples: int) -> Tensor:
    """The gradient at an output, times B, on one example's rows only; as it is for all examples."""
    if isinstance(owner, Unknown):
        raise Unavailable(f"per-example gradients cannot be had: {owner.reason}")
    if isinstance(owner, Spread) or example is None:
        return flow
    index = owner.of(example)
    return torch.zeros_like(flow).index_copy_(owner.dim, index, flow.index_select(owner.dim, index) * examples)


class PerExample:
    """Per-example passes of one objective: which rows belong to whom is found out once, then used by every pass.

    Args:
        objective: The objective, inside its sandbox.
        entry: Where x enters; None if x is not wanted.

    Raises:
        Unavailable: The forward pass does not repeat itself.
    """

    def __init__(self, objective: Objective, entry: Entry | None = None) -> None:
        self._objective = objective
        self.entry = entry
        self._uses, self._owners = find_owners(self._look, objective.copied(), objective.examples)
        self._checked = False

    def _look(self, batch: Batch) -> Capture:
        values = [_without_zeros(value) for value in self._objective.base]
        with self._objective.at(values), Still():
            return self._forward(self._objective.copied(batch), None, keep=True)[0]

    def _forward(self, batch: Batch, delta: Tensor | None, *, keep: bool) -> tuple[Capture, Tensor]:
        entry = self.entry
        inputs = batch_tensors(batch)
        capture = Capture(self._objective.weights.parameters, inputs, entry, delta, keep)
        with contextlib.ExitStack() as stack:
            if entry is not None and entry.position is not None:
                x = capture.enter(inputs[entry.position], frozenset({entry.position}))
                batch = replace_tensor(batch, entry.position, x)
            if entry is not None and entry.module is not None:
                stack.callback(entry.module.register_forward_hook(_hook(capture)).remove)
            try:
                with capture:
                    loss = self._objective.evaluate(batch)
            except (GradmonError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                kind = type(error).__name__
                raise Unavailable(f"the forward pass cannot be looked into: {kind}: {error}") from error
        return capture, loss

    @contextlib.contextmanager
    def run(
        self,
        *,
        batch: Batch | None = None,
        values: Sequence[Tensor] | None = None,
        delta: Tensor | None = None,
    ) -> Generator[Pass]:
        """A forward and backward pass.

        Args:
            batch: A batch of as many examples; None for the objective's own.
            values: Other weights.
            delta: What is added to x; examples first, (B, ...).

        Raises:
            Unavailable: The pass took another course than the first ones, or the shares would not add up.
        """
        shift = None if delta is None else self._along_x(delta)
        with self._objective.at(values):
            capture, loss = self._forward(self._objective.copied(batch), shift, keep=False)
            uses = capture.uses if capture.x is None else [*capture.uses, capture.x]
            if [use.signature for use in uses] != [use.signature for use in self._uses]:
                raise Unavailable("the forward pass does not repeat itself")
            taken = Pass(self._objective, capture, self._owners, loss)
            if not self._checked:
                taken.check()
                self._checked = True
            yield taken

    def _along_x(self, delta: Tensor) -> Tensor:
        owner = self._owners[-1][0]
        return delta.movedim(0, owner.dim) if isinstance(owner, Rows) else delta.reshape(self._uses[-1].values[0].shape)


def _hook(capture: Capture) -> Any:
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
    with objective.at():
        capture = Capture(objective.weights.parameters, inputs)
        with capture:
            objective.evaluate(batch)
    consumed = frozenset[int]().union(*(use.origins for use in capture.uses if not _scalar(use)))
    for position, tensor in enumerate(inputs):
        if tensor.is_floating_point() and position in consumed:
            return Entry(position=position)
    whole = {position for position, tensor in enumerate(inputs) if not tensor.is_floating_point()}
    for call, origins in enumerate(capture.embeddings):
        if origins <= whole:
            return Entry(embedding=call)
    raise Unavailable("the batch holds no floating-point input, and no embedding consumes its integers")


def _scalar(use: Use) -> bool:
    return all(value.numel() == 1 for value in use.values)
