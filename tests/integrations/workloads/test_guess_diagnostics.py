"""The numbers about guesses against slow references and closed forms; the reduced claims; the command."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError, Unavailable
from gradmon_integrations.workloads.data import load
from gradmon_integrations.workloads.guessers import (
    GUESSERS,
    ActivationMixing,
    ActivationPerturbation,
    CosineMatched,
    DirectionalDescent,
    Downstream,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.bias import (
    bias_curve,
    limit_cosine,
    limit_gradient,
    projected_factors,
)
from gradmon_integrations.workloads.guessers.command import configure, run
from gradmon_integrations.workloads.guessers.comparing import cosines, one_step_effectiveness, true_gradient
from gradmon_integrations.workloads.guessers.experiment import MODELS, Plan, train
from gradmon_integrations.workloads.guessers.structure import (
    effective_rank,
    effective_ranks,
    jacobian_spectra,
    subspace_shares,
)

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def make(examples: int = 6) -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    return mlp(4, 6, 7, 3), (torch.randn(examples, 4, dtype=torch.float64), torch.randint(3, (examples,)))


def test_cosines() -> None:
    truth = {"a.weight": torch.tensor([3.0, 0.0]), "a.bias": torch.tensor([0.0]), "b.weight": torch.tensor([4.0])}
    guess = {"a.weight": torch.tensor([1.0, 0.0]), "a.bias": torch.tensor([1.0]), "b.weight": -truth["b.weight"]}
    found = cosines(guess, truth)
    assert found.layers == {"a": pytest.approx(3 / (3 * math.sqrt(2))), "b": pytest.approx(-1)}
    assert found.without_last == found.layers["a"]
    assert found.whole == pytest.approx((3 - 16) / (5 * math.sqrt(18)))
    assert math.isnan(cosines({k: torch.zeros_like(v) for k, v in truth.items()}, truth).whole)
    assert cosines({k: v * 2.0**100 for k, v in truth.items()}, truth).whole == pytest.approx(1)
    assert cosines({"w": torch.full((3,), 0.1)}, {"w": torch.full((3,), 0.3)}).whole <= 1
    assert math.isnan(cosines({"w": torch.tensor([math.inf])}, {"w": torch.tensor([1.0])}).whole)
    with pytest.raises(ArgumentError, match="`estimate` must have the names"):
        cosines({}, truth)


def test_one_step_effectiveness_of_a_quadratic() -> None:
    """``|w|^2 / 2``: the best step along a direction of cosine c gains c^2 of what the gradient's does."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))

    model, batch = Point(), torch.zeros(1, 1)

    def loss(model: Point, batch: Tensor) -> Tensor:
        return model.w.square().sum() / 2

    c = 0.6
    across = torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64) / 3
    direction = {"w": c * model.w.detach() / 3 + math.sqrt(1 - c * c) * across}
    steps = [i / 1000 for i in range(1, 1200)]
    found = one_step_effectiveness(model, loss, batch, direction, steps=steps)  # type: ignore[arg-type]
    assert found == pytest.approx(c * c, abs=1e-6)
    assert one_step_effectiveness(model, loss, batch, {"w": -model.w.detach()}, steps=steps) == 0  # type: ignore[arg-type]
    assert model.w.tolist() == [1.0, 2.0, 2.0]
    with torch.no_grad():
        model.w.zero_()
    with pytest.raises(Unavailable, match="no step"):
        one_step_effectiveness(model, loss, batch, direction)  # type: ignore[arg-type]


@pytest.mark.parametrize("guesser", [ActivationPerturbation(), WeightTranspose(), Downstream(1), Downstream(2),
                                     ActivationMixing(normalized=False)], ids=repr)  # fmt: skip
def test_limit_is_the_written_out_covariance(guesser: WeightTranspose) -> None:
    model, batch = make()
    x, w = batch[0], [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    z = [model[0](x).detach()]
    z.append(model[2](z[0].relu()).detach())
    m, a = [(part > 0).double() for part in z], [part.relu() for part in z]
    last = (model[4](a[1]).softmax(1) - F.one_hot(batch[1], 3)).detach() / len(x)
    g = [m[0] * ((m[1] * (last @ w[2])) @ w[1]), m[1] * (last @ w[2])]
    wanted = []
    for layer in range(2):
        rows = []
        for b in range(len(x)):
            d = [torch.diag(part[b]) for part in m]
            t: Tensor = torch.eye(z[layer].shape[1], dtype=torch.float64)
            if isinstance(guesser, ActivationMixing):
                t = d[layer] @ a[layer].T
            elif isinstance(guesser, Downstream) and layer == 0:
                t = d[0] @ w[1].T @ d[1] if guesser.layers == 1 else d[0] @ w[1].T @ d[1] @ w[2].T
            elif not isinstance(guesser, ActivationPerturbation):
                t = d[layer] @ w[layer + 1].T
            rows.append(t @ t.T @ g[layer][b])
        wanted.append(torch.stack(rows))
    found = limit_gradient(model, each, batch, guesser)
    for layer, inputs in enumerate((x, a[0])):
        torch.testing.assert_close(found[f"{2 * layer}.weight"], wanted[layer].T @ inputs)
        torch.testing.assert_close(found[f"{2 * layer}.bias"], wanted[layer].sum(0))


def test_unbiased_guesses_converge_as_the_square_root() -> None:
    """One example whose layers' inputs all have length 1: the noise is the same in all of the M pre-activations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(model[0].weight)[0])
    batch = F.normalize(torch.randn(1, 16, dtype=torch.float64)), torch.tensor([3])
    truth = true_gradient(model, each, batch)
    for guesses in (12, 96):
        found = [
            cosines(estimate_gradient(model, each, batch, ActivationPerturbation(), guesses=guesses,
                                      generator=torch.Generator().manual_seed(seed)), truth).whole
            for seed in range(25)
        ]  # fmt: skip
        assert sum(found) / 25 == pytest.approx((guesses / (guesses + 24)) ** 0.5, abs=0.05)


@pytest.mark.parametrize("guesser", [WeightTranspose(), Downstream(1, "uniform")], ids=repr)
def test_biased_guesses_saturate_at_their_limit(guesser: WeightTranspose) -> None:
    model, batch = make(1)
    limit = limit_cosine(model, each, batch, guesser)
    curve = bias_curve(model, each, batch, guesser, [4096], generator=torch.Generator().manual_seed(0))
    assert abs(curve[4096] - limit) < 0.03
    assert limit_cosine(model, each, batch, ActivationPerturbation()) == pytest.approx(1)


def test_scaled_guesses_have_a_limit_too() -> None:
    """The factors against sampling, and against the one case with a closed form: equal variances share alike."""
    v = torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    squares = v * torch.randn(400_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    sampled = (squares / squares.sum(1, keepdim=True)).mean(0)
    found = projected_factors(v)
    assert float((found - sampled).abs().max()) < 2e-3
    assert float(found.sum()) == pytest.approx(1, abs=1e-9)
    alike = torch.full((5,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(projected_factors(alike), alike / 15)
    assert float(projected_factors(torch.ones(1, dtype=torch.float64))) == pytest.approx(1)
    model, batch = make()
    limit = limit_cosine(model, each, batch, ActivationMixing())
    curve = bias_curve(model, each, batch, ActivationMixing(), [2048], generator=torch.Generator().manual_seed(0))
    assert abs(curve[2048] - limit) < 0.03


def test_effective_rank() -> None:
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert effective_rank(q) == pytest.approx(5)
    assert effective_rank(q * 2.0**100) == pytest.approx(5)
    assert effective_rank(q[:, :1] @ q[:1]) == pytest.approx(1)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    shares = [0.5, 0.25, 0.125, 0.125]
    assert effective_rank(q @ torch.diag(values) @ q) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    with pytest.raises(ArgumentError, match="at least two dimensions"):
        effective_rank(torch.ones(3))
    with pytest.raises(Unavailable, match="zero"):
        effective_rank(torch.zeros(2, 2))
    with pytest.raises(Unavailable, match="non-finite"):
        effective_rank(torch.full((2, 2), math.nan))
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 2, 1))
    nn.init.zeros_(model[0].weight)
    assert math.isnan(effective_ranks(model)["0.weight"])
    assert effective_ranks(model)["1.weight"] == pytest.approx(1)


def test_jacobian_spectra_are_those_of_autograd() -> None:
    model, batch = make()
    spectra = jacobian_spectra(model, each, batch, layers=2)
    assert set(spectra) == {(0, 1), (0, 2), (1, 1)}
    z = model[0](batch[0]).detach()
    for length, tail in ((1, model[1:3]), (2, model[1:])):
        values = [torch.linalg.svdvals(torch.autograd.functional.jacobian(tail, row)) for row in z]  # type: ignore[arg-type]
        torch.testing.assert_close(spectra[0, length], torch.stack(values).mean(0))
    with pytest.raises(ArgumentError, match="`layers` must be an integer of at least 1"):
        jacobian_spectra(model, each, batch, layers=0)


def test_subspace_shares_by_explicit_projection() -> None:
    model, batch = make()
    z = model[0](batch[0])
    a = z.relu().detach()
    error = torch.autograd.grad(each(model[1:], (z, batch[1])).mean(), z)[0]
    rank = math.ceil(effective_rank(a))
    vectors = torch.linalg.eigh(a.T @ a)[1]
    projected = error @ vectors[:, -rank:] @ vectors[:, -rank:].T
    share, random = subspace_shares(model, each, batch)[0]
    assert share == pytest.approx(float(projected.square().sum() / error.square().sum()))
    assert random == rank / 6


def test_order_along_a_trajectory_of_backpropagation() -> None:
    torch.manual_seed(0)
    data = load("digits")
    inputs = (data.train_inputs - data.train_inputs.mean()) / data.train_inputs.std()
    model = MODELS["mlp-6x128"](data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for step in range(60):
        chosen = torch.randint(len(inputs), (256,), generator=generator)
        batch = inputs[chosen], data.train_targets[chosen]
        if step % 4 == 0:
            truth = true_gradient(model, each, batch)
            for name in ("directional", "activation", "weight-transpose", "downstream"):
                estimate = estimate_gradient(model, each, batch, GUESSERS[name], generator=generator)
                found.setdefault(name, []).append(abs(cosines(estimate, truth).whole))
        optimizer.zero_grad()
        each(model, batch).mean().backward()
        optimizer.step()
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert 10 * mean["directional"] < mean["activation"]
    assert mean["activation"] < 0.75 * min(mean["weight-transpose"], mean["downstream"])


def test_training_by_guesses() -> None:
    """Fewer steps than the full comparison: what is biased trains less far than what has its cosine without bias."""
    data, plan = load("digits"), Plan(steps=100, look=10**6)
    found = {
        name: train(data, plan, guesser, 0).loss
        for name, guesser in {
            "directional": DirectionalDescent(),
            "transpose": WeightTranspose(),
            "matched": CosineMatched(0.2),
        }.items()
    }
    assert found["matched"] < found["transpose"] < found["directional"]


def test_the_cosine_leaves_out_a_last_layer_that_is_exact() -> None:
    plan = Plan(steps=4, look=2, exact_last=True)
    assert train(load("digits"), plan, CosineMatched(0.3), 0).cosines == pytest.approx([0.3] * 2, rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(model: str) -> None:
    outcome = train(load("digits"), Plan(model, steps=2, look=2, batch_size=16), Downstream(1), 0)
    assert math.isfinite(outcome.loss)
    assert len(outcome.cosines) == 1
    with pytest.raises(ArgumentError, match="`model` must be one of"):
        train(load("digits"), Plan("vgg"), None, 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    options = ["--steps", "4", "--every", "2", "--batch-size", "8", "--seeds", "2", "--prometheus-port", "0"]
    chosen = ["--guesser", "downstream,cosine-0.5", "--logdir", str(tmp_path)]
    assert run(parser.parse_args([*options, *chosen])) == 0
    text = capsys.readouterr().out
    assert "cosine-0.5" in text
    assert "±" in text
    assert list(tmp_path.glob("downstream-1/guesses/events*"))
    assert list(tmp_path.glob("backpropagation-0/events*"))
    assert run(parser.parse_args(["--epochs", "1", "--batch-size", "1500", *chosen])) == 0
    assert "1 steps" in capsys.readouterr().out
    with pytest.raises(ArgumentError, match="`--logdir` must be a directory that holds no such runs yet"):
        run(parser.parse_args(["--steps", "1", *chosen]))


@pytest.mark.parametrize(("options", "message"), [
    (["--guesser", "magic"], "must be among"), (["--guesser", "cosine-2"], "must be among"),
    (["--guesser", "0.3"], "must be among"),
    (["--steps", "0"], "must be a whole number from 1"), (["--lr", "-1"], "must be a positive number"),
    (["--prometheus-port", "70000"], "from 0 to 65535"),
])  # fmt: skip
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(options)
    assert message in capsys.readouterr().err
