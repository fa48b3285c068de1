"""The networks of the zoo, as modules that anybody could have written."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo.configurations import Configuration
from benchmarks.zoo.data import CONTEXT, INPUTS, OUTPUTS, SYMBOLS

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Residual(nn.Module):
    """What it gets, plus what its inner module makes of it where the shapes agree."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """``x + inner(x)``."""
        y = self.inner(x)
        return x + y if x.shape == y.shape else y


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each position sees itself and those before it."""
        count, length, width = x.shape
        parts = self.mix(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(count, length, width))


class Block(nn.Module):
    """A block of a transformer: its norms come before, after or not at all."""

    def __init__(self, width: int, activation: str, norm: str) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), _ACTIVATIONS[activation](), nn.Linear(4 * width, width))
        self.norm = norm
        if norm != "none":
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.norm == "pre":
            x = x + self.attention(self.first(x))
            return x + self.mlp(self.second(x))
        if self.norm == "post":
            x = self.first(x + self.attention(x))
            return self.second(x + self.mlp(x))
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Symbols, (B, T), to the logits of the ones that follow, (B, T, V)."""

    def __init__(self, of: Configuration) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, of.width)
        self.places = nn.Parameter(torch.randn(CONTEXT, of.width) * 0.1)
        self.blocks = nn.Sequential(*(Block(of.width, of.activation, of.norm) for _ in range(of.depth)))
        self.norm = nn.LayerNorm(of.width) if of.norm == "pre" else nn.Identity()
        self.head = nn.Linear(of.width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.norm(self.blocks(self.symbols(tokens) + self.places)))


def build(of: Configuration) -> nn.Module:
    """The network of a configuration at its start; the global random state is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10_000 + of.number)
        model = {"conv": _conv, "transformer": Transformer}.get(of.family, _mlp)(of)
        _initialise(model, of.initialisation)
    return model


def _mlp(of: Configuration) -> nn.Module:
    inputs, outputs = (INPUTS, OUTPUTS) if of.family == "regression" else (64, 10)
    layers: list[nn.Module] = []
    for place in range(of.depth):
        inner = [nn.Linear(inputs if place == 0 else of.width, of.width)]
        if of.norm == "layer":
            inner.append(nn.LayerNorm(of.width))
        whole = nn.Sequential(*inner, _ACTIVATIONS[of.activation]())
        layers.append(Residual(whole) if of.residual and place > 0 else whole)
    return nn.Sequential(*layers, nn.Linear(of.width, outputs))


def _conv(of: Configuration) -> nn.Module:
    layers: list[nn.Module] = []
    for place in range(of.depth):
        inner: list[nn.Module] = [nn.Conv2d(of.width if place else 1, of.width, 3, 1 if place else 2, 1)]
        if of.norm == "group":
            inner.append(nn.GroupNorm(2, of.width))
        elif of.norm == "batch":
            inner.append(nn.BatchNorm2d(of.width, track_running_stats=False))
        whole = nn.Sequential(*inner, _ACTIVATIONS[of.activation]())
        layers.append(Residual(whole) if of.residual and place > 0 else whole)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * of.width, 10))


def _initialise(model: nn.Module, how: str) -> None:
    if how == "torch":
        return
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if how == "xavier":
            nn.init.xavier_normal_(module.weight)
        elif how == "small":
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(module.weight)
            if how == "large":
                module.weight.data.mul_(2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
