"""The networks of the workloads, and how their weights start."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.data import Data

GAIN = 5 / 3
"""What keeps the size of a signal through tanh layers."""


def mlp(inputs: int, outputs: int, depth: int, width: int) -> nn.Sequential:
    """``depth`` times a linear layer of ``width`` units and tanh, and a linear layer.

    Args:
        inputs: Numbers of an example, whatever its shape.
        outputs: Numbers that it returns: (B, ...) to (B, outputs).
        depth: Hidden layers, from 0.
        width: Units of each.
    """
    widths = [inputs, *[width] * depth]
    hidden = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], outputs))


class TextNetwork(nn.Module):
    """Convolutions over the vectors of words, one after another, each followed by tanh, and a linear layer.

    Every third convolution is followed by a mean over each two neighbours, as long as there are as many.

    Args:
        vectors: The vectors, (V, D); they are not trained.
        outputs: Numbers that it returns: (B, length), int64, to (B, outputs).
        depth: Convolutions.
        width: Channels of each.
    """

    def __init__(self, vectors: Tensor, outputs: int, depth: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(vectors)
        widths = [vectors.shape[1], *[width] * depth]
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], outputs)

    def forward(self, words: Tensor) -> Tensor:
        """(B, length) to (B, outputs)."""
        h = self.words(words).transpose(1, 2)
        for number, convolution in enumerate(self.convolutions, 1):
            h = torch.tanh(convolution(h))
            if number % 3 == 0 and h.shape[2] > 1:
                h = nn.functional.avg_pool1d(h, 2)
        return self.last(h.mean(2))


def _deep(data: Data, depth: int | None, width: int | None) -> nn.Module:
    return mlp(_numbers(data), data.classes, 27 if depth is None else depth, 10 if width is None else width)


def _text(data: Data, depth: int | None, width: int | None) -> nn.Module:
    if data.vectors is None:
        raise ArgumentError("--model", "be A or B for images; C reads texts", f"C with {data.name}")
    return TextNetwork(data.vectors, data.classes, 12 if depth is None else depth, 10 if width is None else width)


def _shallow(data: Data, depth: int | None, width: int | None) -> nn.Module:
    return mlp(_numbers(data), data.classes, 3 if depth is None else depth, 10 if width is None else width)


def _numbers(data: Data) -> int:
    if data.vectors is not None:
        raise ArgumentError("--model", "be C for texts; A and B read images", f"A or B with {data.name}")
    return data.train_inputs[0].numel()


MODELS: dict[str, Callable[[Data, int | None, int | None], nn.Module]] = {"A": _deep, "B": _shallow, "C": _text}
"""The models of the average gradient's paper, as far as they are known, by data, depth and width (None: the model's).

A: the deep one, 27 linear layers of 10 units with tanh, on images. B: the shallow one, 3 of them. C: the deep sequence
of convolutions, on texts; that there are 12 of 10 channels, and what is between them, is our choice.
"""


def _glorot(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight, GAIN)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _as_made(model: nn.Module) -> None:
    """Leave the weights as PyTorch makes them."""


INITS: dict[str, Callable[[nn.Module], None]] = {"glorot": _glorot, "default": _as_made}
"""How weights start: Glorot's uniform distribution with gain 5/3 and biases of zero, or PyTorch's own."""
