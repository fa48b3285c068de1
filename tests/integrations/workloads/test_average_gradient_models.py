"""The average gradient on models that are awkward on purpose, each against the same function in another shape."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradmon_integrations.workloads.average_gradient import AverageGradient
from tests.integrations.workloads.average_models import assert_same, batch, state_of


class Net(nn.Module):
    """Three layers, of which the one in the middle is used as `middle` says."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.norm = nn.BatchNorm1d(9)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, torch.tanh(self.first(x))))


def trained(middle: Callable[[Any, Tensor], Tensor], *, steps: int = 4, iterations: int = 3, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(middle).double()
    nn.init.xavier_uniform_(model.inner.weight, 3.0)
    inputs, targets = batch(8, 5, 3)
    base = torch.optim.RMSprop(model.parameters(), lr=0.05)
    optimizer = AverageGradient(base, iterations=iterations, **options)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
    return model


def scribbling(model: Net, h: Tensor) -> Tensor:
    z = model.inner(h)
    y = F.tanh(z)
    z.add_(1.0)  # autograd does not mind: tanh keeps its output
    return y


def scribbling_on_output(model: Net, h: Tensor) -> Tensor:
    z = model.inner(h)
    y = F.silu(z)
    w = y + 0
    y.mul_(3.0)  # nor here: SiLU keeps its input
    return w


def on_a_view(model: Net, h: Tensor) -> Tensor:
    z = model.inner(h)
    torch.tanh_(z[:, :4])
    F.elu(z[:, 4:], inplace=True)
    return z


def on_parts(model: Net, h: Tensor) -> Tensor:
    z = model.inner(h)
    return torch.cat([torch.tanh(z[:, :4]), F.elu(z[:, 4:])], dim=1)


SAME: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "input written to later": (scribbling, lambda m, h: torch.tanh(m.inner(h))),
    "output written to later": (scribbling_on_output, lambda m, h: F.silu(m.inner(h))),
    "in place on a view": (on_a_view, on_parts),
    "in place in the middle of a residual": (
        lambda m, h: h + F.silu(m.inner(h), inplace=True),
        lambda m, h: h + m.inner(h).mul(1).div(1) * 0 + F.silu(m.inner(h)),
    ),
    "three dimensions": (
        lambda m, h: F.elu(m.inner(h.view(2, 4, 9)), inplace=True).view(8, 9),
        lambda m, h: F.elu(m.inner(h)),
    ),
    "checkpointed": (
        lambda m, h: checkpoint(lambda x: torch.tanh(m.inner(x)), h, use_reentrant=False),
        lambda m, h: torch.tanh(m.inner(h)),
    ),
    "by chunks": (
        lambda m, h: torch.cat([torch.tanh(part) for part in m.inner(h).chunk(3, dim=1)], dim=1),
        lambda m, h: torch.tanh(m.inner(h)),
    ),
    "a function of what it made, too": (
        lambda m, h: torch.tanh(torch.tanh_(m.inner(h))),
        lambda m, h: m.inner(h).tanh().tanh(),
    ),
    "with a function that nothing depends on": (
        lambda m, h: torch.tanh(m.inner(h)) + 0 * torch.sigmoid(h.detach()),
        lambda m, h: torch.tanh(m.inner(h)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_way_a_function_is_called_does_not_matter(name: str) -> None:
    odd, even = SAME[name]
    found, expected = state_of(trained(odd)), state_of(trained(even))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-12), key


def by_definition(model: Net, inputs: Tensor, targets: Tensor, lr: float) -> dict[str, Tensor]:
    """One SGD step of two iterations, from a forward pass where each function is ``y + s (z - z.detach())``.

    s is the slope to what a first run at the candidate weights met, so that plain autograd gives the average gradient.
    """
    met: list[tuple[Tensor, Tensor]] = []
    place = 0

    def listening(x: Tensor) -> Tensor:
        met.append((x.detach(), x.detach().tanh()))
        return x.tanh()

    def sloped(x: Tensor) -> Tensor:
        nonlocal place
        other_x, other_y = met[place]
        place += 1
        slope = (other_y - x.detach().tanh()) / (other_x - x.detach())
        return x.detach().tanh() + slope * (x - x.detach())

    def gradients(function: Callable[[Tensor], Tensor], of: nn.Module) -> dict[str, Tensor]:
        loss = F.mse_loss(run(of, function, inputs), targets)
        named = dict(of.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    def run(of: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        h = function(of.first(x))
        h = function(of.inner(h)) + h
        h = function(of.inner(h)) * torch.relu(of.first(x))
        h = function(F.linear(h, of.inner.weight.T)) @ of.inner.weight
        return of.last(h)

    start = gradients(torch.tanh, model)
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in candidate.named_parameters():
            if name in start:
                parameter -= lr * start[name]
        F.mse_loss(run(candidate, listening, inputs), targets)
    average = gradients(sloped, model)
    after = state_of(model)
    for name, g in start.items():
        after[name] -= lr * g.abs() * average[name].sign()
    return after


def test_weights_used_twice_branches_residuals_and_transposed_weights() -> None:
    def middle(m: Net, h: Tensor) -> Tensor:
        raise AssertionError

    torch.manual_seed(0)
    model = Net(middle).double()
    nn.init.xavier_uniform_(model.inner.weight, 3.0)
    inputs, targets = batch(8, 5, 3)

    def closure() -> Tensor:
        h = model.first(inputs).tanh_()
        h = nn.Tanh()(model.inner(h)) + h
        h = torch.tanh(model.inner(h)) * torch.relu(model.first(inputs))
        h = F.tanh(F.linear(h, model.inner.weight.T)) @ model.inner.weight
        return F.mse_loss(model.last(h), targets)

    expected = by_definition(model, inputs, targets, 0.3)
    before = state_of(model)
    AverageGradient(torch.optim.SGD(model.parameters(), lr=0.3)).step(closure)
    for name, value in state_of(model).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-12), name
    flipped = [
        (state_of(model)[n] - before[n]).sign() != -p.grad.sign()
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    assert any(bool(where.any()) for where in flipped)
    assert model.norm.weight.grad is None


def test_convolutions_with_tied_weights_at_the_midpoint_and_plain() -> None:
    """A 1 x 1 convolution is a linear layer on each pixel."""
    found = []
    for linear in ("plain", "midpoint"):
        for convolved in (False, True):
            torch.manual_seed(0)
            layers = [nn.Linear(4, 4).double(), nn.Linear(4, 4).double()]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight, 3.0)
            x, t = (part.double() for part in (torch.randn(6, 4), torch.randn(6, 4)))

            def apply(layer: nn.Linear, h: Tensor, convolved: bool = convolved) -> Tensor:
                if not convolved:
                    return layer(h)
                return F.conv2d(h[:, :, None, None], layer.weight[:, :, None, None], layer.bias)[:, :, 0, 0]

            def closure(layers: Any = layers, x: Tensor = x, t: Tensor = t, apply: Any = apply) -> Tensor:
                h = x
                for layer in (*layers, layers[0]):
                    h = torch.tanh(apply(layer, h))
                return F.mse_loss(h, t)

            parameters = [p for layer in layers for p in layer.parameters()]
            optimizer = AverageGradient(torch.optim.SGD(parameters, lr=0.3), linear=linear)
            for _ in range(3):
                optimizer.step(closure)
            found.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert torch.allclose(found[2], found[3], rtol=0, atol=1e-12)
    assert not torch.allclose(found[0], found[2], rtol=0, atol=1e-6)


def drops(m: Net, h: Tensor) -> Tensor:
    return F.dropout(torch.tanh(m.inner(h)), 0.5, m.training)


def test_dropout_repeats_its_mask_and_draws_as_for_one_forward_pass() -> None:
    torch.manual_seed(0)
    model = Net(drops)
    inputs, targets = (part.float() for part in batch(8, 5, 3))
    seen: list[Tensor] = []
    model.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach() == 0))
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1), iterations=4, measure=True)
    torch.manual_seed(3)
    optimizer.step(lambda: F.mse_loss(model(inputs), targets))
    state = torch.get_rng_state()
    assert len(seen) == 5
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    torch.manual_seed(3)
    model(inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: float(np.random.rand())], ids=["python", "numpy"])
def test_other_generators_are_put_back(draw: Callable[[], float]) -> None:
    seen: list[float] = []
    model = nn.Linear(5, 3).double()
    inputs, targets = batch(8, 5, 3)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> Tensor:
        seen.append(draw())
        return F.mse_loss(torch.tanh(model(inputs)), targets)

    for _ in range(3):
        optimizer.step(closure)
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("iterations", [2, 4])
def test_batch_norm_sees_one_batch_a_step(iterations: int) -> None:
    def normed(m: Net, h: Tensor) -> Tensor:
        return torch.tanh(m.norm(m.inner(h)))

    torch.manual_seed(0)
    model = Net(normed).double()
    inputs, targets = batch(8, 5, 3)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1), iterations=iterations, measure=True)
    for step in range(1, 4):
        twin = copy.deepcopy(model)
        F.mse_loss(twin(inputs), targets).backward()
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
        assert int(model.norm.num_batches_tracked) == step
        assert_same(dict(twin.norm.named_buffers()), dict(model.norm.named_buffers()))
        for a, b in zip(twin.parameters(), model.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_buffers_of_modules_that_come_later_are_found() -> None:
    torch.manual_seed(0)
    model, norm = nn.Linear(5, 5).double(), nn.BatchNorm1d(5).double()
    inputs = batch(8, 5, 3)[0]
    optimizer = AverageGradient(torch.optim.SGD([*model.parameters(), *norm.parameters()], lr=0.1))
    optimizer.step(lambda: torch.tanh(model(inputs)).mean())
    for step in range(1, 4):
        optimizer.step(lambda: torch.sigmoid(norm(model(inputs))).square().mean())
        assert int(norm.num_batches_tracked) == step


class Counter(nn.Module):
    """Notes how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * 2.0


@pytest.mark.parametrize("late", [lambda: nn.BatchNorm1d(5, affine=False), Counter], ids=["norm", "counter"])
def test_buffers_of_modules_that_come_later_without_weights_or_nonlinearities_are_found(late: Any) -> None:
    torch.manual_seed(0)
    model, part = nn.Linear(5, 5), late()
    inputs = batch(8, 5, 3)[0].float()
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1), iterations=3)
    for _ in range(3):
        optimizer.step(lambda: torch.tanh(model(inputs)).mean())
    for step in range(1, 4):
        optimizer.step(lambda: torch.tanh(part(model(inputs))).square().mean())
        assert int(part.num_batches_tracked if isinstance(part, nn.BatchNorm1d) else part.calls) == step


def test_buffers_of_a_layer_that_was_exchanged_for_another_are_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = batch(8, 5, 3)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        for step in range(1, 4):
            optimizer.step(lambda: F.mse_loss(model(inputs), targets))
            assert int(model[1].num_batches_tracked) == step
        model[1] = nn.BatchNorm1d(4, affine=False).double()


def test_frozen_parameters_groups_and_those_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, h: torch.tanh(m.inner(h))).double()
    model.first.weight.requires_grad_(False)
    before = state_of(model)
    groups = [
        {"params": [*model.first.parameters(), *model.norm.parameters()]},
        {"params": model.inner.parameters(), "lr": 0.5},
    ]
    base = torch.optim.SGD([*groups, {"params": model.last.parameters()}], lr=0.1, weight_decay=0.1)
    inputs, targets = batch(8, 5, 3)
    AverageGradient(base).step(lambda: F.mse_loss(model(inputs), targets))
    after = state_of(model)
    for name in ("first.weight", "norm.weight", "norm.bias"):
        assert torch.equal(before[name], after[name])
    decayed = before["inner.weight"] - 0.5 * (model.inner.weight.grad + 0.1 * before["inner.weight"])
    same = (after["inner.weight"] - decayed).abs() < 1e-15
    mirrored = (after["inner.weight"] - 2 * before["inner.weight"] + decayed).abs() < 1e-15
    assert bool((same | mirrored).all())
    assert bool(same.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_odd_and_non_contiguous_weights(dtype: torch.dtype) -> None:
    """Large tensors go piece by piece, small ones together; others as they are. All must agree with plain formulas."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(300, 200, dtype=dtype) / 10).T)
    odd = nn.Parameter(torch.randn(200, 357, dtype=dtype) / 10)
    small = nn.Parameter(torch.randn(357, dtype=dtype))
    x = torch.randn(4, 300, dtype=dtype)

    def run(function: Callable[[Tensor], Tensor], w: list[Tensor]) -> Tensor:
        return function(function(function(x @ w[0].T) @ w[1]) * w[2]).square().mean()

    parameters = [weight, odd, small]
    before = [p.detach().clone() for p in parameters]
    optimizer = AverageGradient(torch.optim.SGD(parameters, lr=50.0))
    optimizer.step(lambda: run(torch.tanh, list(parameters)))
    gradients = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    candidate = [w - 50.0 * g for w, g in zip(before, gradients, strict=True)]
    met: list[tuple[Tensor, Tensor]] = []
    run(lambda z: (met.append((z, z.tanh())), z.tanh())[1], candidate)
    place = iter(met)

    def sloped(z: Tensor) -> Tensor:
        other, value = next(place)
        near = (other - z.detach()).abs() <= 1.19e-7
        slope = torch.where(near, 1 - z.detach().tanh() ** 2, (value - z.detach().tanh()) / (other - z.detach()))
        return z.detach().tanh() + slope * (z - z.detach())

    leaves = [w.clone().requires_grad_() for w in before]
    averages = torch.autograd.grad(run(sloped, list(leaves)), leaves)
    flips = 0
    for parameter, w, g, a in zip(parameters, before, gradients, averages, strict=True):
        sure = a.abs() > 1e-4 * a.abs().max()
        expected = w - (50.0 * g).abs() * a.sign()
        assert torch.allclose(parameter.detach()[sure], expected[sure], rtol=1e-5, atol=1e-6)
        flips += int((g.sign() != a.sign()).sum())
    assert flips > 100
    assert not weight.is_contiguous()
