"""scikit-learn's digits: 1797 images of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

EXAMPLES = 1797


def digits() -> Batch:
    """All images and their labels.

    Returns:
        (1797, 64), float32, each pixel with mean 0, all of them together with standard deviation 1; and (1797,), int64.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32)
    images = images - images.mean(0)
    return images / images.std(), torch.as_tensor(labels, dtype=torch.int64)


def batches(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, newly shuffled each epoch; a last, smaller batch is left out.

    Args:
        data: Inputs and labels.
        size: The examples of a batch.
        seed: The seed of the order.

    Yields:
        (size, 64) and (size,).
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield images[chosen], labels[chosen]
