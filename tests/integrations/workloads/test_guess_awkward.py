"""Models that tempt what is kept, or the sums of squares, into numbers that are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    ActivationMixing,
    ActivationPerturbation,
    Downstream,
    Estimator,
    GuessedGradient,
    SingularPower,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.guesser import Guesser, Needs
from gradmon_integrations.workloads.guessers.noise import Kind, Noise
from gradmon_integrations.workloads.guessers.recording import Site

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(*shape: int) -> Batch:
    return torch.randn(5, *(shape or (4,)), dtype=torch.float64), torch.randint(3, (5,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Buffered(nn.Module):
    """With buffers, and with a tensor that is none: neither is a function that the model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)
        self.mask = torch.ones(6, dtype=torch.float64)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.b(F.relu(self.norm(self.a(x))) * self.mask)


@pytest.mark.parametrize("stepping", [False, True])
def test_what_is_put_back_is_no_function_of_the_model(stepping: bool) -> None:
    torch.manual_seed(0)
    model, batch = Buffered().double().eval(), batch_of()
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), ActivationPerturbation(), model)
    passes: list[int] = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        passes[-1] += 1
        return each(model, batch)

    estimator = Estimator(model, counted, ActivationPerturbation())
    for _ in range(3):
        passes.append(0)
        if stepping:
            optimizer.step(lambda: counted(model, batch))
        else:
            estimator(batch)
    assert passes[0] > 1
    assert passes[1:] == [1, 1]


class Heads(nn.Module):
    """A layer that only the loss reads, or the next layer too: with the same calls."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between, self.through = between, False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        z = self.b(h)
        t = F.softmax(z, -1) if self.between else z
        y = self.c(t if self.through else h)
        return self.d(h) + t[:, :3] + y[:, :3]


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("guesser", [WeightTranspose(), SingularPower(2.0), Downstream(1)], ids=repr)
def test_a_head_that_the_next_layer_begins_to_read(guesser: Guesser, between: bool) -> None:
    torch.manual_seed(0)
    model, batch = Heads(between).double(), batch_of()
    estimator = Estimator(model, each, guesser)
    for through in (False, False, True, True, False):
        model.through = through
        found = estimator(batch, generator=seeded())
        wanted = estimate_gradient(model, each, batch, guesser, generator=seeded())
        for name, part in wanted.items():
            torch.testing.assert_close(found[name], part, rtol=1e-12, atol=1e-14)


class OneByOne(nn.Module):
    """Convolutions of single examples, without a dimension for them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.b = nn.ConvTranspose2d(3, 2, 1) if transposed else nn.Conv2d(3, 2, 2, padding="same")
        self.c = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.stack([F.relu(self.b(one)).flatten() for one in F.relu(self.a(x))]))


class Ones:
    """In the place of noise."""

    def draw(self, shape: Sequence[int], like: Tensor, kind: Kind) -> Tensor:
        return torch.ones(tuple(shape), dtype=like.dtype)


class Summed:
    """`WeightTranspose` of ones, remembered."""

    needs, reach, overall = "slopes", "next", False

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def guess(self, site: Site, noise: Noise) -> Tensor:
        self.made.append(WeightTranspose().guess(site, Ones()))
        return self.made[-1].clone()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_single_examples(transposed: bool, trained: bool) -> None:
    """Between two layers, what they push and pull is what backpropagation says."""
    torch.manual_seed(0)
    model, batch = OneByOne(transposed).double(), batch_of(2, 4, 4)
    model.b.requires_grad_(trained)
    guesser, zs = Summed(), list[Tensor]()
    hooks = [layer.register_forward_hook(lambda _m, _x, z: zs.append(z)) for layer in (model.a, model.c)]
    losses = each(model, batch)
    for hook in hooks:
        hook.remove()
    image = torch.autograd.grad(zs[1].sum(), zs[0], retain_graph=True)[0]
    errors = torch.autograd.grad(losses.sum(), zs)
    along = (image * errors[0]).flatten(1).sum(1) + errors[1].sum(1)
    found = estimate_gradient(model, each, batch, guesser, generator=seeded())
    torch.testing.assert_close(guesser.made[0], image)
    if not trained:  # otherwise a guess of its own has a part in it
        torch.testing.assert_close(found["c.bias"], along.mean().expand(3))


def mlp(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("guesser", [ActivationPerturbation(), ActivationMixing(), WeightTranspose()], ids=repr)
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_training_that_diverged_has_no_gradient(guesser: Guesser, number: float) -> None:
    """NaN, and no complaint about examples that interact; what was not to be seen then is looked at later."""
    torch.manual_seed(0)
    model, batch = mlp().double(), batch_of()
    model.register_forward_hook(lambda _m, _x, z: z - z.mean(0))
    estimator = Estimator(model, each, guesser)
    held = model[2].weight.detach().clone()
    model[2].weight.data.fill_(number)
    for found in (estimator(batch), estimate_gradient(model, each, batch, guesser)):
        assert all(not bool(part.isfinite().all()) for part in found.values())
    model[2].weight.data.copy_(held)
    with pytest.raises(ValueError, match="apart"):
        estimator(batch)


@dataclass(frozen=True)
class Louder:
    """Noise of some length."""

    factor: float
    needs: Needs = "nothing"
    overall = True

    def guess(self, site: Site, noise: Noise) -> Tensor:
        return noise.draw(site.shape, site.like, "normal") * self.factor


@pytest.mark.parametrize("guesses", [1, 2])
def test_the_length_of_a_guess_does_not_matter_in_half_precision(guesses: int) -> None:
    """Where the sum of its squares is beyond what the type can hold, too."""
    torch.manual_seed(0)
    model, (x, t) = mlp(64).half(), batch_of()
    one, other = (
        estimate_gradient(model, each, (x.half(), t), Louder(factor), guesses=guesses, generator=seeded())
        for factor in (1.0, 256.0)
    )
    for name, part in one.items():
        assert bool((part != 0).any())
        assert float((other[name] - part).float().norm()) < 0.02 * float(part.float().norm())
