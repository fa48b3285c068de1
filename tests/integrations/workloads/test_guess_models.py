"""Models that are awkward on purpose, and slow truths for what guessers make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers import (
    ActivationMixing,
    ActivationPerturbation,
    CosineMatched,
    DirectionalDescent,
    Downstream,
    LocalMixer,
    SingularPower,
    WeightTranspose,
    estimate_gradient,
    local_losses,
)
from gradmon_integrations.workloads.guessers.comparing import true_gradient
from gradmon_integrations.workloads.guessers.noise import Noise, Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Site, Structure

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class Functional(nn.Module):
    """Layers as functions: one weight used twice, one frozen bias, a matrix product, a scale, a tied read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 4) / 2)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.twice = nn.Parameter(torch.randn(6, 6) / 2)
        self.product = nn.Parameter(torch.randn(6, 4) / 2)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.tanh(F.linear(x, self.first, self.frozen))
        x = x + F.relu_(F.linear(x, self.twice))
        x = torch.sigmoid(F.linear(x, weight=self.twice))
        x = (x @ self.product) * self.scale
        return x @ self.first.T


class Convolutional(nn.Module):
    """Strides, groups, paddings of all kinds, normalisation, pooling, a residual branch, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, 2, 1, groups=2, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 4)
        self.b = nn.Conv2d(4, 4, 3, padding="same", dilation=2, bias=False)
        self.c = nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1, groups=2)
        self.d = nn.Conv1d(4, 3, 3, padding="same", dilation=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = x + F.silu(self.b(x))
        x = F.max_pool2d(self.c(F.avg_pool2d(x, 2)), 2)
        return self.head(F.gelu(self.d(x.flatten(2))).mean(-1))


class Shared(nn.Module):
    """An embedding that is the read-out's weight too, attention with a functional projection, LayerNorm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding((x[:, :3].abs() * 2).long().clamp(max=4))
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x))[0]
        x = F.dropout(self.inside(x), 0.3, self.training)
        return F.linear(x.mean(1), self.embedding.weight)


class Normed(nn.Module):
    """Weight normalisation, whose weight is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.b = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.softplus(self.a(x)))


class Sequences(nn.Module):
    """Time first: no dimension of its layers' outputs but the second counts the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.stack([x, x.flip(-1), -x])  # (3, B, 4)
        return self.b(torch.tanh(self.a(turned)).mean(0))


def flat_batch(examples: int = 3, classes: int = 5) -> Batch:
    return torch.randn(examples, 4, dtype=torch.float64), torch.randint(classes, (examples,))


def image_batch(examples: int = 3) -> Batch:
    return torch.randn(examples, 2, 8, 8, dtype=torch.float64), torch.randint(3, (examples,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "mlp": (lambda: mlp(4, 6, 5), flat_batch),
    "tanh": (lambda: mlp(4, 6, 5, activation=nn.Tanh), flat_batch),
    "functional": (Functional, lambda: flat_batch(classes=4)),
    "convolutional": (Convolutional, image_batch),
    "shared": (Shared, flat_batch),
    "normed": (Normed, flat_batch),
    "sequences": (Sequences, lambda: flat_batch(4)),
    "one": (lambda: mlp(4, 6, 5), lambda: flat_batch(1)),
}


def make(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = MODELS[name]
    return model().double(), batch()


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts.values()])


class UnitActivations:
    """The unit vectors of all layers' pre-activations, one a guess: the sum of their estimates is the gradient."""

    needs, overall = "nothing", False

    def __init__(self, sites: list[Site]) -> None:
        self.sizes = {site.number: math.prod(site.shape[1:]) for site in sites if site.guessed}
        self._order: dict[int, int] = {}

    @property
    def count(self) -> int:
        return sum(self.sizes.values())

    def guess(self, site: Site, noise: Noise) -> Tensor:
        assert isinstance(noise, Seeded)
        place = self._order.setdefault(noise._seed, len(self._order))
        place -= sum(size for number, size in self.sizes.items() if number < site.number)
        found = torch.zeros(site.shape[0], math.prod(site.shape[1:]), dtype=site.like.dtype)
        if 0 <= place < found.shape[1]:
            found[:, place] = 1
        return found.reshape(site.shape)


class UnitWeights:
    """The unit vectors of all weights."""

    oracle = False

    def __init__(self) -> None:
        self._next = 0

    def direction(
        self, parameters: Mapping[str, Tensor], truth: object, noise: Noise
    ) -> tuple[dict[str, Tensor], float]:
        found = torch.zeros(sum(part.numel() for part in parameters.values()), dtype=torch.float64)
        found[self._next] = 1
        self._next += 1
        parts = torch.split(found, [part.numel() for part in parameters.values()])
        return {k: part.reshape(parameters[k].shape) for k, part in zip(parameters, parts, strict=True)}, 1.0


def structure_of(model: nn.Module, loss: Loss, batch: Batch) -> Structure:
    with Passes(model, loss, batch) as passes:
        return passes.record(False, False)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("loss", [each, mean])
@pytest.mark.parametrize("name", MODELS)
def test_unit_vectors_at_pre_activations_add_up_to_the_gradient(name: str, loss: Loss, hold: bool) -> None:
    model, batch = make(name)
    truth, structure = true_gradient(model, loss, batch), structure_of(model, loss, batch)
    units = UnitActivations(structure.sites)
    assert units.count > 0
    # Length 1 they have already: but what is guessed directly then has passes of its own.
    found = estimate_gradient(
        model,
        loss,
        batch,
        units,  # type: ignore[arg-type]
        guesses=units.count,
        normalize="example",
        hold=hold,
        generator=torch.Generator(),
    )
    for key in set(truth) - structure.direct:
        torch.testing.assert_close(found[key] * units.count, truth[key], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", [each, mean])
@pytest.mark.parametrize("name", MODELS)
def test_unit_vectors_of_the_weights_add_up_to_the_gradient(name: str, loss: Loss) -> None:
    model, batch = make(name)
    truth = true_gradient(model, loss, batch)
    count = sum(part.numel() for key, part in truth.items() if key != "unused")
    found = estimate_gradient(model, loss, batch, UnitWeights(), guesses=count, generator=torch.Generator())  # type: ignore[arg-type]
    for key, wanted in truth.items():
        torch.testing.assert_close(found[key] * count, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "direct"), [
    ("mlp", set()), ("functional", {"scale", "first"}), ("convolutional", {"norm.weight", "norm.bias"}),
    ("normed", {"a.parametrizations.weight.original0", "a.parametrizations.weight.original1"}),
    ("sequences", {"a.weight", "a.bias"}),
])  # fmt: skip
def test_what_no_layer_covers_is_guessed_directly_without_bias(name: str, direct: set[str]) -> None:
    model, batch = make(name)
    assert structure_of(model, each, batch).direct == direct
    truth = true_gradient(model, each, batch)
    generator = torch.Generator().manual_seed(0)
    guesses = 100 if direct else 1
    parts = [
        estimate_gradient(
            model, each, batch, ActivationPerturbation(), guesses=guesses, per_layer=True, generator=generator
        )
        for _ in range(4)
    ]
    for key in direct:
        found = torch.stack([part[key] for part in parts])
        error, spread = (found.mean(0) - truth[key]).norm(), (found.var(0).sum() / len(parts)).sqrt()
        assert float(error) <= 3 * float(spread), key
        assert float((found.mean(0) * truth[key]).sum() / truth[key].square().sum()) == pytest.approx(1, abs=0.4)


def test_unused_and_frozen_parameters() -> None:
    model, batch = make("functional")
    found = estimate_gradient(model, each, batch, ActivationPerturbation())
    assert "frozen" not in found
    assert not found["unused"].any()


@pytest.mark.parametrize("name", MODELS)
def test_exact_last_layer_is_the_true_gradient(name: str) -> None:
    model, batch = make(name)
    truth = true_gradient(model, each, batch)
    two = ("2.weight", "2.bias")
    last = {"convolutional": ("head.weight", "head.bias"), "mlp": two, "tanh": two, "one": two}
    last |= dict.fromkeys(("normed", "sequences"), ("b.weight", "b.bias"))
    for guesser in (ActivationPerturbation(), WeightTranspose(), DirectionalDescent()):
        for loss in (each, mean):
            found = estimate_gradient(model, loss, batch, guesser, exact_last=True)
            for key in last.get(name, ()):
                torch.testing.assert_close(found[key], truth[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("guesser", [ActivationPerturbation(masked=True), WeightTranspose("uniform"), Downstream(2),
                                     SingularPower(2.0), ActivationMixing(), DirectionalDescent("paper", "uniform"),
                                     CosineMatched(0.3)], ids=lambda held: type(held).__name__)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_estimate_however_it_is_worked_out(name: str, guesser: object) -> None:
    model, batch = make(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def found(**options: object) -> Tensor:
        return flat(
            estimate_gradient(model, each, batch, guesser, generator=torch.Generator().manual_seed(1), **options)
        )  # type: ignore[arg-type]

    before = torch.get_rng_state()
    wanted = found(guesses=20)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found(guesses=20, hold=True), wanted, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert wanted.isfinite().all()
    assert not wanted.requires_grad


def test_local_mixer_blocks_do_not_see_later_losses() -> None:
    torch.manual_seed(0)
    model = LocalMixer((1, 8, 8), 3, channels=8, blocks=2).double()
    for parameter in model.heads.parameters():
        nn.init.normal_(parameter)
    batch = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(3, (4,))
    truth = true_gradient(model, local_losses, batch)
    first = true_gradient(model, lambda m, b: F.cross_entropy(m.predictions(b[0])[0], b[1]), batch)
    for key in ("blocks.0.channels.weight", "blocks.0.groups.weight"):
        torch.testing.assert_close(truth[key], first[key])
    found = estimate_gradient(model, local_losses, batch, Downstream(1), guesses=3)
    assert set(found) == set(truth)


def test_local_mixer_arguments() -> None:
    with pytest.raises(ArgumentError, match="`patches` must divide"):
        LocalMixer((1, 9, 8), 3)
    with pytest.raises(ArgumentError, match="`groups` must divide"):
        LocalMixer((1, 8, 8), 3, channels=6)
    with pytest.raises(ArgumentError, match="`blocks` must be at least 1"):
        LocalMixer((1, 8, 8), 3, blocks=0)
    with pytest.raises(ArgumentError, match="`model` must be a LocalMixer"):
        local_losses(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
