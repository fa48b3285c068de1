"""What is kept between two estimates: never a number that a fresh estimate would not give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers import (
    GUESSERS,
    ActivationPerturbation,
    CosineMatched,
    Downstream,
    Estimator,
    GuessedGradient,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.kept import USES
from tests.integrations.workloads.guess_estimates import (
    MODELS,
    ONE_PASS,
    Batch,
    alike,
    batch_of,
    each,
    seeded,
    sequential,
)

ALL = (*ONE_PASS, Downstream(1), CosineMatched(0.3))


class Net(nn.Module):
    """Counts its passes, and what it does depends on numbers that are set from outside, and on the data."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.extra, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout(0.4)
        self.step, self.by_data = 0, False

    def forward(self, x: Tensor) -> Tensor:
        Net.passes += 1
        x = self.act(self.a(x))
        if self.step >= 2 or (self.by_data and float(x.detach().sum()) > 12):
            x = torch.tanh(self.extra(x))
        x = self.drop(self.act(self.b(x)))
        if self.step == 3:
            x = F.linear(x, self.b.weight * self.scale) + x
        return self.c(x)


def make() -> Net:
    torch.manual_seed(0)
    model = Net().double().eval()
    for parameter in (*model.extra.parameters(), model.scale):
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("guesser", ALL, ids=repr)
def test_whatever_changes_between_two_estimates(guesser: Guesser) -> None:
    """Each followed by an estimate that must be, bit by bit, the one that a fresh start gives."""
    model, batch = make(), batch_of()
    estimator = Estimator(model, each, guesser)

    def same(batch: Batch = batch) -> int:
        torch.manual_seed(3)
        before = Net.passes
        found = estimator(batch, generator=seeded())
        passes = Net.passes - before
        torch.manual_seed(3)
        alike(found, estimate_gradient(model, each, batch, guesser, generator=seeded()))
        return passes

    one = 2 if isinstance(guesser, Downstream | CosineMatched) else 1
    same()
    assert same() == one
    assert same(batch_of(7)) == one  # as many examples as there are
    model.train()
    same()
    assert same() == one
    model.eval()
    same()
    model.b.weight.requires_grad_(False)
    same()
    model.extra.weight.requires_grad_(True)  # without a use
    same()
    model.step = 1
    same()
    model.step = 2
    same()
    model.scale.requires_grad_(True)
    model.b.weight.requires_grad_(True)
    model.step = 3  # a weight is read by something that is no layer
    same()
    model.step = 0
    same()
    for parameter in (*model.extra.parameters(), model.scale):
        parameter.requires_grad_(False)
    same()
    model.b = nn.Linear(6, 6).double()
    same()
    model.b.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    same()
    model.act = nn.Tanh()
    same()
    model.act = nn.ReLU(inplace=True)
    same()
    handle = model.b.register_forward_hook(lambda _m, _x, z: z * 2)
    same()
    handle.remove()
    same()
    model.by_data = True
    for seed in range(6):
        torch.manual_seed(seed)
        same(batch_of())
    model.float()
    x, t = batch_of()
    same((x.float(), t))
    nn.utils.parametrizations.weight_norm(model.b)
    same((x.float(), t))


@pytest.mark.parametrize("guesser", ALL, ids=repr)
def test_the_optimizer_takes_the_estimates_of_a_fresh_start(guesser: Guesser) -> None:
    model = make()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = GuessedGradient(base, guesser, model, generator=seeded())
    generator = seeded()
    for step in range(8):
        batch = batch_of(5 if step != 4 else 3)
        model.step = 2 * (step in (5, 6))
        twin = copy.deepcopy(model)
        before = Net.passes
        optimizer.step(lambda batch=batch: each(model, batch))
        if step in (1, 2, 3):
            assert Net.passes - before == (2 if isinstance(guesser, Downstream | CosineMatched) else 1)
        wanted = estimate_gradient(twin, each, batch, guesser, generator=generator)
        alike({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, wanted)  # type: ignore[misc]


def test_random_numbers_move_as_in_one_pass() -> None:
    model = make().train()
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.0), WeightTranspose(), model,
                                generator=seeded())  # fmt: skip
    batch = batch_of()
    for _ in range(3):
        torch.manual_seed(3)
        optimizer.step(lambda: each(model, batch))
        after = torch.get_rng_state()
        torch.manual_seed(3)
        each(model, batch)
        assert torch.equal(after, torch.get_rng_state())


def test_examples_that_begin_to_interact_are_seen() -> None:
    """At once where it is another function; after `USES` estimates where it is not."""
    torch.manual_seed(0)
    model, batch = make(), batch_of()
    estimator = Estimator(model, each, ActivationPerturbation())
    estimator(batch)
    model.act = nn.BatchNorm1d(6).double()
    for _ in range(2):
        with pytest.raises(ArgumentError, match="apart"):
            estimator(batch)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.share = nn.Linear(4, 3), 0.0

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return z + self.share * z.mean(0)

    mixed = Mixed().double()
    estimator = Estimator(mixed, each, ActivationPerturbation())
    for _ in range(2):
        estimator(batch)
    mixed.share = 1.0
    for _ in range(USES - 2):
        estimator(batch)
    with pytest.raises(ArgumentError, match="apart"):
        estimator(batch)


def test_one_example_does_not_stand_for_many() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    model.register_forward_hook(lambda _m, _x, z: z - z.mean(0) * 0.5)
    estimator = Estimator(model, each, ActivationPerturbation())
    for _ in range(2):
        estimator(batch_of(1))
    with pytest.raises(ArgumentError, match="apart"):
        estimator(batch_of(5))


@pytest.mark.parametrize("name", GUESSERS)
def test_seeds(name: str) -> None:
    """The same seed, the same estimate; other calls, other guesses; one number of the generator a call."""
    torch.manual_seed(0)
    model, batch = sequential(nn.ReLU()).double(), batch_of()
    estimator, generator = Estimator(model, each, GUESSERS[name]), seeded()
    first, second = (estimator(batch, generator=generator) for _ in range(2))
    assert not torch.equal(first["0.weight"], second["0.weight"])
    alike(first, estimate_gradient(model, each, batch, GUESSERS[name], generator=seeded()))
    other = seeded()
    torch.randint(2**32, (), generator=other)
    alike(second, estimate_gradient(model, each, batch, GUESSERS[name], generator=other))
    # Drawn again or held, the guesses are the same.
    alike(first, estimate_gradient(model, each, batch, GUESSERS[name], hold=True, generator=seeded()))


@pytest.mark.parametrize("guesser", [*ONE_PASS[1:], Downstream(1)], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_guesses_that_are_drawn_again_are_the_same(
    name: str, guesser: Guesser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs met again in a plain pass, instead of held."""
    torch.manual_seed(0)
    model, batch = MODELS[name][0]().double(), batch_of(5, *MODELS[name][1])
    torch.manual_seed(3)
    held = estimate_gradient(model, each, batch, guesser, generator=seeded(), hold=True)
    for module in ("guessing", "several", "keeper"):
        monkeypatch.setattr(f"gradmon_integrations.workloads.guessers.{module}.FREE", 0)
    estimator = Estimator(model, each, guesser)
    for _ in range(2):
        torch.manual_seed(3)
        found = estimator(batch, generator=seeded())
        for key, part in held.items():
            torch.testing.assert_close(found[key], part, rtol=1e-12, atol=1e-14)


def test_copies_find_everything_for_themselves() -> None:
    model, batch = make(), batch_of()
    estimator = Estimator(model, each, WeightTranspose())
    estimator(batch)
    twin = copy.deepcopy(estimator)
    alike(twin(batch, generator=seeded()), estimator(batch, generator=seeded()))
