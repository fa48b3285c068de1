"""A whole step of the average gradient, against the definition written down layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.average_gradient import FUNCTIONS, AverageGradient, secant
from gradmon_integrations.workloads.average_gradient.slopes import name_of
from tests.integrations.workloads.average_models import batch, chain, closure_of
from tests.integrations.workloads.average_references import BY_HAND, Network

WIDTHS = [5, 7, 7, 7, 3]
LR = 0.05

FORMS: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
    "tanh": [
        ("module", nn.Tanh()),
        ("torch", torch.tanh),
        ("method", lambda x: x.tanh()),
        ("F", F.tanh),
        ("in place", torch.tanh_),
        ("method in place", lambda x: x.tanh_()),
        ("named", lambda x: torch.tanh(input=x)),
        ("aten", torch.ops.aten.tanh),
    ],
    "sigmoid": [
        ("module", nn.Sigmoid()),
        ("torch", torch.sigmoid),
        ("method", lambda x: x.sigmoid()),
        ("in place", lambda x: x.sigmoid_()),
        ("F", F.sigmoid),
        ("special", torch.special.expit),
    ],
    "elu": [
        ("module", nn.ELU(1.3)),
        ("module in place", nn.ELU(1.3, inplace=True)),
        ("F", lambda x: F.elu(x, 1.3)),
        ("F_", lambda x: F.elu_(x, 1.3)),
    ],
    "selu": [("module", nn.SELU()), ("module in place", nn.SELU(inplace=True)), ("torch", torch.selu), ("F_", F.selu_)],
    "celu": [("module", nn.CELU(0.5)), ("torch", lambda x: torch.celu(x, 0.5)), ("F_", lambda x: F.celu_(x, 0.5))],
    "gelu": [("module", nn.GELU()), ("F", F.gelu)],
    "gelu-tanh": [("module", nn.GELU("tanh")), ("F", lambda x: F.gelu(x, approximate="tanh"))],
    "silu": [("module", nn.SiLU()), ("module in place", nn.SiLU(inplace=True)), ("F", F.silu)],
    "softplus": [("module", nn.Softplus(2, threshold=300)), ("F", lambda x: F.softplus(x, 2, 300))],
    "mish": [("module", nn.Mish()), ("module in place", nn.Mish(inplace=True)), ("F", F.mish)],
    "hardswish": [("module", nn.Hardswish()), ("module in place", nn.Hardswish(inplace=True)), ("F", F.hardswish)],
    "softsign": [("module", nn.Softsign()), ("F", F.softsign)],
    "logsigmoid": [("module", nn.LogSigmoid()), ("F", F.logsigmoid)],
    "tanhshrink": [("module", nn.Tanhshrink()), ("F", F.tanhshrink)],
    "sin": [("torch", torch.sin), ("method", lambda x: x.sin()), ("in place", lambda x: x.sin_())],
    "cos": [("torch", torch.cos)],
    "atan": [("torch", torch.atan), ("other name", torch.arctan)],
    "asinh": [("torch", torch.asinh), ("other name", torch.arcsinh)],
    "erf": [("torch", torch.erf), ("special", torch.special.erf), ("in place", lambda x: x.erf_())],
}
CASES = [pytest.param(name, f, id=f"{name}, {form}") for name, forms in FORMS.items() for form, f in forms]


def network(model: Any, name: str, data: tuple[Tensor, Tensor]) -> Network:
    weights = [layer.weight.detach() for layer in model.layers]
    biases = [layer.bias.detach() for layer in model.layers]
    return Network(weights, biases, BY_HAND[name], *data)


def flat(model: Any) -> list[Tensor]:
    return [layer.weight.detach() for layer in model.layers] + [layer.bias.detach() for layer in model.layers]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= tolerance


def sgd_lengths(reference: Network) -> list[list[Tensor]]:
    return [[LR * part.abs() for part in kind] for kind in reference.gradient()]


def test_every_function_of_the_table_has_a_hand_written_one() -> None:
    assert {name_of(function).replace("_", "") for function in FUNCTIONS} == {
        name.partition("-")[0] for name in BY_HAND
    }
    assert FORMS.keys() == BY_HAND.keys()


@pytest.mark.parametrize(("name", "function"), CASES)
@pytest.mark.parametrize("iterations", [2, 3])
def test_a_step_is_that_of_the_definition(name: str, function: Any, iterations: int) -> None:
    model, data = chain(function, WIDTHS), batch(11, 5, 3)
    reference = network(model, name, data)
    expected = reference.step(sgd_lengths(reference), iterations)
    plain = reference.step(sgd_lengths(reference), 1)
    optimizer = AverageGradient(torch.optim.SGD(model.parameters(), lr=LR), iterations=iterations)
    loss = optimizer.step(closure_of(model, data))
    assert_close(flat(model), expected)
    assert float(loss) == pytest.approx(reference.loss(*reference.start), rel=1e-12)
    for layer, weights, biases in zip(model.layers, *reference.gradient(), strict=True):
        assert_close([layer.weight.grad, layer.bias.grad], [weights, biases])
    # Otherwise the test could not tell the average gradient from the gradient; how far is the function's own matter.
    if name in ("tanh", "elu", "selu", "silu", "gelu", "softsign", "sin", "mish"):
        assert sum(int((a != b).sum()) for a, b in zip(expected, plain, strict=True)) > 0


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("midpoint", [False, True])
def test_many_steps_with_rmsprop_on_a_deep_network(iterations: int, midpoint: bool) -> None:
    model, data = chain(torch.tanh, [5, *[7] * 9, 3]), batch(11, 5, 3)
    linear = "midpoint" if midpoint else "plain"
    base = torch.optim.RMSprop(model.parameters(), lr=0.02)
    optimizer = AverageGradient(base, iterations=iterations, linear=linear)
    squares = [[torch.zeros_like(p) for p in kind] for kind in network(model, "tanh", data).start]
    flips = 0
    for _ in range(4):
        reference = network(model, "tanh", data)
        gradients = reference.gradient()
        squares = [
            [0.99 * v + 0.01 * g * g for v, g in zip(*kind, strict=True)]
            for kind in zip(squares, gradients, strict=True)
        ]
        lengths = [
            [0.02 * g.abs() / (v.sqrt() + 1e-8) for v, g in zip(*kind, strict=True)]
            for kind in zip(squares, gradients, strict=True)
        ]
        expected = reference.step(lengths, iterations, midpoint=midpoint)
        before = [*reference.start[0], *reference.start[1]]
        optimizer.step(closure_of(model, data))
        assert_close(flat(model), expected)
        flips += sum(
            int(((new - old) * g > 0).sum())
            for new, old, g in zip(expected, before, [*gradients[0], *gradients[1]], strict=True)
        )
    assert (flips > 0) == (iterations > 1)


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_one_tanh_unit_has_the_analytic_average_derivative(bound: float) -> None:
    """``(1/d) int f'(x + s) ds`` over the step is ``(ln cosh)''`` averaged, that is ``(tanh(x + d) - tanh(x)) / d``."""
    weight = nn.Parameter(torch.tensor([bound], dtype=torch.float64))
    base = torch.optim.SGD([weight], lr=1.0)
    optimizer = AverageGradient(base)
    seen: list[float] = []
    original = torch.autograd.grad

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        seen.append(float(found[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", spy)
        optimizer.step(lambda: torch.tanh(weight).sum())
    start, end = bound, bound - 1 / math.cosh(bound) ** 2
    # By Simpson's rule over 2,000 parts: an integral, not a difference of two values of tanh.
    points = torch.linspace(start, end, 2001, dtype=torch.float64)
    factors = torch.full((2001,), 2.0, dtype=torch.float64)
    factors[1::2], factors[0], factors[-1] = 4.0, 1.0, 1.0
    assert seen == [pytest.approx(float((factors / torch.cosh(points) ** 2).sum()) / 6000, abs=1e-12)]


def test_where_the_input_hardly_moves_the_derivative_stands_for_itself() -> None:
    """At a step of 1e-9 the secant of float64 would have lost 7 of its 16 digits."""
    data = batch(11, 5, 3)
    found = []
    for lr in (1e-9, LR):
        model = chain(torch.tanh, WIDTHS)
        reference = network(model, "tanh", data)
        lengths = [[lr * part.abs() for part in kind] for kind in reference.gradient()]
        expected = reference.step(lengths, 2)
        AverageGradient(torch.optim.SGD(model.parameters(), lr=lr)).step(closure_of(model, data))
        assert_close(flat(model), expected, 1e-15)
        plain = reference.step(lengths, 1)
        found.append(all(torch.equal(a, b) for a, b in zip(expected, plain, strict=True)))
    assert found == [True, False]


def test_a_slope_of_the_callers_own_and_one_for_a_kinked_function() -> None:
    pair = (lambda x: x.clamp(min=0), lambda x: (x > 0).double())
    data = batch(11, 5, 3)
    for slope in (secant, lambda x, y, x_after, y_after: (y_after - y) / (x_after - x)):
        model = chain(nn.ReLU(), WIDTHS)
        weights = [layer.weight.detach() for layer in model.layers]
        reference = Network(weights, [layer.bias.detach() for layer in model.layers], pair, *data)
        expected = reference.step(sgd_lengths(reference), 3)
        functions = {**FUNCTIONS, F.relu: slope}
        base = torch.optim.SGD(model.parameters(), lr=LR)
        AverageGradient(base, iterations=3, functions=functions).step(closure_of(model, data))
        assert_close(flat(model), expected)


def test_relu_keeps_its_derivative_unless_asked() -> None:
    data = batch(11, 5, 3)
    models = [chain(nn.ReLU(), WIDTHS), chain(nn.ReLU(), WIDTHS)]
    AverageGradient(torch.optim.SGD(models[0].parameters(), lr=LR)).step(closure_of(models[0], data))
    base = torch.optim.SGD(models[1].parameters(), lr=LR)
    closure_of(models[1], data)().backward()
    base.step()
    assert all(torch.equal(a, b) for a, b in zip(flat(models[0]), flat(models[1]), strict=True))
