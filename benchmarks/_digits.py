"""scikit-learn's digits: what tightness.py and masks.py train their networks on."""

from __future__ import annotations

import torch
from overhead import Batch, loss
from torch import nn

RATE = 3e-3
"""Adam's learning rate."""


def digits() -> Batch:
    """All 1,797 in a fixed random order: images of 8 x 8 pixels in [0, 1], (N, 1, 8, 8), and their labels, (N,)."""
    # Only the demo and two benchmarks need it: an extra, not a dependency.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return x[order], torch.as_tensor(labels, dtype=torch.int64)[order]


def train(model: nn.Module, data: Batch, steps: int) -> None:
    """Adam on batches of 64, drawn from the data with the global random state."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (64,))
        optimizer.zero_grad()
        loss(model, (data[0][chosen], data[1][chosen])).backward()
        optimizer.step()
