"""What is kept between two estimates: never a number that a fresh estimate would not give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers import (
    GUESSERS,
    ActivationMixing,
    ActivationPerturbation,
    CosineMatched,
    DirectionalDescent,
    Downstream,
    Estimator,
    GuessedGradient,
    SingularPower,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser, Guesser
from gradmon_integrations.workloads.guessers.kept import USES
from gradmon_integrations.workloads.guessers.noise import Noise
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Site
from gradmon_integrations.workloads.guessers.settings import Settings
from gradmon_integrations.workloads.guessers.several import Several

Batch = tuple[Tensor, Tensor]
ONE_PASS: tuple[Guesser, ...] = (
    DirectionalDescent(), ActivationPerturbation(), ActivationPerturbation(masked=True), ActivationMixing(),
    WeightTranspose(), SingularPower(2.0),
)  # fmt: skip
ALL = (*ONE_PASS, Downstream(1), CosineMatched(0.3))


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(examples: int = 5, *shape: int) -> Batch:
    return torch.randn(examples, *(shape or (4,)), dtype=torch.float64), torch.randint(3, (examples,))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], part) for name, part in wanted.items())
    assert all(bool(part.isfinite().all()) for part in wanted.values())


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


def sequential(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 6), *between, nn.Linear(6, 3))


class Shortcut(nn.Module):
    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.inside = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        z = self.b(F.silu(x))
        if self.inside:
            x += z  # what `silu` read is written to later
            return self.c(x)
        return self.c(F.relu(x + z) + z)


class Written(nn.Module):
    """The input of a layer is written to after its call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        z = self.b(x)
        x.add_(F.relu(z))
        return self.c(x)


class Swallows(nn.Module):
    """Goes on whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        try:
            z = F.relu(z) if not self.late else F.relu(z) + F.tanh(z)
        except Exception:
            z = z.detach()
        return self.b(z)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, 2, 1, groups=3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: sequential(nn.ReLU()), (4,)),
    "in place": (lambda: sequential(nn.ReLU(inplace=True)), (4,)),
    "tanh": (lambda: sequential(nn.Tanh()), (4,)),
    "elu in place": (lambda: sequential(nn.ELU(inplace=True)), (4,)),
    "linear": (sequential, (4,)),
    "dropout": (lambda: sequential(nn.ReLU(), nn.Dropout(0.3)), (4,)),
    "only dropout": (lambda: sequential(nn.Dropout(0.3)), (4,)),
    "norm": (lambda: sequential(nn.LayerNorm(6, elementwise_affine=False), nn.ReLU()), (4,)),
    "sigmoid last": (lambda: nn.Sequential(sequential(nn.ReLU()), nn.Sigmoid()), (4,)),
    "shortcut": (Shortcut, (4,)),
    "shortcut in place": (lambda: Shortcut(True), (4,)),
    "written": (Written, (4,)),
    "images": (Images, (1, 6, 6)),
}  # fmt: skip


class Spy:
    """Remembers the guesses of another one."""

    def __init__(self, inner: ActivationGuesser) -> None:
        self.inner, self.needs, self.overall = inner, inner.needs, inner.overall
        self.reach = getattr(inner, "reach", "any")
        self.made: dict[int, Tensor] = {}

    def guess(self, site: Site, noise: Noise) -> Tensor:
        self.made[site.number] = self.inner.guess(site, noise)
        return self.made[site.number].clone()


@pytest.mark.parametrize("guesser", [*ONE_PASS[1:], Downstream(1)], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_an_estimate_is_the_outer_products_of_its_guesses(name: str, guesser: ActivationGuesser) -> None:
    """Against derivatives by backpropagation, and against the guesses that several passes make."""
    torch.manual_seed(0)
    model, batch = MODELS[name][0]().double(), batch_of(5, *MODELS[name][1])
    spy = Spy(guesser)
    estimator = Estimator(model, each, spy, hold=True)
    for _ in range(2):
        torch.manual_seed(3)
        found = estimator(batch, generator=seeded())
    torch.manual_seed(3)
    with Passes(model, each, batch) as passes:
        settings = Settings(guesser)
        seed = passes.seed(seeded())
        structure = passes.record(True, True)
        wanted, _ = Several(passes, settings, structure, seed).run()
    for key, part in wanted.items():
        torch.testing.assert_close(found[key], part, rtol=1e-11, atol=1e-13)
    if name in ("in place", "elu in place", "shortcut in place", "written"):
        return  # z is written to, which no hook sees
    called: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, x, z: called.append((m, x[0].detach(), z)))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    torch.manual_seed(3)
    errors = torch.autograd.grad(each(model, batch).sum(), [z for _, _, z in called])
    for hook in hooks:
        hook.remove()
    y = [spy.made[number] for number in range(len(called))]
    along = torch.stack([(e * part).flatten(1).sum(1) for e, part in zip(errors, y, strict=True)]).sum(0)
    if spy.overall:
        along = along / torch.stack([part.flatten(1).square().sum(1) for part in y]).sum(0)
    names = {parameter: key for key, parameter in model.named_parameters()}
    for (module, x, _), part in zip(called, y, strict=True):
        cotangent = part * along.reshape(-1, *[1] * (part.ndim - 1)) / len(along)
        for parameter, grad in zip(
            module.parameters(), torch.autograd.grad(module(x), list(module.parameters()), cotangent), strict=True
        ):
            torch.testing.assert_close(found[names[parameter]], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("guesser", ONE_PASS[1:], ids=repr)
def test_a_model_that_swallows_errors(guesser: Guesser) -> None:
    torch.manual_seed(0)
    model, batch = Swallows().double(), batch_of()
    estimator = Estimator(model, each, guesser)
    for late in (False, True, False):
        model.late = late
        alike(estimator(batch, generator=seeded()), estimate_gradient(model, each, batch, guesser, generator=seeded()))


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


class Own(torch.autograd.Function):
    """The third power, by a function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return ctx.slope * tangent


class Unseen(nn.Module):
    """A pre-activation that is read by a function that no mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        hidden = Own.apply(z)
        return self.b(F.relu(z) * hidden)


@pytest.mark.parametrize("guesser", [ActivationPerturbation(masked=True), WeightTranspose()], ids=repr)
def test_a_reader_that_is_not_seen(guesser: Guesser) -> None:
    torch.manual_seed(0)
    model, batch = Unseen().double(), batch_of()
    estimator = Estimator(model, each, guesser)
    with Passes(model, each, batch) as passes:
        seed = passes.seed(seeded())
        wanted, _ = Several(passes, Settings(guesser), passes.record(True, True), seed).run()
    for _ in range(3):
        alike(estimator(batch, generator=seeded()), wanted)


class Hyper(nn.Module):
    """The weight of a layer is what another layer makes of as many rows as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.a, self.b = nn.Linear(4, 36), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x).mean(0).reshape(6, 6)
        return self.b(F.relu(F.linear(F.relu(self.a(x)), weight)))


@pytest.mark.parametrize("guesser", [ActivationPerturbation(), ActivationPerturbation(masked=True)], ids=repr)
def test_a_weight_that_a_layer_makes(guesser: ActivationGuesser) -> None:
    """One loss for all examples: each gets a pass of its own, and its derivative is its part of that by z."""
    torch.manual_seed(0)
    model, batch = Hyper().double(), batch_of()
    spy = Spy(guesser)
    found = estimate_gradient(model, lambda m, b: each(m, b).mean(), batch, spy, generator=seeded())
    called: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in (model.maker, model.a, model.b):
        module.register_forward_hook(lambda m, x, z: called.append((m, x[0].detach(), z)))
    errors = torch.autograd.grad(each(model, batch).mean(), [z for _, _, z in called])
    made = [spy.made[number] for number in (0, 1, 3)]
    along = torch.stack([(e * y).sum(1) for e, y in zip(errors, made, strict=True)]).sum(0)
    for name, (_, x, _), y in zip(("maker", "a", "b"), called, made, strict=True):
        torch.testing.assert_close(found[f"{name}.weight"], (y * along[:, None]).T @ x, rtol=1e-10, atol=1e-13)
