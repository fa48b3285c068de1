"""What the networks of the zoo learn: digits, a made text, a made function."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.zoo.configurations import Configuration

Batch = tuple[Tensor, Tensor]

SYMBOLS, CONTEXT = 16, 16
"""The alphabet of the made text, and how many symbols a network sees."""
INPUTS, OUTPUTS = 16, 2
"""The dimensions of the made function."""
PROBE = 64
"""The examples that the loss after some steps is taken on."""
HELD = 512
"""The examples that the final loss is taken on."""


@functools.cache
def digits() -> Batch:
    """scikit-learn's digits in a fixed random order, (1797, 64), mean 0 and deviation 1 over all pixels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(pixels, dtype=torch.float32)[order]
    images = images - images.mean()
    return images / images.std(), torch.as_tensor(labels, dtype=torch.int64)[order]


@functools.cache
def images() -> Batch:
    """The same as images, (1797, 1, 8, 8)."""
    pixels, labels = digits()
    return pixels.reshape(-1, 1, 8, 8), labels


@functools.cache
def text() -> Batch:
    """A Markov chain, each symbol of which depends on the last two: windows, (4096, T), and what follows, (4096, T)."""
    source = torch.Generator().manual_seed(1)
    last, before = (2.0 * torch.randn(2, SYMBOLS, SYMBOLS, generator=source)).unbind()
    table = (last[:, None] + before[None]).transpose(0, 1).softmax(-1)
    walkers, length = 256, CONTEXT * 16 + 1
    chain = torch.zeros(walkers, length + 2, dtype=torch.int64)
    chain[:, :2] = torch.randint(SYMBOLS, (walkers, 2), generator=source)
    for place in range(2, length + 2):
        chances = table[chain[:, place - 2], chain[:, place - 1]]
        chain[:, place] = torch.multinomial(chances, 1, generator=source)[:, 0]
    chain = chain[:, 2:]
    windows = torch.stack([chain[:, at : at + CONTEXT + 1] for at in range(0, length - 1, CONTEXT)], 1)
    windows = windows.reshape(-1, CONTEXT + 1)
    windows = windows[torch.randperm(len(windows), generator=source)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@functools.cache
def function() -> Batch:
    """Sums of waves of standard normal inputs, (4096, 16) to (4096, 2), each output with deviation 1."""
    source = torch.Generator().manual_seed(2)
    x = torch.randn(4096, INPUTS, generator=source)
    directions = torch.randn(INPUTS, 6, OUTPUTS, generator=source) / math.sqrt(INPUTS)
    y = torch.einsum("ni,iko->nko", x, directions).sin().sum(1) + 0.5
    return x, (y - y.mean(0)) / y.std(0) + 0.5


def data_of(of: Configuration) -> Batch:
    """All inputs and targets."""
    if of.family == "regression":
        x, y = function()
        return x, of.scale * y
    return {"mlp": digits, "conv": images, "transformer": text}[of.family]()


def limit_of(of: Configuration) -> float:
    """The final loss above which a run has failed.

    0.5 for digits; for the text half-way between guessing from the frequencies and what a network can reach; for the
    function a third of the targets' variance.
    """
    return {"mlp": 0.5, "conv": 0.5, "transformer": TEXT_LIMIT}.get(of.family, of.scale**2 / 3)


TEXT_LIMIT = 2.2


def chance_of(of: Configuration) -> float:
    """The loss of who knows nothing: the logarithm of the classes, or the targets' variance."""
    return {"mlp": math.log(10), "conv": math.log(10), "transformer": math.log(SYMBOLS)}.get(of.family, of.scale**2)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, or the mean square where targets are real."""
    inputs, targets = batch
    outputs = model(inputs)
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def probe(of: Configuration) -> Batch:
    """The last examples of the data, which no batch holds."""
    inputs, targets = data_of(of)
    return inputs[-PROBE:], targets[-PROBE:]


def held(of: Configuration) -> Batch:
    """The first examples of the data, on which the final loss is taken."""
    inputs, targets = data_of(of)
    return inputs[:HELD], targets[:HELD]


def order(of: Configuration, steps: int) -> Tensor:
    """Which examples each batch of a run holds, (steps, B)."""
    count = len(data_of(of)[1]) - PROBE
    source = torch.Generator().manual_seed(20_000 + of.number)
    return torch.randint(count, (steps, of.batch), generator=source)
