"""What the tests of the average gradient train."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def chain(function: Callable[[Tensor], Tensor], widths: list[int], *, gain: float = 5 / 3, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    model = Chain(function, widths).double()
    for layer in model.layers:
        nn.init.xavier_uniform_(layer.weight, gain)
        nn.init.normal_(layer.bias, std=0.1)
    return model


class Chain(nn.Module):
    """Linear layers with a function between each two."""

    def __init__(self, function: Callable[[Tensor], Tensor], widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.function(layer(x))
        return self.layers[-1](x)


def batch(rows: int, inputs: int, outputs: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, inputs, generator=generator, dtype=torch.float64),
        torch.randn(rows, outputs, generator=generator, dtype=torch.float64),
    )


def closure_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(data[0]), data[1])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
