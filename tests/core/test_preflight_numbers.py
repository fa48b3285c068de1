"""What preflight measures, against slow truths that follow the definitions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradmon import reinitialize
from gradmon.preflight.look import look
from gradmon.preflight.scan import HALF

CLASSES, SIZE = 5, 24


def entropy(model, batch):
    output = model(batch[0])
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), batch[1].reshape(-1))


def square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Tied(nn.Module):
    """Symbols to symbols through self-attention; the head is the embedding, used by a function."""

    def __init__(self):
        super().__init__()
        self.symbols = nn.Embedding(CLASSES, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.symbols(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.inner(x))
        self.hidden = x.detach()
        return F.linear(x, self.symbols.weight)


class Conv(nn.Module):
    """Grouped convolutions, a pooled head, and what they made last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        self.hidden = x.detach()
        return self.head(x).mean((2, 3))


class Plain(nn.Module):
    """Two layers."""

    def __init__(self, outputs=CLASSES, deviation=1.0):
        super().__init__()
        self.first, self.head = nn.Linear(6, 7), nn.Linear(7, outputs)
        self.head.weight.data.mul_(deviation)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.hidden = x.detach()
        return self.head(x)


def labels(*shape):
    return torch.randint(CLASSES, shape)


def problems():
    return {
        "plain": (Plain(), entropy, (torch.randn(SIZE, 6), labels(SIZE))),
        "conv": (Conv(), entropy, (torch.randn(SIZE, 2, 5, 5), labels(SIZE))),
        "tied": (Tied(), entropy, (labels(SIZE, 4), labels(SIZE, 4))),
    }


def optimizers():
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
        "decaying": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.3),
    }


def gradient_at(model, loss, batch):
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    loss(twin, batch).backward()
    return [parameter.grad.clone() for parameter in twin.parameters() if parameter.requires_grad]


def change_at(model, loss, training, probe, make, rate):
    """The relative change of the probe's gradient, by a real step of a real optimizer on a copy of the model."""
    before = torch.cat([part.reshape(-1) for part in gradient_at(model, loss, probe)])
    twin = copy.deepcopy(model)
    optimizer = make(twin.parameters())
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss(twin, training).backward()
    optimizer.step()
    after = torch.cat([part.reshape(-1) for part in gradient_at(twin, loss, probe)])
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("kind", optimizers())
def test_every_trial_step_is_a_step_of_the_optimizer(name, kind):
    model, loss, batch = problems()[name]
    model, make = model.double(), optimizers()[kind]
    training, probe = (
        tuple(t.double() if t.is_floating_point() else t for t in part)
        for part in (batch, tuple(t.flip(0) if i == 0 else t for i, t in enumerate(batch)))
    )
    found = look(model, make(model.parameters()), loss, [training, probe], 40)
    assert found.apart
    assert len(found.scan.points) >= 2
    for point in found.scan.points:
        assert point.change == pytest.approx(change_at(model, loss, training, probe, make, point.rate), rel=1e-9)
    # The rate in between is where the change crosses a half: it lies between points on either side.
    low = max(point.rate for point in found.scan.points if point.change < HALF)
    high = min(point.rate for point in found.scan.points if point.change >= HALF)
    assert low <= found.scan.half <= high
    assert high / low == pytest.approx(math.sqrt(10))
    assert change_at(model, loss, training, probe, make, found.scan.half) == pytest.approx(HALF, rel=0.25)


@pytest.mark.parametrize("name", problems())
def test_outputs_hidden_signal_and_gradients(name):
    model, loss, batch = problems()[name]
    model = model.double()
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    found = look(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch, 40)
    twin = copy.deepcopy(model)
    last = getattr(twin, "head", None)
    made = []
    if last is not None:
        last.register_forward_hook(lambda module, inputs, output: made.append(output.detach()))
    output = twin(batch[0]).detach()
    output = (made[0] if made else output).reshape(SIZE, -1)
    spread = math.sqrt(sum(float(column.var(unbiased=False)) for column in output.T) / output.shape[1])
    assert found.out_sd == pytest.approx(spread, rel=1e-9)
    hidden = twin.hidden.reshape(SIZE, -1)
    between = float((hidden - hidden.mean(0)).square().sum())
    assert found.sig == pytest.approx(between / float(hidden.square().sum()), rel=1e-9)
    first = {"plain": "first.weight", "conv": "first.weight", "tied": "attention.in_proj_weight"}[name]
    final = {"plain": "head.weight", "conv": "head.weight", "tied": "symbols.weight"}[name]
    parameters = dict(twin.named_parameters())
    loss(twin, batch).backward()
    ratios = [float(parameters[n].grad.norm() / parameters[n].detach().norm()) for n in (first, final)]
    assert found.relg == pytest.approx(ratios[0] / ratios[1], rel=1e-9)
    assert not found.reasons


def test_chance_of_classes_is_their_logarithm_in_every_form():
    x, y = torch.randn(SIZE, 6), labels(SIZE)
    weighted = torch.linspace(0.5, 2, CLASSES)
    forms = {
        "mean": (lambda m, b: F.cross_entropy(m(b[0]), b[1]), 1),
        "sum": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), SIZE),
        "values": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), 1),
        "smoothed": (lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1), 1),
        "weighted": (lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weighted), 1),
        "in quarters": (lambda m, b: F.cross_entropy(m(b[0]), b[1]) / 4, 0.25),
        "sevenfold": (lambda m, b: 7.3 * F.cross_entropy(m(b[0]), b[1]), 7.3),
        "by hand": (lambda m, b: -m(b[0]).log_softmax(-1).gather(1, b[1][:, None]).mean(), 1),
    }
    for name, (loss, times) in forms.items():
        model = Plain()
        found = look(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, (x, y), 40)
        assert (found.chance.kind, found.chance.classes) == ("classification", CLASSES), name
        assert found.chance.loss == pytest.approx(times * math.log(CLASSES), rel=1e-5)
        assert found.chance.scale == 1


def test_chance_of_a_head_inside_of_what_the_model_returns():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x, y):
            logits = self.inner(x)
            return {"loss": F.cross_entropy(logits, y), "logits": logits.log_softmax(-1)}

    model = Wrapped()
    batch = {"x": torch.randn(SIZE, 6), "y": labels(SIZE)}
    found = look(model, torch.optim.Adam(model.parameters()), lambda m, b: m(**b)["loss"], batch, 40)
    assert found.chance.loss == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert found.chance.head


@pytest.mark.parametrize("reduction", ["mean", "sum", "quarter"])
def test_chance_of_coins(reduction):
    x = torch.randn(SIZE, 6)
    y = (torch.rand(SIZE, 3) < 0.2).float()
    model = Plain(3)

    def loss(model, batch):
        values = F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")
        return {"mean": values.mean(), "sum": values.sum(), "quarter": values.mean() / 4}[reduction]

    found = look(model, torch.optim.Adam(model.parameters()), loss, (x, y), 40)
    assert found.chance.kind == "binary"
    assert found.chance.loss == pytest.approx(
        math.log(2) * {"mean": 1, "sum": y.numel(), "quarter": 0.25}[reduction], rel=1e-5
    )


@pytest.mark.parametrize("deviation", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_chance_of_a_regression_is_the_variance_of_its_targets(deviation, mean):
    x = torch.randn(64, 6, dtype=torch.float64)
    y = deviation * (torch.randn(64, 3, dtype=torch.float64) + mean)
    model = Plain(3, deviation).double()
    for factor in (1.0, 0.5, 20.0):
        loss = lambda m, b, factor=factor: factor * F.mse_loss(m(b[0]), b[1])  # noqa: E731
        found = look(model, torch.optim.Adam(model.parameters()), loss, (x, y), 40)
        variance = float((y - y.mean(0)).square().mean())
        assert found.chance.kind == "other"
        assert found.chance.loss == pytest.approx(factor * variance, rel=1e-6)
        # The unit is the deviation of the targets, whatever the loss is multiplied by.
        assert found.chance.scale == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_chance_of_an_absolute_loss_is_near_that_of_the_median():
    x = torch.randn(64, 6, dtype=torch.float64)
    y = 3 * torch.randn(64, 2, dtype=torch.float64) + 1
    model = Plain(2).double()
    loss = lambda m, b: F.l1_loss(m(b[0]), b[1])  # noqa: E731
    found = look(model, torch.optim.Adam(model.parameters()), loss, (x, y), 40)
    best = float((y - y.median(0).values).abs().mean())
    assert best <= found.chance.loss + 1e-9
    assert found.chance.loss <= 1.1 * best
    assert 0.5 * float(y.std()) < found.chance.scale < 3 * float(y.std())


def test_a_regression_whose_targets_cancel_is_not_taken_for_classes():
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, 1, dtype=torch.float64) + 1
    model = Plain(2).double()
    found = look(model, torch.optim.Adam(model.parameters()), square, (x, torch.cat([y, -y], 1)), 40)
    assert found.chance.kind == "other"
    assert found.chance.loss == pytest.approx(float(y.var(0, unbiased=False)), rel=1e-6)


def test_a_regression_is_not_taken_for_classes_because_its_loss_is_their_logarithm():
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, CLASSES, dtype=torch.float64)
    y = y * math.sqrt(math.log(CLASSES) / float(y.square().mean()))
    model = Plain().double()
    found = look(model, torch.optim.Adam(model.parameters()), square, (x, y), 40)
    assert found.chance.kind == "other"
    y = y[:, :1] * math.sqrt(math.log(2) / float(y[:, :1].square().mean()))
    model = Plain(1).double()
    found = look(model, torch.optim.Adam(model.parameters()), square, (x, y), 40)
    assert found.chance.kind == "other"


def test_what_is_not_known_is_not_guessed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Plain(), Plain()

        def forward(self, x):
            return self.first(x), self.second(x)

    model, batch = Two(), (torch.randn(SIZE, 6), labels(SIZE))

    def both(model, batch):
        one, two = model(batch[0])
        return F.cross_entropy(one, batch[1]) + F.cross_entropy(two.flip(0), batch[1])

    found = look(model, torch.optim.Adam(model.parameters()), both, batch, 40)
    assert (found.chance, found.out_sd, found.sig, found.relg) == (None,) * 4
    assert "the loss depends on more" in found.reasons["chance"]
    assert found.scan.half is not None
    # A penalty on the weights is also more than the output.
    model = Plain()
    penal = lambda m, b: entropy(m, b) + sum(p.square().sum() for p in m.parameters())  # noqa: E731
    found = look(model, torch.optim.Adam(model.parameters()), penal, batch, 40)
    assert found.chance is None


def test_a_model_that_refuses_an_output_of_zeros_is_a_reason():
    model, batch = Plain(), (torch.randn(SIZE, 6), labels(SIZE))

    def strict(model, batch):
        output = model(batch[0])
        if not bool(output.std(0).detach().gt(0).all()):
            raise LookupError("all outputs are the same\nand more")
        return F.cross_entropy(output, batch[1])

    found = look(model, torch.optim.Adam(model.parameters()), strict, batch, 40)
    assert found.chance is None
    assert found.reasons["chance"] == "LookupError: all outputs are the same"
    assert found.scan.half is not None
    reinitialize(model, strict, batch)


def test_a_raw_product_at_the_end_has_outputs_and_no_hidden_layer():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 7)
            self.last = nn.Parameter(torch.randn(7, CLASSES))

        def forward(self, x):
            return torch.tanh(self.first(x)) @ self.last

    model, batch = Raw(), (torch.randn(SIZE, 6), labels(SIZE))
    found = look(model, torch.optim.Adam(model.parameters()), entropy, batch, 40)
    assert found.chance.loss == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert not found.chance.head
    assert found.out_sd == pytest.approx(
        math.sqrt(float(model(batch[0]).detach().var(0, unbiased=False).mean())), rel=1e-5
    )
    assert (found.sig, found.relg) == (None, None)


def test_noise_scale_by_definition():
    model, loss, batch = problems()["plain"]
    model = model.double()
    batch = batch[0].double(), batch[1]
    found = look(model, torch.optim.Adam(model.parameters()), loss, batch, 40)
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in gradient_at(model, loss, (batch[0][i : i + 1], batch[1][i : i + 1]))])
            for i in range(SIZE)
        ]
    )
    mean = rows.mean(0)
    noise = float((rows - mean).square().sum()) / (SIZE - 1)
    signal = float(mean.square().sum()) - noise / SIZE
    assert found.noise_scale == pytest.approx(noise / signal if signal > 0 else math.inf, rel=1e-6)


def test_a_bound_is_a_bound():
    # A loss that is linear in the weights: no step changes its gradient.
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(SIZE, 3, dtype=torch.float64)
    found = look(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).mean(), x, 40)
    assert found.scan.bound == "above"
    assert found.scan.half == pytest.approx(0.1 * 10**4)
    # One with so much curvature that the shortest step is too long.
    steep = lambda m, b: (1e9 * m(b).square()).mean()  # noqa: E731
    found = look(model, torch.optim.SGD(model.parameters(), lr=0.1), steep, x, 40)
    assert found.scan.bound == "below"
    assert found.scan.half == pytest.approx(0.1 * 10**-4)
