"""The table of edge cases, row by row: a number that is right, or NaN with the reason, and never a wrong number."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon.perturbations import weights as weight_samplers
from tests import references
from tests.zoo.problem import net, normal

EXAMPLES = (
    "gradient_rank",
    "gradient_confusion",
    "gradient_diversity",
    "gradient_coherence",
    "noise_scale",
    "noise_ratio",
    "gradient_snr",
)
ALL = tuple(gradmon.METRICS)


def mse(model: nn.Module, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(-1).mean()


def pairs(size: int = 4):
    return torch.randn(size, 3).double(), torch.randn(size, 2).double()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def measured(model, batch, loss=mse, **options):
    options.setdefault("metrics", ALL)
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    options.setdefault("next_batch", batch)
    return gradmon.measure(model, loss, batch, **options)


def reasons(found):
    assert all(math.isnan(reading.value) == (reading.reason is not None) for reading in found.values())
    return {name: reading.reason for name, reading in found.items()}


def by_loop(model, batch, loss=mse):
    """B times the gradients of the examples' own terms, each example run alone."""
    rows = []
    for i in range(len(batch[0])):
        own = tuple(t[i : i + 1] for t in batch)
        grads = torch.autograd.grad(loss(model, own), list(model.parameters()), allow_unused=True)
        shapes = list(model.parameters())
        rows.append(torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(grads, shapes, strict=True)]))
    return torch.stack(rows).detach()


def shares_or_reason(model, batch, loss):
    try:
        return gradmon.per_example_gradients(model, loss, batch)
    except gradmon.Unavailable as missing:
        return missing.reason


def right_or_unavailable(model, batch, loss=mse, match=""):
    """Per-example gradients equal the loop's, or none of the readings that need them has a number."""
    found = shares_or_reason(model, batch, loss)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, by_loop(model, batch, loss), rtol=1e-9, atol=1e-12)
        return True
    assert match in found
    with pytest.raises(gradmon.Unavailable):
        gradmon.per_example_gram(model, loss, batch)
    readings = measured(model, batch, loss)
    for name in EXAMPLES:
        assert math.isnan(readings[name].value), name
        assert readings[name].reason == found
    assert readings["weight_condition"].value > 0
    return False


# --- a gradient of zero --------------------------------------------------------------------------------------------


def test_dead_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
        model[2].bias.zero_()
    x, _ = pairs()
    found = measured(model, (x, torch.zeros(4, 2).double()))
    stand = {"loss": 0.0, "grad_norm": 0.0, "update_ratio": 0.0}
    for name, reading in found.items():
        if name in stand:
            assert reading.value == stand[name]
        elif name == "param_norm":
            assert reading.value > 100
        else:
            assert math.isnan(reading.value), name
    others = {name: r.reason for name, r in found.items() if math.isnan(r.value)}
    for name in (*EXAMPLES, "weight_condition", "weight_cosine", "step_ratio", "step_condition", "input_condition"):
        assert others[name] == "zero gradient", name


def test_examples_that_cancel():
    model = nn.Linear(2, 1, bias=False).double()
    batch = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 0.0], [-3.0, 0.0]]).double()
    found = measured(model, batch, lambda model, x: model(x).mean(), micro_batches=4)
    for name in ("weight_condition", "weight_cosine", "weight_coherence", "sharpness", "step_ratio", "step_condition"):
        assert math.isnan(found[name].value), name
        assert found[name].reason == "zero gradient"
    assert found["gradient_diversity"].reason == "zero gradient"
    assert found["gradient_confusion"].value == pytest.approx(1)
    assert found["gradient_coherence"].value == 0
    assert found["gradient_rank"].value > 0
    assert found["gradient_snr"].value == 0
    assert found["noise_scale"].value == math.inf
    assert found["noise_scale"].reason == "no signal above the noise"


# --- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_input_that_is_not_finite(bad):
    x, t = pairs()
    x[1, 2] = bad
    model = mlp()
    assert set(reasons(measured(model, (x, t), layers=True)).values()) == {"non-finite gradient"}


def test_loss_that_is_infinite_with_a_finite_gradient():
    found = measured(mlp(), pairs(), lambda model, batch: mse(model, batch) + math.inf)
    assert set(reasons(found).values()) == {"non-finite gradient"}


def test_gradient_that_is_not_finite_with_a_finite_loss():
    def loss(model, batch):
        return mse(model, batch) + (model[0].bias - model[0].bias.detach()).abs().sum().sqrt()

    model = mlp()
    assert math.isfinite(float(loss(model, pairs()).detach()))
    found = measured(model, pairs(), loss)
    assert set(reasons(found).values()) == {"non-finite gradient"}


@pytest.mark.parametrize(
    ("metrics", "options"),
    [
        ("weight_condition", {"weights": weight_samplers.Fixed(torch.full((1, 26), 1e200, dtype=torch.float64))}),
        ("step_ratio", {"optimizer_lr": 1e200}),
    ],
)
def test_a_move_to_where_nothing_is_finite(metrics, options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)).double()
    if "optimizer_lr" in options:
        options = {"optimizer": torch.optim.SGD(model.parameters(), lr=options["optimizer_lr"])}
    (found,) = measured(model, pairs(), metrics=metrics, **options).values()
    assert math.isnan(found.value)
    assert "non-finite gradient" in found.reason


# --- the number of examples ----------------------------------------------------------------------------------------


def test_batch_of_one():
    model, batch = mlp(), pairs(1)
    found = reasons(measured(model, batch, next_batch=pairs(1)))
    several = {*EXAMPLES, "input_gradient_rank"}
    assert {name for name, reason in found.items() if reason is not None} == several
    assert {found[name] for name in several} == {"batch of one"}
    h = gradmon.batch_gradient(model, mse, batch)
    torch.testing.assert_close(gradmon.per_example_gradients(model, mse, batch), h[None])
    torch.testing.assert_close(gradmon.per_example_gram(model, mse, batch), (h @ h).reshape(1, 1))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 100])
def test_micro_batches_that_do_not_fit(n):
    model, batch = mlp(), pairs(7)
    H = by_loop(model, batch).numpy()
    found = measured(model, batch, metrics=["gradient_confusion", "gradient_diversity"], micro_batches=n)
    assert found["gradient_confusion"].value == pytest.approx(references.gradient_confusion(H, n), rel=1e-9)
    assert found["gradient_diversity"].value == pytest.approx(references.gradient_diversity(H, n), rel=1e-9)


# --- parameters ----------------------------------------------------------------------------------------------------


def test_unused_parameter_is_zero_and_takes_part_in_the_mask():
    model = net(lambda m, x: m.used(x), lost=nn.Linear(5, 2), used=nn.Linear(3, 2)).double()
    batch = pairs()
    rows = gradmon.per_example_gradients(model, mse, batch)
    assert rows.shape == (4, 20)
    assert not rows[:, :12].any()
    torch.testing.assert_close(rows, by_loop(model, batch))
    mask = gradmon.Mask(0.5)
    assert mask.sample(model).shape == (5 + 1 + 3 + 1,)
    assert gradmon.batch_gradient(model, mse, batch, mask=mask).shape == (10,)
    assert measured(model, batch, layers=True)["grad_norm/lost"].value == 0


def test_tied_parameter_is_one_parameter_whose_uses_are_summed():
    model = net(lambda m, x: F.linear(torch.tanh(m.one(x)), m.one.weight.T @ m.two.weight), one=nn.Linear(3, 3))
    model.two = nn.Linear(3, 3, bias=False)
    model.two.weight = model.one.weight
    model.double()
    x = torch.randn(4, 3).double()
    batch = (x, torch.randn(4, 3).double())
    assert len(list(model.parameters())) == 2
    assert right_or_unavailable(model, batch)
    assert gradmon.batch_gradient(model, mse, batch).shape == (12,)


def test_frozen_parameters_are_not_part_of_the_weights():
    model = mlp()
    model[0].requires_grad_(False)
    batch = pairs()
    assert gradmon.batch_gradient(model, mse, batch).shape == (10,)
    found = measured(model, batch, layers=True)
    assert {reading.layer for reading in found.values()} == {None, "2"}
    own = math.sqrt(sum(float(p.detach().square().sum()) for p in model[2].parameters()))
    assert found["param_norm"].value == pytest.approx(own)
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None


# --- inputs --------------------------------------------------------------------------------------------------------

INPUTS = ["input_condition", "input_gradient_rank"]


def test_integer_inputs_enter_at_the_embedding():
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    batch = (torch.randint(9, (4, 2)), torch.randn(4, 2).double())
    found = measured(model, batch, metrics=INPUTS)
    named = measured(model, batch, metrics=INPUTS, input_module="0")
    assert found == named
    assert found == measured(model, batch, metrics=INPUTS, input_module=model[0])
    assert all(reading.value > 0 for reading in found.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script
def test_inputs_of_calls_that_are_not_seen():
    model = torch.jit.script(nn.Linear(3, 2))
    found = measured(model, (torch.randn(4, 3), torch.randn(4, 2)), metrics=INPUTS)
    for name, reason in reasons(found).items():
        assert reason.startswith("no call is seen that uses a floating-point tensor of the batch, and no embedding"), (
            name
        )


def test_integers_without_an_embedding_are_no_inputs():
    model = net(lambda m, i: m.head(F.one_hot(i, 5).to(m.head.weight)), head=nn.Linear(5, 3)).double()
    batch = (torch.tensor([0, 1, 4, 3]), torch.tensor([0, 1, 2, 0]))
    found = measured(model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    for name, reason in reasons({name: found[name] for name in INPUTS}).items():
        assert reason == "the batch holds no floating-point input, and no embedding consumes its integers", name
    assert found["gradient_rank"].value > 0


# --- models whose examples cannot be told apart, or only with care -------------------------------------------------


def test_learnable_loss_weight():
    model = net(lambda m, x: m.body(x), body=nn.Linear(3, 2), worth=nn.Parameter(torch.tensor(0.3))).double()

    def loss(model, batch):
        return torch.exp(-model.worth) * mse(model, batch) + model.worth

    assert not right_or_unavailable(model, pairs(), loss, match="`mul` uses a parameter where the examples are no")


def test_learnable_loss_weight_in_a_batch_of_one():
    model = mlp()
    model.s = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    found = measured(model, pairs(1), lambda model, batch: mse(model, batch) * model.s.exp())
    assert {found[name].reason for name in EXAMPLES} == {"batch of one"}
    assert math.isfinite(found["input_condition"].value)


def test_call_on_no_rows_in_a_batch_of_one():
    def forward(m, x):
        return torch.cat([m.even(x[::2]), m.odd(x[1::2])])

    model = net(forward, even=nn.Linear(3, 2), odd=nn.Linear(3, 2)).double()
    found = measured(model, pairs(1))
    assert {found[name].reason for name in EXAMPLES} == {"batch of one"}
    assert math.isfinite(found["input_condition"].value)


@pytest.mark.parametrize("limit", [-9.0, 0.0, 9.0])
def test_expert_that_sees_some_of_the_examples(limit):
    def forward(m, x):
        chosen = x[:, 0] < limit
        found = torch.zeros(len(x), 2).double()
        found[chosen] = m.expert(x[chosen])
        return found + m.shared(x)

    model = net(forward, expert=nn.Linear(3, 2), shared=nn.Linear(3, 2)).double()
    right_or_unavailable(model, pairs(6), match="the number of rows of `linear` depends on what the batch holds")


def test_learnable_loss_weight_by_way_of_a_stack():
    model = net(lambda m, x: m.body(x), body=nn.Linear(3, 2), worth=nn.Parameter(torch.tensor(0.3))).double()
    right_or_unavailable(model, pairs(), lambda m, batch: torch.stack([mse(m, batch), m.worth]).prod())


class Product(torch.autograd.Function):
    """A linear layer that no hook and no function mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_parameter_inside_a_custom_function():
    model = net(lambda m, x: m.head(torch.tanh(Product.apply(x, m.weight))), weight=normal(4, 3), head=nn.Linear(4, 2))
    assert not right_or_unavailable(model.double(), pairs(), match="`weight`")


def test_custom_function_whose_gradients_cancel():
    model = net(lambda m, x: Product.apply(x, m.weight) + m.shift, weight=nn.Parameter(torch.ones(1, 1))).double()
    model.shift = nn.Parameter(torch.ones(1).double())
    batch = (torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[1.0], [-1.0]]).double())
    right_or_unavailable(model, batch)


@pytest.mark.parametrize("lengths", [[4, 2, 3, 1], [3, 3, 3, 3], [1, 2, 3, 2], [2, 2, 3, 1], [2, 4, 1, 1]])
def test_packed_sequences(lengths):
    def forward(m, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, last = m.rnn(packed)
        return m.head(last[-1]) + m.head(nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True)[0].sum(1))

    def loss(model, batch):
        return (model(*batch[:2]) - batch[2]).square().sum(-1).mean()

    model = net(forward, rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2)).double()
    batch = (torch.randn(4, 4, 3).double(), torch.tensor(lengths), torch.randn(4, 2).double())
    right_or_unavailable(model, batch, loss)


REORDERINGS = {
    "sort": lambda x: x[:, 0].argsort(),
    "flip": lambda x: torch.arange(len(x)).flip(0),
    "roll": lambda x: torch.arange(len(x)).roll(1),
    "swap": lambda x: torch.arange(len(x)).roll(len(x) // 2),
}


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", REORDERINGS)
def test_model_that_reorders_its_examples(kind, size):
    def forward(m, x):
        order = REORDERINGS[kind](x)
        return m.head(torch.tanh(m.body(x))[order])[order.argsort()]

    right_or_unavailable(net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2)).double(), pairs(size))


@pytest.mark.parametrize("make", ["script", "trace"])
def test_compiled_by_torchscript(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(mlp()) if make == "script" else torch.jit.trace(mlp(), pairs()[0])
    batch = pairs()
    h = gradmon.batch_gradient(model, mse, batch)
    np.testing.assert_allclose(h, by_loop(model, batch).mean(0), rtol=1e-9)
    right_or_unavailable(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_that_cancel_have_no_direction(dtype):
    # The loss is linear in w, so that h_i = x_i; the first two examples cancel but for the last digit.
    x = 1 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = -x[0] * (1 + torch.finfo(dtype).eps)
    model = nn.Linear(5, 1, bias=False).to(dtype)
    found = gradmon.measure(
        model, lambda m, batch: m(batch).mean(), x, metrics=["gradient_confusion"], micro_batches=3
    )["gradient_confusion"]
    assert found.reason is None
    assert found.value == 0
