"""Training many variants of one network at once: the same batches, other starts and learning rates.

Each variant is trained as if it were alone (tests/core/test_preflight_zoo.py); together they take a small part of the
time, since networks this small wait for the next operation more than they compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.zoo.configurations import Configuration
from benchmarks.zoo.data import data_of, held, loss_of, order, probe

BETAS, EPSILON, MOMENTUM = (0.9, 0.999), 1e-8, 0.9


class Ensemble:
    """K variants of a network, and the optimizer's state of each.

    Args:
        model: The network; only its shape counts.
        starts: The parameters that each variant starts from, K mappings.
        optimizer: sgd, momentum or adam.
        rates: The learning rates, K.
    """

    def __init__(
        self, model: nn.Module, starts: Sequence[Mapping[str, Tensor]], optimizer: str, rates: Sequence[float]
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.names = list(starts[0])
        self.flat = torch.stack([torch.cat([start[name].reshape(-1) for name in self.names]) for start in starts])
        self.rates = torch.tensor(rates, dtype=self.flat.dtype)[:, None]
        self.parameters: dict[str, Tensor] = {}
        place = 0
        for name in self.names:
            shape, size = starts[0][name].shape, starts[0][name].numel()
            view = self.flat[:, place : place + size].view(len(starts), *shape)
            self.parameters[name] = view.detach().requires_grad_()
            place += size
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.taken = 0

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each variant, (K,)."""

        def one(parameters: dict[str, Tensor]) -> Tensor:
            return loss_of(_Bound(self.model, parameters), batch)

        return vmap(one, randomness="same")(self.parameters)

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One step of each variant; the losses before it, (K,)."""
        losses = self.losses(batch)
        parts = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        gradient = torch.cat([part.reshape(len(self.rates), -1) for part in parts], 1)
        self.taken += 1
        with torch.no_grad():
            if self.optimizer == "adam":
                self.first.lerp_(gradient, 1 - BETAS[0])
                self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                unbiased = 1 - BETAS[0] ** self.taken, math.sqrt(1 - BETAS[1] ** self.taken)
                update = self.first / (self.second.sqrt().div_(unbiased[1]).add_(EPSILON)).mul_(unbiased[0])
            elif self.optimizer == "momentum":
                update = self.first.mul_(MOMENTUM).add_(gradient)
            else:
                update = gradient
            self.flat.sub_(self.rates * update)
        return losses.detach()

    def lost(self) -> bool:
        """Whether every variant has a parameter that is not a number: none of them ever comes back from that."""
        return bool(self.flat.isnan().any(1).all())


class _Bound(nn.Module):
    """A network with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        vars(self)["_of"] = model, parameters

    def forward(self, x: Tensor) -> Tensor:
        model, parameters = vars(self)["_of"]
        return functional_call(model, parameters, (x,))


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(
    of: Configuration, model: nn.Module, starts: Sequence[Mapping[str, Tensor]], rates: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Train variants of a configuration's network to the end.

    Args:
        of: The configuration.
        model: Its network.
        starts: The parameters that each variant starts from.
        rates: The learning rates.

    Returns:
        The losses on the probe after 20 steps, and those at the end.
    """
    ensemble = Ensemble(model, starts, of.optimizer, rates)
    inputs, targets = data_of(of)
    early: list[float] = []
    for place, chosen in enumerate(order(of, of.steps)):
        if place == 20:
            with torch.no_grad():
                early = ensemble.losses(probe(of)).tolist()
        ensemble.step((inputs[chosen], targets[chosen]))
        if place % 20 == 0 and ensemble.lost():
            break
    with torch.no_grad():
        early = early or [math.nan] * len(rates)
        return early, ensemble.losses(held(of)).tolist()


def range_test(of: Configuration, model: nn.Module, default: float, passes: int = 100) -> float:
    """The learning-rate range test: the rate rises from 1e-4 to 1e2 of the default; a tenth of where the loss is least.

    Args:
        of: The configuration.
        model: Its network at its start.
        default: The optimizer's default learning rate.
        passes: How many steps it takes.

    Returns:
        The learning rate.
    """
    inputs, targets = data_of(of)
    ensemble = Ensemble(model, [start_of(model)], of.optimizer, [0.0])
    rates = [default * 10 ** (-4 + 6 * place / (passes - 1)) for place in range(passes)]
    smooth, best, chosen_rate = 0.0, math.inf, rates[0]
    for place, chosen in enumerate(order(of, passes)):
        ensemble.rates.fill_(rates[place])
        loss = float(ensemble.step((inputs[chosen], targets[chosen])))
        smooth = 0.9 * smooth + 0.1 * loss
        value = smooth / (1 - 0.9 ** (place + 1))
        if not math.isfinite(value) or value > 4 * best:
            break
        # The loss was taken before the step: it speaks of the rate before.
        if value < best:
            best, chosen_rate = value, rates[max(place - 1, 0)]
    return chosen_rate / 10
