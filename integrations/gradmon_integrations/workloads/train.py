"""Batches for the workloads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradmon._errors import ArgumentError

Batch = tuple[Tensor, Tensor]


def centred(inputs: Tensor) -> Tensor:
    """Inputs with mean 0 in each place, and standard deviation 1 over all of them; whole numbers stay as they are."""
    if not inputs.is_floating_point():
        return inputs
    moved = inputs - inputs.mean(0)
    return moved / moved.std()


def batches(inputs: Tensor, targets: Tensor, size: int, epochs: int, seed: int) -> Iterator[Batch]:
    """The batches of some epochs, newly shuffled each; a last, smaller batch is left out.

    Args:
        inputs: (N, ...).
        targets: (N,).
        size: The examples of a batch.
        epochs: How many epochs.
        seed: The seed of the order.

    Yields:
        (size, ...) and (size,).

    Raises:
        ArgumentError: There are not as many examples.
    """
    if not 1 <= size <= len(targets):
        raise ArgumentError("batch_size", f"be from 1 to {len(targets)}, the number of examples", size)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        for chosen in order[: len(targets) // size * size].split(size):
            yield inputs[chosen], targets[chosen]
