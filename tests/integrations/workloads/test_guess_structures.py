"""What is kept of a model from one estimate to the next: awkward ones get the estimates of several passes, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    ActivationPerturbation,
    Downstream,
    Estimator,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser, Guesser
from gradmon_integrations.workloads.guessers.noise import Noise
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Site
from gradmon_integrations.workloads.guessers.settings import Settings
from gradmon_integrations.workloads.guessers.several import Several
from tests.integrations.workloads.guess_estimates import MODELS, ONE_PASS, alike, batch_of, each, seeded


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
