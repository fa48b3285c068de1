"""The optimizer that guesses: what it leaves behind, and that it is an optimizer like any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Monitor, Reading, every
from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers import (
    STEP_COSINE,
    CosineMatched,
    DirectionalDescent,
    Downstream,
    GuessedGradient,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.comparing import true_gradient

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(*extra: nn.Module) -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *extra, nn.Linear(6, 3)).double()
    return model, (torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,)))


def test_a_step_is_the_bases_step_of_the_estimate() -> None:
    model, batch = make()
    twin = copy.deepcopy(model)
    wanted = estimate_gradient(twin, each, batch, WeightTranspose(), generator=torch.Generator().manual_seed(5))
    for name, parameter in twin.named_parameters():
        parameter.grad = wanted[name]
    torch.optim.Adam(twin.parameters(), lr=0.1).step()
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = GuessedGradient(base, WeightTranspose(), model, generator=torch.Generator().manual_seed(5))
    before = each(model, batch).mean().detach()
    loss = optimizer.step(lambda: each(model, batch))
    assert float(loss) == float(before)
    assert not loss.requires_grad
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert found.grad is not None
        assert torch.equal(found.grad, wanted[name])


@pytest.mark.parametrize("guesser", [WeightTranspose(), DirectionalDescent()])
def test_random_numbers_and_buffers_move_as_in_one_forward_pass(guesser: WeightTranspose) -> None:
    model, batch = make(nn.Dropout(0.5))
    model.add_module("norm", nn.BatchNorm1d(3).double())
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.0), guesser, model, examples=8,
                                generator=generator)  # fmt: skip
    torch.manual_seed(3)
    optimizer.step(lambda: each(model, batch).mean())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with torch.no_grad():
        each(twin, batch)
    assert torch.equal(after, torch.get_rng_state())
    for found, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_closure_that_fails_leaves_everything() -> None:
    model, batch = make()
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), WeightTranspose(), model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == 3:
            raise ValueError("no more")
        return each(model, batch)

    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    with pytest.raises(ValueError, match="no more"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, model.parameters()))
    # One number was drawn for the seed before the first pass; the passes' own draws are put back.
    torch.set_rng_state(state)
    torch.randint(2**32, ())
    assert calls == 3
    optimizer.step(lambda: each(model, batch))


def test_batches_of_other_sizes_and_modes() -> None:
    model, batch = make()
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), Downstream(1), model)
    for size in (8, 3, 1, 8):
        part = batch[0][:size], batch[1][:size]
        if size == 1:
            with pytest.raises(ArgumentError, match="`closure` must return one value per example"):
                optimizer.step(lambda: each(model, (batch[0][:1], batch[1][:1])).mean())
        assert math.isfinite(float(optimizer.step(lambda part=part: each(model, part))))
    scalar = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), Downstream(1), model, examples=8)
    assert math.isfinite(float(scalar.step(lambda: each(model, batch).mean())))
    norm, batch = make(nn.BatchNorm1d(6))
    norm.eval()
    optimizer = GuessedGradient(torch.optim.SGD(norm.parameters(), lr=0.1), Downstream(1), norm)
    optimizer.step(lambda: each(norm, batch))
    norm.train()
    with pytest.raises(ArgumentError, match="apart"):
        optimizer.step(lambda: each(norm, batch))


def test_groups_schedulers_state_and_frozen_parameters() -> None:
    def run(steps: int, resumed: dict[str, object] | None = None, weights: dict[str, Tensor] | None = None) -> object:
        model, batch = make()
        model[0].bias.requires_grad_(False)
        if weights is not None:
            model.load_state_dict(weights)
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[2].weight], "lr": 0.2}]
        base = torch.optim.Adam(groups)
        optimizer = GuessedGradient(base, WeightTranspose(), model, generator=torch.Generator().manual_seed(1))
        assert optimizer.param_groups is base.param_groups
        if resumed is not None:
            optimizer.load_state_dict(resumed)
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.step(lambda: each(model, batch))
        assert model[0].bias.grad is None
        assert model[2].bias.grad is None  # not the base's
        return model.state_dict(), copy.deepcopy(optimizer.state_dict())

    whole, _ = run(6)  # type: ignore[misc]
    half, state = run(3)  # type: ignore[misc]
    found, _ = run(3, state, half)  # type: ignore[misc]
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    model, batch = make()
    base = torch.optim.SGD([model[0].weight], lr=1.0)
    optimizer = GuessedGradient(base, WeightTranspose(), model)
    optimizer.add_param_group({"params": [model[2].weight], "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [1.0, 0.5]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    optimizer.step(lambda: each(model, batch))
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.05]


class Kept:
    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def write(self, readings: list[Reading]) -> None:
        self.readings += readings

    def alert(self, alert: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("loss", [each, None])
def test_a_monitor_sees_the_true_step(loss: Callable[[nn.Module, Batch], Tensor] | None) -> None:
    model, batch = make()
    guesser = CosineMatched(0.3)
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.01), guesser, model)
    metrics = ["update_ratio", "grad_norm"] if loss is None else ["update_ratio", "grad_norm", STEP_COSINE]
    monitor = Monitor(model, optimizer, loss, metrics=metrics, schedule=every(1), mask=None, alerts=())
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    truth = true_gradient(model, each, batch)
    optimizer.step(lambda: each(model, batch))
    monitor.step(batch)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    readings = monitor.readings
    assert not monitor.failures
    ratio = float((after - before).norm() / before.norm())
    assert readings["update_ratio"].value == pytest.approx(ratio)
    if loss is None:
        held = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        assert readings["grad_norm"].value == pytest.approx(float(held.norm()))  # of the guess that was used
    else:
        size = torch.cat([part.flatten() for part in truth.values()]).norm()
        assert readings["grad_norm"].value == pytest.approx(float(size))
        assert readings["step_cosine"].value == pytest.approx(0.3, rel=1e-6)
    monitor.close()


def test_wrong_arguments() -> None:
    model, batch = make()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GuessedGradient(base, WeightTranspose(), model)
    with pytest.raises(ArgumentError, match="`closure` must be given"):
        optimizer.step()
    with pytest.raises(ArgumentError, match="`closure` must be callable"):
        optimizer.step(each(model, batch))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`closure` must return one value per example"):
        optimizer.step(lambda: model(batch[0]))
    with pytest.raises(ArgumentError, match=r"`base` must be a torch.optim.Optimizer"):
        GuessedGradient(model, WeightTranspose(), model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="LBFGS"):
        GuessedGradient(torch.optim.LBFGS(model.parameters()), WeightTranspose(), model)
    with pytest.raises(ArgumentError, match="`examples` must be an integer of at least 1"):
        GuessedGradient(base, WeightTranspose(), model, examples=0)
