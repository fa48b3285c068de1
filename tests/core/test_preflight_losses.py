"""The loss at chance of losses that are neither square nor those of classes, and the gain of odd optimizers."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional

from gradmon.preflight import preflight, suggest_lr
from gradmon.preflight.rates import rates_of

EXAMPLES = 64
SCALES = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)


def network(outputs):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, outputs)).double()


def inputs():
    return torch.randn(EXAMPLES, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def targets(size):
    generator = torch.Generator().manual_seed(2)
    return size * (3 * torch.randn(EXAMPLES, 3, dtype=torch.float64, generator=generator) * SCALES + 5)


def quantile(output, target):
    off = target - output
    return torch.maximum(0.9 * off, -0.1 * off).mean()


LOSSES = {
    "huber": functional.huber_loss,
    "huber, sum": lambda a, b: functional.huber_loss(a, b, reduction="sum"),
    "absolute": functional.l1_loss,
    "smooth absolute": lambda a, b: functional.smooth_l1_loss(a, b, beta=0.1),
    "quantile": quantile,
    "distance": lambda a, b: (a - b).norm(dim=1).mean(),
    "square, sum": lambda a, b: functional.mse_loss(a, b, reduction="sum"),
}


def best_constant(loss, target):
    """By another method, without derivatives, from the medians."""
    start = target.median(0).values.numpy()

    def at(value):
        return float(loss(torch.as_tensor(value).expand_as(target), target))

    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9 * float(np.abs(start).max()), "fatol": 0.0}
    return min(minimize(at, first, method="Nelder-Mead", options=options).fun for first in (start, start * 1.3))


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_at_chance_is_that_of_the_best_constant_output(name, size):
    loss, target, model = LOSSES[name], targets(size), network(3)
    optimizer = torch.optim.Adam(model.parameters())
    found = preflight(model, optimizer, lambda model, batch: loss(model(batch[0]), batch[1]), (inputs(), target))
    chance, expected = found.look.chance, best_constant(loss, target)
    assert chance.kind == "other"
    assert expected * (1 - 1e-9) <= chance.loss <= 1.02 * expected
    assert not found.look.begun
    assert found.look.passes <= 40
    # What the unit is: so far from the best output that the loss has doubled.
    assert chance.scale is not None
    center = target.mean(0) if name.startswith("square") else None
    if center is not None:
        moved = float(loss((center + chance.scale).expand_as(target), target))
        assert math.isclose(moved, 2 * expected, rel_tol=1e-6)


def test_a_loss_without_a_best_constant_output_is_unavailable_and_not_guessed():
    model, x = network(3), inputs()
    y = targets(1.0)
    optimizer = torch.optim.Adam(model.parameters())
    # Falls without end, ever more slowly: no output is the best.
    found = preflight(model, optimizer, lambda m, b: 1 + 1 / (10 + functional.softplus(m(b[0]))).log().mean(), (x, y))
    assert found.look.chance is None
    assert found.look.reasons["chance"] == "the loss of the best constant output was not found"
    assert found.risk is None


def test_a_square_loss_that_bends_as_much_as_a_coin_does_is_not_taken_for_one():
    model, x = network(1), inputs()
    y = targets(1.0)[:, :1] - 5
    bend = (math.log1p(math.e) - math.log(2) - 0.5) / math.log(2)
    y = y / math.sqrt(float(y.square().mean()) * bend)  # at which an output of ones costs what it does for a coin
    optimizer = torch.optim.Adam(model.parameters())
    found = preflight(model, optimizer, lambda m, b: functional.mse_loss(m(b[0]), b[1]), (x, y))
    assert found.look.chance.kind == "other"
    assert math.isclose(found.look.chance.loss, float(y.var(unbiased=False)), rel_tol=1e-9)


@pytest.mark.parametrize("weight", [None, 9.0])
def test_the_logistic_loss_is_that_of_a_coin(weight):
    model, x = network(2), inputs()
    y = (targets(1.0)[:, :2] > 6).double()
    options = {} if weight is None else {"pos_weight": torch.tensor(weight, dtype=torch.float64)}
    optimizer = torch.optim.Adam(model.parameters())
    found = preflight(
        model,
        optimizer,
        lambda m, b: functional.binary_cross_entropy_with_logits(m(b[0]), b[1], **options),
        (x, y),
    )
    expected = math.log(2) * float((1 + ((weight or 1) - 1) * y).mean())
    assert found.look.chance.kind == "binary"
    assert math.isclose(found.look.chance.loss, expected, rel_tol=1e-9)


def of_classes(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def checked(model, loss, batch):
    return preflight(model, torch.optim.Adam(model.parameters()), loss, batch)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_other_networks_in_the_loss_are_not_the_models(after, normed):
    model, teacher = network(5), network(5).requires_grad_(False)
    if normed:  # its weight is no parameter
        nn.utils.parametrizations.spectral_norm(teacher[2])
    batch = inputs(), torch.arange(EXAMPLES) % 5

    def loss(model, batch):
        before = None if after else teacher(batch[0])
        own = model(batch[0])
        taught = (teacher(batch[0]) if before is None else before).mul(3).softmax(1)
        return functional.cross_entropy(own, (taught.detach() + functional.one_hot(batch[1], 5)) / 2)

    found, alone = checked(model, loss, batch).look, checked(model, of_classes, batch).look
    assert found.chance.kind == "classification"
    assert found.chance.head
    assert (found.out_sd, found.sig) == (alone.out_sd, alone.sig)
    assert found.relg is not None


def test_a_discriminator_is_not_the_head_of_a_generator():
    generator, discriminator = network(8), network(1)
    found = checked(generator, lambda g, x: functional.softplus(-discriminator(g(x))).mean(), inputs())
    assert found.risk is None
    assert "vanishing" not in [cause.name for cause in found.causes]


def test_a_head_beside_the_model_is_its_head_where_the_optimizer_has_it():
    model, head = network(6), nn.Linear(6, 5).double()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()])
    batch = inputs(), torch.arange(EXAMPLES) % 5
    found = preflight(model, optimizer, lambda m, b: functional.cross_entropy(head(m(b[0])), b[1]), batch).look
    assert (found.chance.kind, found.chance.classes) == ("classification", 5)
    assert found.out_sd == pytest.approx(float(head(model(batch[0])).detach().var(0, unbiased=False).mean().sqrt()))


@pytest.mark.parametrize(
    ("advantages", "reason"),
    [
        (lambda noise: torch.ones(EXAMPLES).double().masked_fill(torch.arange(EXAMPLES) % 2 == 0, -1), "not positive"),
        (lambda noise: (noise - noise.mean()) / noise.std(), "not positive|against their classes"),
        (lambda noise: noise + 0.1, "against their classes"),
        (lambda noise: noise - 0.3, "not positive"),
    ],
)
def test_a_policy_gradient_has_no_loss_at_chance(advantages, reason):
    noise = torch.randn(EXAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    batch = inputs(), torch.arange(EXAMPLES) % 4, advantages(noise - noise.mean())

    def loss(model, batch):
        chosen = model(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        return -(chosen * batch[2]).mean()

    found = checked(network(5), loss, batch)
    assert found.risk is None
    assert found.look.chance is None
    assert re.search(reason, found.look.reasons["chance"])
    assert found.learning_rates.groups is not None


def test_a_rare_class_is_no_policy_gradient():
    batch = inputs(), torch.zeros(EXAMPLES, dtype=torch.long)
    weights = torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    loss = lambda m, b: (weights[b[1]] * functional.cross_entropy(m(b[0]), b[1], reduction="none")).mean() * 7  # noqa: E731
    assert checked(network(5), loss, batch).look.chance.loss == pytest.approx(7 * math.log(5))


def test_a_last_layer_of_zeros_is_no_vanishing_signal():
    model, batch = network(5), (inputs(), torch.arange(EXAMPLES) % 5)
    nn.init.zeros_(model[2].weight)
    found = checked(model, of_classes, batch)
    assert found.risk is None
    assert found.reason.startswith("the last weight matrix is zero")
    assert "vanishing" not in [cause.name for cause in found.causes]
    nn.init.constant_(model[0].bias, -100)  # nothing reaches it either
    assert next(cause.name for cause in checked(model, of_classes, batch).causes) == "vanishing"


class Factors(nn.Module):
    """One number for each example, and no linear map."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, pairs):
        return (self.a(pairs[:, 0]) * self.b(pairs[:, 1])).sum(1)


def test_an_output_of_one_number_for_each_example_has_one_constant():
    pairs, y = torch.arange(2 * EXAMPLES).reshape(-1, 2) % 9, targets(1.0)[:, 0]
    chance = checked(Factors().double(), lambda m, b: functional.mse_loss(m(b[0]), b[1]), (pairs, y)).look.chance
    assert (chance.kind, chance.head) == ("other", False)
    assert chance.loss == pytest.approx(float(y.var(unbiased=False)), rel=1e-9)
    assert chance.scale == pytest.approx(float(y.std(unbiased=False)), rel=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_low_precision_is_no_other_kind_of_loss(whole):
    model, batch = network(10).bfloat16(), (inputs().bfloat16(), torch.arange(EXAMPLES) % 10)
    chance = checked(
        model,
        lambda m, b: functional.cross_entropy(m(b[0]).to(torch.bfloat16 if whole else torch.float32), b[1]),
        batch,
    )
    chance = chance.look.chance
    assert (chance.kind, chance.classes) == ("classification", 10)
    assert chance.loss == pytest.approx(math.log(10), rel=0.02 if whole else 1e-6)


def test_low_precision_of_a_coin():
    model, x = network(1).bfloat16(), inputs()
    loss = lambda m, b: functional.binary_cross_entropy_with_logits(m(b[0]).float(), b[1])  # noqa: E731
    assert checked(model, loss, (x.bfloat16(), (x[:, :1] > 0).float())).look.chance.kind == "binary"


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=1.0),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=1.0),
        lambda parameters: torch.optim.RMSprop(parameters, alpha=1.0),
    ],
)
def test_steps_without_a_last_length_have_no_suggestion(make):
    model, batch = network(5), (inputs(), torch.arange(EXAMPLES) % 5)
    found = suggest_lr(model, make(model.parameters()), of_classes, batch)
    assert found.groups is None
    assert "have no last length" in found.reason
    assert preflight(model, make(model.parameters()), of_classes, batch).risk is None


def test_dampening_counts_only_with_momentum_as_in_the_optimizer():
    model, batch = network(5), (inputs(), torch.arange(EXAMPLES) % 5)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    dampened = torch.optim.SGD(model.parameters(), lr=0.1, dampening=0.5)
    assert rates_of(dampened, list(model.parameters())).gain == 1
    assert suggest_lr(model, dampened, of_classes, batch).groups == suggest_lr(model, plain, of_classes, batch).groups


def test_a_learning_rate_that_is_not_finite_is_told_as_such():
    model, batch = network(5), (inputs(), torch.arange(EXAMPLES) % 5)
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=math.inf), of_classes, batch)
    assert found.reason == "a learning rate is not finite"


def test_a_suggestion_that_is_only_a_bound_is_told_as_one():
    model, batch = network(5), (inputs(), torch.arange(EXAMPLES) % 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = preflight(model, optimizer, lambda m, b: 1e30 * of_classes(m, b), batch)
    assert found.look.scan.bound == "below"
    assert "to 0.001 or less, from" in found.causes[0].remedy
    assert "0.1 -> 0.001 or less" in str(found)
    assert "0.1 -> 0.001 or less" in str(suggest_lr(model, optimizer, lambda m, b: 1e30 * of_classes(m, b), batch))


class Jittered(torch.utils.data.Dataset):
    """Draws from a generator of its own."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __len__(self):
        return 40

    def __getitem__(self, place):
        return torch.from_numpy(self.generator.normal(size=8)), place % 5


def test_generators_of_datasets_that_are_put_together_are_put_back():
    def drawn(check):
        model = network(5)
        loader = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([Jittered(1), Jittered(2)]), 16)
        if check:
            preflight(model, torch.optim.Adam(model.parameters()), of_classes, loader)
        return torch.cat([batch for batch, _ in loader])

    assert torch.equal(drawn(check=True), drawn(check=False))
