"""The micro-batches of one optimizer step, as one batch with one loss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradmon import GradmonError, Unavailable
from gradmon._batches import example_count, map_tensors, tensors
from gradmon._types import Batch, Loss, Reduction
from gradmon.per_example._autograd import current_mode
from gradmon.per_example.capture import Capture

Kind = Literal["mean", "share", "unknown"]
"""Whether the loss of a micro-batch is that of the step if it stood alone, or its share of it."""


class MicroBatch(NamedTuple):
    """A part of what one optimizer step is made of.

    Attributes:
        batch: The batch.
        weight: By what its loss is multiplied before the backward pass.
        kind: What its loss is, apart from the weight: a mean over its own examples, or their share of a mean over all.
    """

    batch: Batch
    weight: float
    kind: Kind = "mean"


class Accumulated(NamedTuple):
    """All that one optimizer step is made of.

    Attributes:
        examples: As many entries as there are examples, (B,), so that they can be counted; None where they cannot.
        parts: The micro-batches.
    """

    examples: Tensor | None
    parts: tuple[MicroBatch, ...]


def gathered(parts: Sequence[MicroBatch], *, join: bool = False) -> Batch:
    """Micro-batches as one batch for a loss made by `accumulating`.

    Args:
        parts: The micro-batches, at least one.
        join: Whether to lay them end to end, where they are alike but for what is in them.

    Returns:
        The batch itself where there is only one, and its loss is taken as it is.
    """
    joined = _joined(parts) if join and len(parts) > 1 else None
    if joined is not None:
        parts = [joined]
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].batch
    try:
        examples = torch.arange(sum(example_count(part.batch) for part in parts))
    except GradmonError:
        examples = None
    return Accumulated(examples, tuple(parts))


def accumulating(loss: Loss, reduction: Reduction = "mean", *, twice: bool = False) -> Loss:
    """A loss that also takes what `gathered` makes: the sum of the micro-batches' losses times their weights.

    Each micro-batch is differentiated before the next one's forward pass begins, so that a pass needs no more memory
    than the training does. So the gradients of single examples are not to be seen in there.

    Args:
        loss: The loss of one micro-batch.
        reduction: How one value per example becomes the loss of a micro-batch.
        twice: Whether it is going to be differentiated twice; then forward passes are made again instead.
    """
    return functools.partial(_over_parts, loss, reduction, twice)  # a partial: the core looks into it for modules


def _over_parts(loss: Loss, reduction: Reduction, twice: bool, model: nn.Module, batch: Batch) -> Tensor:
    if not isinstance(batch, Accumulated):
        return loss(model, batch)
    if len(batch.parts) == 1:
        part = batch.parts[0]
        return part.weight * loss(model, part.batch)
    if isinstance(current_mode(), Capture):
        raise Unavailable(
            "single examples are not looked at in several micro-batches: join=True takes them together"
            " where they are of one shape and their losses add up"
        )
    return (_kept if twice else _at_once)(loss, reduction, model, batch.parts)


def _kept(loss: Loss, reduction: Reduction, model: nn.Module, parts: Sequence[MicroBatch]) -> Tensor:
    """The sum with its graph, of which each micro-batch's part is made again when its turn has come."""
    total: Any = 0.0
    for part in parts:
        rows: Any = checkpoint(_on_a_copy, loss, model, part.batch, use_reentrant=False)
        total = total + part.weight * (rows.mean() if reduction == "mean" else rows.sum())
    return total


def _at_once(loss: Loss, reduction: Reduction, model: nn.Module, parts: Sequence[MicroBatch]) -> Tensor:
    """The sum with its gradient, of which each micro-batch's part is had before the next one begins."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients: list[Tensor | None] = [None] * len(parameters)
    total: Any = 0.0
    for part in parts:
        rows = loss(model, part.batch)
        value = part.weight * (rows.mean() if reduction == "mean" else rows.sum())
        found = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
        for place, gradient in enumerate(found):
            before = gradients[place]
            if gradient is not None:
                gradients[place] = gradient if before is None else before + gradient
        total = total + value.detach()
    return _Differentiated.apply(total, gradients, *parameters)


class _Differentiated(torch.autograd.Function):
    """A value whose gradient by some parameters is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        """The value."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients, times what arrives."""
        return None, None, *(None if gradient is None else gradient * grad_outputs[0] for gradient in ctx.gradients)


def _on_a_copy(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch that may be overwritten: the pass that is made again begins with the same."""
    return loss(model, map_tensors(batch, lambda tensor: tensor.clone()))


def _joined(parts: Sequence[MicroBatch]) -> MicroBatch | None:
    """Micro-batches end to end; None where the loss of the whole would not be the sum of theirs."""
    weights, kinds = {part.weight for part in parts}, {part.kind for part in parts}
    held = [list(tensors(part.batch)) for part in parts]
    try:
        sizes = {example_count(part.batch) for part in parts}
    except GradmonError:
        return None
    if (
        len(weights) > 1
        or len(kinds) > 1
        or "unknown" in kinds
        or len(sizes) > 1
        or len({len(found) for found in held}) > 1
    ):
        return None
    size, merged = sizes.pop(), list[Tensor]()
    for columns in zip(*held, strict=True):
        first = columns[0]
        if any(t.shape != first.shape or t.dtype != first.dtype for t in columns):
            return None
        if first.ndim > 0 and len(first) == size:
            merged.append(torch.cat(columns))
        elif all(torch.equal(t, first) for t in columns):
            merged.append(first)
        else:
            return None
    places, times = iter(merged), len(parts) if kinds == {"mean"} else 1
    return MicroBatch(map_tensors(parts[0].batch, lambda _: next(places)), weights.pop() * times)
