"""What forward passes that are run again, or differentiated forward, could get wrong without a word."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError, Unavailable
from gradmon_integrations.workloads.guessers import (
    ActivationPerturbation,
    DirectionalDescent,
    Downstream,
    GuessedGradient,
    SingularPower,
    WeightTranspose,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.bias import bias_curve, last_layer
from gradmon_integrations.workloads.guessers.comparing import cosines, one_step_effectiveness, true_gradient
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.passes import Passes

Batch = tuple[Tensor, Tensor]


def each(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean(model: nn.Module, batch: Batch) -> Tensor:
    return each(model, batch).mean()


class Net(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6) if first is None else first, nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, x))


def constant_branch(model: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        held = model.a(x)
        held.mul_(2)
    return torch.tanh(model.a(x)) + held


def constant_slice(model: Net, x: Tensor) -> Tensor:
    z = model.a(x) * 2
    with torch.no_grad():
        z = z.add_(1)  # written to in place, it stays what it depends on
    return z.tanh()


def turned_dropout(model: Net, x: Tensor) -> Tensor:
    z = torch.stack([x, -x])  # (2, B, 5)
    return F.dropout(torch.tanh(model.a(z)).transpose(0, 1), 0.5, model.training).mean(1)


def rows_of(model: Net, x: Tensor) -> Tensor:
    return torch.tanh(model.a((x.abs() * 2).long().clamp(max=3))).sum(1)


CASES: dict[str, Callable[[], nn.Module]] = {
    "no_grad": lambda: Net(constant_branch),
    "in place under no_grad": lambda: Net(constant_slice),
    "spectral norm": lambda: Net(lambda m, x: m.a(x).tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6))),  # type: ignore[operator]
    "dropout of a transposed tensor": lambda: Net(turned_dropout),
    "transformer": lambda: nn.Sequential(
        nn.Linear(5, 6),
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, dropout=0.3, batch_first=True, norm_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "padding": lambda: Net(rows_of, nn.Embedding(4, 6, padding_idx=1)),
    "padding from the end": lambda: Net(rows_of, nn.Embedding(4, 6, padding_idx=-1)),
    "bilinear": lambda: Net(lambda m, x: m.a(x, x), nn.Bilinear(5, 5, 6)),  # type: ignore[operator]
}


def make(model: nn.Module, examples: int = 4) -> tuple[nn.Module, Batch]:
    return model.double(), (torch.randn(examples, 5, dtype=torch.float64), torch.randint(3, (examples,)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vectorised", [False, True])
def test_derivatives_are_those_of_backpropagation(name: str, vectorised: bool) -> None:
    """Along random directions of all weights at once, from the same random state."""
    torch.manual_seed(0)
    model, batch = make(CASES[name]())
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    with Passes(model, each, batch) as passes:
        structure = passes.record(False, False)
        directions = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in passes.parameters.items()}
        if vectorised and structure.random:
            pytest.skip("such models are not vectorised")
        try:
            found = passes.tangent(structure, lambda _: None, directions, 3, vectorised)
        except RuntimeError:
            assert vectorised  # not every function can be: the estimate then does without
            pytest.skip("such models are not vectorised")
    torch.set_rng_state(state)
    mean(twin, batch).backward()
    for place in range(3):
        wanted = sum(
            float((p.grad * directions[name][place]).sum()) for name, p in twin.named_parameters() if p.grad is not None
        )
        assert float(found[place].mean()) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(
    "layer", [nn.Dropout1d(0.5), nn.RReLU(), nn.Sequential(nn.Softmax(1), nn.Dropout(0.5))], ids=repr
)
@pytest.mark.parametrize("guesser", [WeightTranspose(), Downstream(2)], ids=repr)
def test_a_random_function_between_layers_draws_the_same_in_every_pass(layer: nn.Module, guesser: Guesser) -> None:
    torch.manual_seed(0)
    model, batch = make(nn.Sequential(nn.Linear(5, 6), layer, nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)))
    parts = [
        estimate_gradient(model, each, batch, guesser, guesses=3, hold=hold, generator=torch.Generator())
        for hold in (False, True)
    ]
    for name, part in parts[0].items():
        torch.testing.assert_close(part, parts[1][name], rtol=1e-10, atol=1e-12)


def test_running_statistics_between_layers_move_once() -> None:
    torch.manual_seed(0)
    model, batch = make(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    twin = copy.deepcopy(model)
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.0), WeightTranspose(), model, examples=4)
    optimizer.step(lambda: mean(model, batch))
    twin(batch[0])
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


@pytest.mark.parametrize("guesser", [DirectionalDescent(), WeightTranspose()], ids=repr)
def test_every_estimate_without_a_generator_guesses_anew(guesser: Guesser) -> None:
    torch.manual_seed(0)
    model, batch = make(Net(lambda m, x: m.a(x).relu()))  # type: ignore[operator]
    first, second = (estimate_gradient(model, each, batch, guesser) for _ in range(2))
    assert not torch.equal(first["a.weight"], second["a.weight"])
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.0), guesser, model)
    taken: list[Tensor] = []
    for _ in range(2):
        optimizer.step(lambda: each(model, batch))
        taken.append(model.a.weight.grad.clone())  # type: ignore[union-attr]
    assert not torch.equal(*taken)


def test_a_model_whose_passes_differ_is_refused() -> None:
    generator = torch.Generator()

    def noisy(model: Net, x: Tensor) -> Tensor:
        return model.a(x) + torch.randn(6, generator=generator, dtype=x.dtype)

    model, batch = make(Net(noisy))
    with pytest.raises(ArgumentError, match=r"every forward pass over a batch\. Got `loss` of another"):
        estimate_gradient(model, each, batch, ActivationPerturbation())
    model, batch = make(Net(noisy), 1)
    with pytest.raises(ArgumentError, match="compute the same in every forward pass"):
        estimate_gradient(model, each, batch, WeightTranspose())


def test_one_example_does_not_tell_whether_examples_interact() -> None:
    images, labels = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    model = nn.Sequential(*layers)
    optimizer = GuessedGradient(torch.optim.SGD(model.parameters(), lr=0.1), ActivationPerturbation(), model)
    optimizer.step(lambda: each(model, (images[:1], labels[:1])))
    with pytest.raises(ArgumentError, match="apart"):
        optimizer.step(lambda: each(model, (images, labels)))


def test_a_copy_of_the_optimizer_trains_a_copy_of_the_model() -> None:
    torch.manual_seed(0)
    model, batch = make(Net(lambda m, x: m.a(x).relu()))  # type: ignore[operator]
    base = torch.optim.Adam(model.parameters())
    optimizer = GuessedGradient(base, SingularPower(2.0), model, generator=torch.Generator())
    optimizer.step(lambda: each(model, batch))
    twin, other = copy.deepcopy((model, optimizer))
    for net, of in ((model, optimizer), (twin, other)):
        of.step(lambda net=net: each(net, batch))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert other.param_groups is other.base.param_groups
    assert other.param_groups[0]["params"][0] is twin.a.weight


def test_hooks_are_called_once_and_by_the_base() -> None:
    model, batch = make(Net(lambda m, x: m.a(x).relu()))  # type: ignore[operator]
    optimizer = GuessedGradient(torch.optim.Adam(model.parameters()), WeightTranspose(), model)
    called: list[object] = []
    module = importlib.import_module("torch.optim.optimizer")
    handle = module.register_optimizer_step_pre_hook(lambda of, *_: called.append(of))
    try:
        optimizer.step(lambda: each(model, batch))
    finally:
        handle.remove()
    assert called == [optimizer.base]
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    optimizer.state_dict()
    assert called[1:] == ["saved"]


def test_singular_values_of_half_precision() -> None:
    model, batch = make(Net(lambda m, x: m.a(x).relu()))  # type: ignore[operator]
    model, batch = model.bfloat16(), (batch[0].bfloat16(), batch[1])
    found = estimate_gradient(model, each, batch, SingularPower(2.0))
    assert all(part.dtype == torch.bfloat16 and bool(part.isfinite().all()) for part in found.values())


def test_a_guess_that_is_not_finite_is_worth_no_number() -> None:
    model, batch = make(Net(lambda m, x: m.a(x).relu()))  # type: ignore[operator]
    broken = {name: part * torch.nan for name, part in true_gradient(model, each, batch).items()}
    with pytest.raises(Unavailable, match="non-finite"):
        one_step_effectiveness(model, each, batch, broken)


def test_the_last_layer_is_the_last_to_be_called() -> None:
    """Also where it is not the last to be registered."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(6, 3), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).relu())

    torch.manual_seed(0)
    model, batch = make(Swapped())
    assert last_layer(model, each, batch) == "head"
    curve = bias_curve(model, each, batch, WeightTranspose(), [2], generator=torch.Generator())
    estimate = estimate_gradient(
        model, each, batch, WeightTranspose(), guesses=2, exact_last=True, generator=torch.Generator()
    )
    assert curve[2] == pytest.approx(cosines(estimate, true_gradient(model, each, batch)).layers["stem"])


@pytest.mark.parametrize("guesser", [DirectionalDescent(), Downstream(1)], ids=repr)
def test_a_table_whose_rows_are_scaled_down_is_left_as_it_was(guesser: Guesser) -> None:
    torch.manual_seed(0)
    model, batch = make(Net(rows_of, nn.Embedding(4, 6, max_norm=1.0)))
    before = copy.deepcopy(model.state_dict())
    estimate_gradient(model, each, batch, guesser)
    true_gradient(model, each, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
