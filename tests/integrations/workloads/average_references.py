"""Slow truths about the average gradient, written down layer by layer from the definition, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NEAR = 1.19e-7


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def normal(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cumulative(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return (1 + inner) / 2 + x * (1 - inner**2) / 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def _mish_slope(x: Tensor) -> Tensor:
    inner = torch.tanh(torch.log1p(torch.exp(x)))
    return inner + x * (1 - inner**2) * sigmoid(x)


_SCALE, _ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

# CELU with 1/2: torch keeps 1/alpha in float32, so that for other alphas its own derivative is off by 1e-8.
BY_HAND: dict[str, Pair] = {
    "tanh": (lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1), lambda x: 1 / torch.cosh(x) ** 2),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
    "elu": (
        lambda x: torch.where(x > 0, x, 1.3 * (torch.exp(x) - 1)),
        lambda x: torch.where(x > 0, torch.ones_like(x), 1.3 * torch.exp(x)),
    ),
    "selu": (
        lambda x: _SCALE * torch.where(x > 0, x, _ALPHA * (torch.exp(x) - 1)),
        lambda x: _SCALE * torch.where(x > 0, torch.ones_like(x), _ALPHA * torch.exp(x)),
    ),
    "celu": (
        lambda x: torch.where(x > 0, x, 0.5 * (torch.exp(x / 0.5) - 1)),
        lambda x: torch.where(x > 0, torch.ones_like(x), torch.exp(x / 0.5)),
    ),
    "gelu": (lambda x: x * cumulative(x), lambda x: cumulative(x) + x * normal(x)),
    "gelu-tanh": (_gelu_tanh, _gelu_tanh_slope),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    "softplus": (lambda x: torch.log1p(torch.exp(2 * x)) / 2, lambda x: sigmoid(2 * x)),
    "mish": (lambda x: x * torch.tanh(torch.log1p(torch.exp(x))), _mish_slope),
    "hardswish": (
        lambda x: torch.where(x <= -3, 0 * x, torch.where(x >= 3, x, x * (x + 3) / 6)),
        lambda x: torch.where(x <= -3, 0 * x, torch.where(x >= 3, torch.ones_like(x), (2 * x + 3) / 6)),
    ),
    "softsign": (lambda x: x / (1 + x.abs()), lambda x: 1 / (1 + x.abs()) ** 2),
    "logsigmoid": (lambda x: -torch.log1p(torch.exp(-x)), lambda x: 1 - sigmoid(x)),
    "tanhshrink": (lambda x: x - torch.tanh(x), lambda x: torch.tanh(x) ** 2),
    "sin": (torch.sin, torch.cos),
    "cos": (torch.cos, lambda x: -torch.sin(x)),
    "atan": (torch.atan, lambda x: 1 / (1 + x * x)),
    "asinh": (lambda x: torch.log(x + torch.sqrt(x * x + 1)), lambda x: 1 / torch.sqrt(x * x + 1)),
    "erf": (torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x)),
}
"""Each function that is averaged, and its derivative."""


class Network:
    """Linear layers with one function between each two, and a mean squared error.

    Args:
        weights: One matrix a layer, (outputs, inputs).
        biases: One vector a layer.
        pair: The function and its derivative.
        inputs: (B, inputs).
        targets: (B, outputs).
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], pair: Pair, inputs: Tensor, targets: Tensor
    ):
        self.start = [weight.clone() for weight in weights], [bias.clone() for bias in biases]
        self.function, self.derivative = pair
        self.inputs, self.targets = inputs, targets

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What enters each function, and what enters each layer; the last of both is the output."""
        entering, values = [], [self.inputs]
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            entering.append(values[-1] @ weight.T + bias)
            values.append(self.function(entering[-1]) if layer < len(weights) - 1 else entering[-1])
        return entering, values

    def loss(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> float:
        return float(((self.forward(weights, biases)[1][-1] - self.targets) ** 2).mean())

    def gradient(
        self, after: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None, *, midpoint: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient at the start, or its average from the start to where a step led."""
        weights, biases = self.start
        entering, values = self.forward(weights, biases)
        entering_after, values_after = (entering, values) if after is None else self.forward(*after)
        weights_after = weights if after is None else after[0]
        back = 2 * (values[-1] - self.targets) / self.targets.numel()
        of_weights: list[Tensor] = []
        of_biases: list[Tensor] = []
        for layer in reversed(range(len(weights))):
            if layer < len(weights) - 1:
                moved = entering_after[layer] - entering[layer]
                slopes = self.derivative(entering[layer])
                far = moved.abs() > NEAR
                slopes[far] = (values_after[layer + 1] - values[layer + 1])[far] / moved[far]
                back = back * slopes
            entered, weight = values[layer], weights[layer]
            if midpoint:
                entered, weight = (entered + values_after[layer]) / 2, (weight + weights_after[layer]) / 2
            of_weights.insert(0, back.T @ entered)
            of_biases.insert(0, back.sum(0))
            back = back @ weight
        return of_weights, of_biases

    def step(self, lengths: Sequence[Sequence[Tensor]], iterations: int, *, midpoint: bool = False) -> list[Tensor]:
        """The weights and biases after a step of these lengths: all weights, then all biases."""
        average = self.gradient()
        reached: list[list[Tensor]] = []
        for iteration in range(iterations):
            if iteration:
                average = self.gradient((reached[0], reached[1]), midpoint=midpoint)
            reached = [
                [w - length * g.sign() for w, length, g in zip(*kinds, strict=True)]
                for kinds in zip(self.start, lengths, average, strict=True)
            ]
        return [*reached[0], *reached[1]]
