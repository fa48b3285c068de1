"""Guesses against their definitions, derivatives against torch.func, and what must be refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    SingularPower,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.comparing import cosines, true_gradient
from gradmon_integrations.workloads.guessers.downstream import sharpened
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Structure

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make(activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 7), activation(), nn.Linear(7, 3)).double()
    return model, (torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))


class Drawn:
    """Noise that remembers what it drew."""

    def __init__(self) -> None:
        self.inner, self.all = Seeded(3), list[Tensor]()

    def draw(self, shape: tuple[int, ...], like: Tensor, kind: Kind) -> Tensor:
        self.all.append(self.inner.draw(shape, like, kind))
        return self.all[-1]


def record(model: nn.Module, batch: Batch) -> Structure:
    with Passes(model, each, batch) as passes:
        return passes.record(True, True)


@pytest.mark.parametrize(("activation", "slope"), [
    (nn.ReLU, lambda z: (z > 0).double()), (nn.Tanh, lambda z: 1 - z.tanh() ** 2),
    (nn.Sigmoid, lambda z: z.sigmoid() * (1 - z.sigmoid())), (nn.LeakyReLU, lambda z: torch.where(z > 0, 1.0, 0.01)),
])  # fmt: skip
def test_guesses_are_the_written_out_products(activation: type[nn.Module], slope: object) -> None:
    model, batch = make(activation)
    x, function = batch[0], activation()
    w = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    z = [model[0](x).detach()]
    z.append(model[2](function(z[0])).detach())
    m = [slope(part) for part in z]  # type: ignore[operator]
    sites = record(model, batch).sites

    def guess(guesser: ActivationGuesser, number: int) -> tuple[Tensor, Tensor]:
        noise = Drawn()
        return guesser.guess(sites[number], noise), noise.all[0]

    y, eps = guess(ActivationPerturbation(masked=True), 0)
    torch.testing.assert_close(y, eps * m[0])
    y, eps = guess(WeightTranspose(), 0)
    torch.testing.assert_close(y, m[0] * (eps @ w[1]))
    y, eps = guess(Downstream(1), 0)
    torch.testing.assert_close(y, m[0] * ((eps * m[1]) @ w[1]))
    y, eps = guess(Downstream(2, "uniform"), 0)
    torch.testing.assert_close(y, m[0] * ((m[1] * (eps @ w[2])) @ w[1]))
    y, eps = guess(Downstream(1), 1)
    torch.testing.assert_close(y, m[1] * (eps @ w[2]))  # at the last layer but one, W^T
    u, s, v = torch.linalg.svd(w[1], full_matrices=False)
    y, eps = guess(SingularPower(3.0), 0)
    torch.testing.assert_close(y, m[0] * (eps @ (u @ torch.diag(s[0] * (s / s[0]) ** 3) @ v)))
    torch.testing.assert_close(sharpened(w[1], 1.0), w[1])
    y, alpha = guess(ActivationMixing(), 1)
    torch.testing.assert_close(y, m[1] * (alpha @ function(z[1])))
    for guesser in (WeightTranspose(), Downstream(3), ActivationPerturbation(masked=True)):
        y, eps = guess(guesser, 2)
        assert torch.equal(y, eps)  # no layer follows, and no activation


def test_next_layer_of_a_residual_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            x = torch.relu(x + self.b(torch.relu(self.a(x))))
            return self.head(x)

    torch.manual_seed(0)
    model, batch = Net().double(), make()[1]
    stem, a, b, head = record(model, batch).sites
    assert [site.following for site in (stem, a, b, head)] == [a, b, head, None]
    x = torch.tanh(model.stem(batch[0]))
    out = x + model.b(torch.relu(model.a(x)))
    noise = Drawn()
    found = WeightTranspose().guess(b, noise)
    torch.testing.assert_close(found, (out > 0) * (noise.all[0] @ model.head.weight))
    noise = Drawn()
    # Both the slope of what the shortcut adds to, and the shortcut itself, are left out: one step back, to a.
    torch.testing.assert_close(WeightTranspose().guess(stem, noise), (1 - x**2) * (noise.all[0] @ model.a.weight))


def test_pulling_back_is_the_transposed_jacobian_through_norms_pools_and_shapes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.elu_(self.norm(self.a(x)))
            x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
            return self.b(x.permute(0, 2, 3, 1).flatten(1))

    torch.manual_seed(0)
    model = Net().double()
    batch = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.randint(3, (3,))
    first = record(model, batch).sites[0]
    eps = torch.randn(3, 16, dtype=torch.float64)
    z = model.a(batch[0]).detach().requires_grad_()
    x = F.elu(model.norm(z))
    x = (F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(first.back(eps), torch.autograd.grad(x, z, eps)[0])


def test_derivatives_are_those_of_torch_func() -> None:
    """Directional descent: ``(v . g) v`` with v's derivative by `torch.func.jvp`, to 1e-12."""
    model, batch = make(nn.Tanh)
    seen: dict[str, Tensor] = {}

    class Spy:
        oracle = False

        def direction(self, parameters: Mapping[str, Tensor], truth: object, noise: Noise) -> object:
            seen.update(DirectionalDescent().direction(parameters, dict, noise)[0])
            return dict(seen), 1.0

    found = estimate_gradient(model, each, batch, Spy())  # type: ignore[arg-type]
    parameters = {name: part.detach() for name, part in model.named_parameters()}

    def value(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    _, along = torch.func.jvp(value, (parameters,), (seen,))
    for name, part in found.items():
        torch.testing.assert_close(part, along * seen[name], rtol=1e-12, atol=1e-15)
        assert part.grad_fn is None


def test_no_graph_is_built_and_nothing_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make()
    graphs: list[object] = []
    for layer in model:
        layer.register_forward_hook(lambda _m, _x, y: graphs.append(y.grad_fn))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("backward")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    for name, guesser in GUESSERS.items():
        for guesses in (1, 3):
            found = estimate_gradient(model, each, batch, guesser, guesses=guesses, exact_last=name != "mixing")
            assert not any(part.requires_grad for part in found.values())
    assert graphs
    assert all(graph is None for graph in graphs)


def test_normalized_guesses_are_projections() -> None:
    """With one example and length 1, the estimate at z is the projection of its gradient: never longer."""
    model, batch = make()
    one = batch[0][:1], batch[1][:1]
    truth = true_gradient(model, each, one)
    biases = [name for name in truth if name.endswith("bias")]  # the gradient by z itself
    size = math.sqrt(sum(float(truth[name].square().sum()) for name in biases))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        found = estimate_gradient(model, each, one, WeightTranspose(), normalize="example", generator=generator)
        length = math.sqrt(sum(float(found[name].square().sum()) for name in biases))
        inner = sum(float((found[name] * truth[name]).sum()) for name in biases)
        assert length <= size * (1 + 1e-12)
        assert inner == pytest.approx(length**2)


def test_paper_standard_deviation_divides_by_the_number_of_weights() -> None:
    model, batch = make()
    total = sum(part.numel() for part in model.parameters())
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    unbiased = estimate_gradient(model, each, batch, DirectionalDescent(), generator=seeds[0])
    paper = estimate_gradient(model, each, batch, DirectionalDescent("paper"), generator=seeds[1])
    for name, part in unbiased.items():
        torch.testing.assert_close(paper[name] * total, part)


@pytest.mark.parametrize("cosine", [0.05, 0.5, 1.0])
def test_cosine_matched_has_its_cosine(cosine: float) -> None:
    model, batch = make()
    truth = true_gradient(model, each, batch)
    found = estimate_gradient(model, each, batch, CosineMatched(cosine))
    assert cosines(found, truth).whole == pytest.approx(cosine, rel=1e-9)
    inner = sum(float((found[name] * truth[name]).sum()) for name in truth)
    assert inner == pytest.approx(sum(float(part.square().sum()) for part in truth.values()))  # no bias along g


def test_cosine_matched_of_a_single_number_is_the_gradient() -> None:
    model, x = nn.Linear(1, 1, bias=False).double(), torch.randn(5, 1).double()
    loss = lambda model, batch: (model(batch) - 3 * batch).square()[:, 0]  # noqa: E731
    truth = true_gradient(model, loss, x)["weight"]
    for seed in range(8):
        found = estimate_gradient(model, loss, x, CosineMatched(0.2), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found["weight"], truth)


def test_batch_norm_in_training_mode_is_refused_or_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    batch = make()[1]
    with pytest.raises(ArgumentError, match="`model` must treat the examples, along the first dimension, apart"):
        estimate_gradient(model, each, batch, ActivationPerturbation())
    found = estimate_gradient(model, mean, batch, ActivationPerturbation(), exact_last=True)
    truth = true_gradient(model, mean, batch)
    torch.testing.assert_close(found["3.weight"], truth["3.weight"])
    assert int(model[1].num_batches_tracked) == 0
    estimate_gradient(model.eval(), each, batch, ActivationPerturbation())


def test_time_first_is_refused_where_as_many_steps_as_examples_hide_it() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.stack([x] * len(x))).mean(0)

    with pytest.raises(ArgumentError, match="apart"):
        estimate_gradient(Turned().double(), each, make()[1], ActivationPerturbation())


def test_wrong_arguments() -> None:
    model, batch = make()
    with pytest.raises(ArgumentError, match="`guesser` must have"):
        estimate_gradient(model, each, batch, "weight-transpose")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`guesses` must be an integer of at least 1"):
        estimate_gradient(model, each, batch, WeightTranspose(), guesses=0)
    with pytest.raises(ArgumentError, match="`normalize` must be"):
        estimate_gradient(model, each, batch, WeightTranspose(), normalize="all")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`per_layer` must be True or False"):
        estimate_gradient(model, each, batch, WeightTranspose(), per_layer=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`loss` must be callable"):
        estimate_gradient(model, None, batch, WeightTranspose())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"one value per example, \(5,\)"):
        estimate_gradient(model, lambda m, b: m(b[0]), batch, WeightTranspose())
    with pytest.raises(ArgumentError, match="floating-point"):
        estimate_gradient(model, lambda m, b: m(b[0]).argmax(), batch, WeightTranspose())
    with pytest.raises(ArgumentError, match="`std` must be"):
        DirectionalDescent("1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`noise` must be"):
        Downstream(1, "cauchy")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`layers` must be an integer of at least 1"):
        Downstream(0)
    with pytest.raises(ArgumentError, match="`power` must be a number of at least 0"):
        SingularPower(-1)
    with pytest.raises(ArgumentError, match=r"`cosine` must be in \(0, 1\]"):
        CosineMatched(0)


def test_what_differs_between_passes_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(4, 3), nn.Linear(3, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)) if self.calls % 2 else self.a(x)

    with pytest.raises(ArgumentError, match="`model` must compute the same in every forward pass"):
        estimate_gradient(Changing().double(), each, make()[1], ActivationPerturbation())


def test_a_function_without_forward_derivative_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(self.a(x).unsqueeze(1), torch.ones(1, 3, dtype=x.dtype), p=3.0).flatten(1).repeat(1, 3)

    with pytest.raises(ArgumentError, match="consist of functions that have a forward-mode derivative"):
        estimate_gradient(Odd().double(), each, make()[1], ActivationPerturbation())


def test_a_guess_of_the_wrong_shape_is_refused() -> None:
    class Wrong:
        needs, overall = "nothing", False

        def guess(self, site: object, noise: Noise) -> Tensor:
            return torch.zeros(2)

    model, batch = make()
    with pytest.raises(ArgumentError, match="`guesser` must return a guess of shape"):
        estimate_gradient(model, each, batch, Wrong())  # type: ignore[arg-type]
