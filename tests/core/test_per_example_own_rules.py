"""Rules of the caller's."""

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Monitor, every
from gradmon.per_example import RULES, Experience, Listener
from gradmon.per_example.forms import Outer
from tests import references
from tests.core.rules import CALLS, SIZE, by_hooks, call, close, image, problem_of, random, summed, truth
from tests.zoo.problem import averaged_problem, net, normal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Product(torch.autograd.Function):
    """A matrix product whose gradients are written by hand: no function that is known is called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.einsum("...i,oi->...o", x, weight) + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad @ weight, flat.T @ x.flatten(0, -2), flat.sum(0)


class MyLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = normal(outputs, inputs), normal(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.bias)


def my_rule(part):
    """The layer's gradients, by matrix products."""
    (x,) = part.use.args
    flow, rows = part.flow.flatten(1, -2), part.rows(x).flatten(1, -2)
    found = [Outer(flow, rows, part.scratch), flow.sum(1)]
    return found[: len(part.parameters)]


def my_rule_in_plain_tensors(part):
    flow, rows = part.flow.flatten(1, -2), part.rows(part.use.args[0]).flatten(1, -2)
    return [torch.einsum("nto,nti->noi", flow, rows), flow.sum(1)][: len(part.parameters)]


def with_layers(function, *sizes, freeze=False):
    """A problem in float64 with two layers of one's own."""
    torch.manual_seed(5)
    model = net(function, first=MyLayer(3, 4), second=MyLayer(4, 4), head=nn.Linear(4, 2)).double()
    if freeze:
        model.first.bias.requires_grad_(False)
    x = torch.randn(SIZE, *sizes, 3).double()
    width = model(x).flatten(1).shape[1]
    return averaged_problem(model, summed, (x, torch.randn(SIZE, width).double()))


OWN = {
    "one after the other": lambda: with_layers(lambda m, x: m.head(m.second(m.first(x).tanh()).tanh())),
    "over time": lambda: with_layers(lambda m, x: m.head(m.second(m.first(x).tanh()).tanh()), 5),
    "twice": lambda: with_layers(lambda m, x: m.head(m.second(m.second(m.first(x).tanh()).tanh()).tanh())),
    "without a bias": lambda: with_layers(lambda m, x: m.head(m.second(m.first(x).tanh()).tanh()), freeze=True),
}


@pytest.mark.parametrize("rule", [my_rule, my_rule_in_plain_tensors])
@pytest.mark.parametrize("which", OWN)
def test_rule_for_a_module_that_cannot_be_looked_into(which, rule):
    problem = OWN[which]()
    H = references.shares(problem)
    arguments = (problem.model, problem.loss, problem.batch)
    with pytest.raises(gradmon.Unavailable, match=r"."):
        gradmon.per_example_gram(*arguments)
    with pytest.raises(gradmon.Unavailable, match=r"."):
        by_hooks(problem)
    rules = {**RULES, MyLayer: rule}
    close(gradmon.per_example_gram(*arguments, rules=rules), references.gram(H))
    close(gradmon.per_example_gradients(*arguments, rules=rules), H)
    found, coverage = by_hooks(problem, rules)
    assert {coverage[name] for name in coverage if "head" not in name} == {"MyLayer"}
    assert coverage["head.weight"] == "linear"
    close(found.gram, references.gram(H))
    close(found.variances, H.var(0, ddof=1))


@pytest.mark.parametrize("passive", [False, True])
def test_rules_of_a_monitor(passive):
    problem = OWN["over time"]()
    model = problem.model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"metrics": ["noise_scale", "gradient_snr"], "schedule": every(1), "mask": None}
    loss = None if passive else problem.loss
    monitor = Monitor(model, optimizer, loss, rules={**RULES, MyLayer: my_rule}, **options)
    without = Monitor(model, optimizer, loss, **options)
    for _ in range(2):
        H = references.shares(problem)
        optimizer.zero_grad()
        problem.loss(model, problem.batch).backward()
        optimizer.step()
        for watching in (monitor, without):
            watching.step(problem.batch)
            assert not watching.failures
        assert monitor.readings["noise_scale"].value == pytest.approx(references.noise_scale(H), rel=1e-8)
        assert monitor.readings["gradient_snr"].value == pytest.approx(references.gradient_snr(H), rel=1e-8)
        assert monitor.coverage["first.weight"] == "MyLayer"
        assert all(math.isnan(without.readings[name].value) for name in options["metrics"])
        assert all(without.readings[name].reason for name in options["metrics"])
        for parameter in model.parameters():
            parameter.grad = None


def test_rules_of_measure():
    problem = OWN["over time"]()
    H = references.shares(problem)
    rules = {**RULES, MyLayer: my_rule}
    found = gradmon.measure(problem.model, problem.loss, problem.batch, metrics="noise_scale", rules=rules)
    assert found["noise_scale"].value == pytest.approx(references.noise_scale(H), rel=1e-9)


def bilinear(change=lambda found: found):
    """A model with a function for which there is no rule, and a rule for it that counts how often it is asked."""
    problem, _ = problem_of(bilinear_call)
    asked = []

    def rule(part):
        asked.append(1)
        left, right, weight, bias = part.use.args
        assert part.parameters == [weight, bias]
        x, y = part.rows(left)[:, 0], part.rows(right)[:, 0]
        flow = part.flow[:, 0]
        return change([torch.einsum("no,ni,nj->noij", flow, x, y), flow])

    return problem, {**RULES, F.bilinear: rule}, asked


def bilinear_call():
    return call(lambda m, x, y: F.bilinear(x, y, m.w, m.b), image(3), image(2), w=normal(4, 3, 2), b=normal(4))


def test_rule_for_a_function():
    problem, rules, asked = bilinear()
    H = truth(bilinear_call)
    _, coverage = by_hooks(problem)
    assert set(coverage.values()) == {"replay"}
    found, coverage = by_hooks(problem, rules)
    assert set(coverage.values()) == {"bilinear"}
    close(found.gram, references.gram(H))
    close(gradmon.per_example_gradients(problem.model, problem.loss, problem.batch, rules=rules), H)
    assert len(asked) >= 2


def test_rule_in_the_place_of_a_built_in_one():
    asked = []

    def rule(part):
        asked.append(part.use.name)
        return RULES[F.linear](part)

    build = CALLS[F.linear][1]
    problem, _ = problem_of(build)
    found, coverage = by_hooks(problem, {F.linear: rule})
    assert asked == ["linear"]
    assert set(coverage.values()) == {"linear"}
    close(found.gram, references.gram(truth(build)))


def failing(error):
    def fail(found):
        raise error

    return fail


WRONG = {
    "twice as much": lambda found: [2 * found[0], found[1]],
    "a wrong bias": lambda found: [found[0], found[1] + 1e-3],
    "examples in another order": lambda found: [found[0].flip(0), found[1]],
    "nothing": lambda found: [None, None],
    "not a number": lambda found: [found[0] * math.nan, found[1]],
    "one example too many": lambda found: [torch.cat([found[0], found[0][:1]]), found[1]],
    "flat": lambda found: [found[0].flatten(1), found[1]],
    "summed": lambda found: [found[0].sum(0), found[1].sum(0)],
    "too few": lambda found: found[:1],
    "too many": lambda found: [*found, found[1]],
    "does not know": lambda found: None,
    "no list": lambda found: 3,
    "no tensors": lambda found: ["a", "b"],
    "RuntimeError": failing(RuntimeError("boom")),
    "ValueError": failing(ValueError("boom")),
    "KeyError": failing(KeyError("boom")),
    "AttributeError": failing(AttributeError("boom")),
    "NotImplementedError": failing(NotImplementedError("boom")),
    "AssertionError": failing(AssertionError),
    "ZeroDivisionError": failing(ZeroDivisionError("boom")),
    "Unavailable": failing(gradmon.Unavailable("boom")),
}


@pytest.mark.parametrize("which", WRONG)
def test_rule_that_is_wrong_is_found_out_and_replaced(which):
    problem, rules, asked = bilinear(WRONG[which])
    H = truth(bilinear_call)
    found, coverage = by_hooks(problem, rules)
    assert asked
    assert set(coverage.values()) <= {"replay", "repeat"}
    close(found.gram, references.gram(H))
    close(found.variances, H.var(0, ddof=1))
    close(gradmon.per_example_gradients(problem.model, problem.loss, problem.batch, rules=rules), H)


@pytest.mark.parametrize("which", WRONG)
def test_wrong_rule_for_a_module_that_cannot_be_looked_into(which):
    problem = OWN["over time"]()
    H = references.shares(problem)
    found, coverage = by_hooks(problem, {**RULES, MyLayer: lambda part: WRONG[which](my_rule_in_plain_tensors(part))})
    assert coverage["first.weight"] in ("replay", "repeat")
    close(found.gram, references.gram(H))
    close(found.means, H.mean(0))


class Picking(MyLayer):
    """Picks its rows itself."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x[mask])


def my_rule_for_picked_rows(part):
    x, mask = part.use.args
    flow = x.new_zeros(*mask.shape, part.arrived[0].shape[1])
    flow[mask] = part.arrived[0]
    return [torch.einsum("nto,nti->noi", flow, x), flow.sum(1)]


def with_frozen_layer():
    model = net(lambda m, x, mask: m.head(m.last(x[mask]).tanh()), last=MyLayer(3, 4), head=nn.Linear(4, 2))
    model.last.requires_grad_(False)
    return model


RAGGED = {
    "by a mask": lambda: net(lambda m, x, mask: m.last(x[mask]).tanh(), last=MyLayer(3, 4)),
    "by places": lambda: net(lambda m, x, mask: m.last(x[mask.nonzero(as_tuple=True)]).tanh(), last=MyLayer(3, 4)),
    "after a layer": lambda: net(lambda m, x, mask: m.last(m.body(x).tanh()[mask]), body=MyLayer(3, 4),
                                 last=MyLayer(4, 2)),
    "before a layer": lambda: net(lambda m, x, mask: m.head(m.last(x[mask]).tanh()), last=MyLayer(3, 4),
                                  head=nn.Linear(4, 2)),
    "before a layer, frozen": with_frozen_layer,
    "inside": lambda: net(lambda m, x, mask: m.last(x, mask).tanh(), last=Picking(3, 4)),
    "inside, before a layer": lambda: net(lambda m, x, mask: m.head(m.last(x, mask).tanh()), last=Picking(3, 4),
                                          head=nn.Linear(4, 2)),
}  # fmt: skip


def per_example(model, batch):
    return model(*batch).square().sum() / len(batch[0])


@pytest.mark.parametrize("which", RAGGED)
def test_rule_for_a_module_that_is_called_on_rows_picked_by_a_mask(which):
    """At last 24 rows of six examples, which are not four of each."""
    rules = {**RULES, MyLayer: my_rule_in_plain_tensors, Picking: my_rule_for_picked_rows}
    model, x = RAGGED[which]().double(), random(6, 5, 3)
    for lengths in ([5] * 6, [4] * 6, [5, 5, 5, 4, 3, 2]):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        problem = averaged_problem(model, per_example, (x, mask))
        G = references.gram(references.shares(problem))
        with contextlib.suppress(gradmon.Unavailable):
            close(by_hooks(problem, rules, moments=False)[0].gram, G)
        with contextlib.suppress(gradmon.Unavailable):
            close(gradmon.per_example_gram(problem.model, problem.loss, problem.batch, rules=rules), G)


@pytest.mark.parametrize("which", ["twice as much", "not a number", "RuntimeError", "flat", "does not know"])
def test_rule_that_goes_wrong_later_gives_no_wrong_number(which):
    build, number, readings = CALLS[F.linear][1], 0, 0

    def rule(part):
        product, bias = RULES[F.linear](part)
        found = [product.block(slice(0, SIZE), slice(0, 2)).reshape(SIZE, 2, 3).clone(), bias]
        return WRONG[which](found) if number > 1 else found

    problem, _ = problem_of(build)
    model, H = copy.deepcopy(problem.model), truth(build)
    listener = Listener(model, moments=True, experience=Experience(rules={F.linear: rule}))
    for number in range(5):
        model.zero_grad()
        listener.arm()
        problem.loss(model, problem.batch).backward()
        try:
            found = listener.collect(problem.batch)
        except gradmon.Unavailable as missing:
            found, reason = None, missing.reason
        listener.disarm()
        if found is None:
            assert number > 1
            assert "add up" in reason or "not finite" in reason or "non-finite" in reason
        else:
            readings += 1
            close(found.gram, references.gram(H))
            close(found.variances, H.var(0, ddof=1))
    assert readings >= 2
