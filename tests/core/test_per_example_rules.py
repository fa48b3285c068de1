"""Per-example rules and forms: each of them by itself, against gradients that were made one example after the other."""

import contextlib
import copy
import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Monitor, every
from gradmon.per_example import RULES, Experience, Listener, ways
from gradmon.per_example.convolution import Convolution, Windows
from gradmon.per_example.forms import Dense, Lazy, Outer, Relocated, chunks, one, taken, total
from gradmon.per_example.lookup import Lookup
from gradmon.per_example.products import Moments, coordinates, inner_products, moments
from gradmon.per_example.scratch import Scratch
from tests import references, zoo
from tests.zoo import Net, net, normal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SIZE = 4
TIGHT = 1e-11


def close(found, expected, tolerance=TIGHT):
    """Equal up to rounding, relative to the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-300))


# --- every rule ----------------------------------------------------------------------------------------------------


def summed(model, batch):
    """A loss in which every number of the output counts, each by another weight, so that no gradient is the same."""
    return (model(*batch[:-1]).flatten(1).sin() * batch[-1]).sum(1).mean()


class Call(NamedTuple):
    """A model that calls one function with its parameters `own`, and the inputs of a batch."""

    model: Net
    inputs: tuple[Tensor, ...]
    own: tuple[str, ...]


def call(function, *inputs, **parameters):
    return Call(net(function, **parameters), inputs, tuple(parameters))


def image(*sizes):
    return torch.randn(SIZE, *sizes)


def tokens(*sizes):
    return torch.randint(5, (SIZE, *sizes))


def convolved(function, dims, **options):
    def build():
        groups = options.get("groups", 1)
        weight = normal(4, 2 * (2 if groups == 1 else 1), *[3, 2, 1][:dims])
        if function.__name__.startswith("conv_transpose"):
            weight = normal(4, 3, *[3, 2, 1][:dims])
        bias = normal(3 * groups if function.__name__.startswith("conv_transpose") else 4)
        return call(
            lambda m, x: function(x, m.weight, m.bias, **options), image(4, *[6, 5, 2][:dims]), weight=weight, bias=bias
        )

    return build


CONVOLUTIONS = [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"stride": 3, "groups": 2, "padding": 1}]


def convolutions(function, dims):
    return [convolved(function, dims, **options) for options in CONVOLUTIONS]


def normed(function, *sizes, channels=None, **options):
    shape = sizes[:1] if channels is None else channels
    return lambda: call(
        lambda m, x: function(x, weight=m.weight, bias=m.bias, **options),
        3 * image(*sizes) + 1,
        weight=normal(*shape),
        bias=normal(*shape),
    )


def by_statistics(function, *, training):
    """Running statistics, which are of no example."""

    def build():
        made = call(
            lambda m, x: function(x, m.mean, m.variance, m.weight, m.bias, training),
            3 * image(3, 4) + 1,
            weight=normal(3),
            bias=normal(3),
        )
        made.model.register_buffer("mean", torch.randn(3))
        made.model.register_buffer("variance", torch.rand(3) + 0.5)
        return made

    return build


def entrywise(function, *shape, size=(3, 2)):
    return lambda: call(lambda m, x: function(x, m.own), image(*size), own=normal(*shape))


def in_place(name):
    return lambda x, p: getattr(x.clone(), name)(p)


def left_and_right(function):
    """A matrix on either side; vectors of the batch are its rows or its columns."""
    return [
        lambda: call(lambda m, x: function(x, m.own), image(3), own=normal(3, 2)),
        lambda: call(lambda m, x: function(m.own, x.T).T, image(3), own=normal(2, 3)),
    ]


CALLS: dict[Any, list[Any]] = {
    F.linear: [
        lambda: call(lambda m, x: F.linear(x, m.w, m.b), image(3), w=normal(2, 3), b=normal(2)),
        lambda: call(lambda m, x: F.linear(x, m.w, m.b), image(5, 3), w=normal(2, 3), b=normal(2)),
        lambda: call(lambda m, x: F.linear(x, m.w, m.b), image(SIZE, 2, 3), w=normal(2, 3), b=normal(2)),
        lambda: call(lambda m, x: F.linear(x, m.w), image(12), w=normal(9, 12)),
        lambda: call(lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1), image(SIZE, 3),
                     w=normal(2, 3), b=normal(2)),
    ],
    torch.matmul: [
        *left_and_right(torch.matmul),
        lambda: call(lambda m, x: torch.matmul(x, m.own), image(5, 3), own=normal(3, 2)),
        lambda: call(lambda m, x: torch.matmul(x, m.own), image(5, 3), own=normal(3)),
        lambda: call(lambda m, x: torch.matmul(m.own, x), image(3, 5), own=normal(2, 3)),
    ],
    torch.mm: left_and_right(torch.mm),
    torch.bmm: [
        lambda: call(lambda m, x: torch.bmm(x.transpose(0, 1), m.own).transpose(0, 1), image(5, 3),
                     own=normal(5, 3, 2)),
        lambda: call(lambda m, x: torch.bmm(m.own, x.permute(1, 2, 0)).permute(2, 0, 1), image(5, 3),
                     own=normal(5, 2, 3)),
        lambda: call(lambda m, x: torch.bmm(x, m.own.expand(len(x), 3, 2)), image(5, 3), own=normal(3, 2)),
    ],
    Tensor.matmul: left_and_right(Tensor.matmul),
    Tensor.mm: left_and_right(Tensor.mm),
    torch.addmm: [
        lambda: call(lambda m, x: torch.addmm(m.b, x, m.w), image(3), w=normal(3, 2), b=normal(2)),
        lambda: call(lambda m, x: torch.addmm(x[:, :2], x, m.w), image(3), w=normal(3, 2)),
    ],
    Tensor.addmm: [lambda: call(lambda m, x: m.b.addmm(x, m.w), image(3), w=normal(3, 2), b=normal(2))],
    F.conv1d: convolutions(F.conv1d, 1),
    F.conv2d: [*convolutions(F.conv2d, 2),
               lambda: call(lambda m, x: F.conv2d(x, m.w, m.b), image(3, 4, 2), w=normal(2, 3, 1, 1), b=normal(2)),
               lambda: call(lambda m, x: F.conv2d(x, m.w, m.b, padding="same"), image(3, 4, 4), w=normal(2, 3, 2, 3),
                            b=normal(2)),
               lambda: call(lambda m, x: F.conv2d(x, m.w, padding="valid"), image(3, 4, 4), w=normal(2, 3, 2, 3))],
    F.conv3d: convolutions(F.conv3d, 3),
    F.conv_transpose1d: convolutions(F.conv_transpose1d, 1),
    F.conv_transpose2d: convolutions(F.conv_transpose2d, 2),
    F.conv_transpose3d: convolutions(F.conv_transpose3d, 3),
    F.embedding: [
        lambda: call(lambda m, t: F.embedding(t, m.own), tokens(6), own=normal(5, 3)),
        lambda: call(lambda m, t: F.embedding(t, m.own, padding_idx=2), tokens(2, 3), own=normal(5, 3)),
        lambda: call(lambda m, t: F.embedding(t, m.own, padding_idx=-1), tokens(2, 3), own=normal(5, 3)),
        lambda: call(lambda m, t: F.embedding(t, m.own), tokens(), own=normal(5, 3)),
    ],
    F.embedding_bag: [
        lambda: call(lambda m, t: F.embedding_bag(t, m.own), tokens(6), own=normal(5, 3)),
        lambda: call(lambda m, t: F.embedding_bag(t, m.own, mode="sum", padding_idx=1), tokens(6), own=normal(5, 3)),
        lambda: call(lambda m, t: F.embedding_bag(t, m.own, padding_idx=-2), tokens(6), own=normal(5, 3)),
        lambda: call(lambda m, t, a: F.embedding_bag(t, m.own, mode="sum", per_sample_weights=a), tokens(6), image(6),
                     own=normal(5, 3)),
    ],
    F.layer_norm: [normed(F.layer_norm, 3, normalized_shape=(3,)),
                   normed(F.layer_norm, 5, 3, channels=(3,), normalized_shape=(3,), eps=0.1),
                   normed(F.layer_norm, 2, 5, 3, channels=(5, 3), normalized_shape=(5, 3))],
    F.rms_norm: [lambda: call(lambda m, x: F.rms_norm(x, (3,), m.own), image(5, 3), own=normal(3)),
                 lambda: call(lambda m, x: F.rms_norm(x, (5, 3), m.own, 0.1), image(5, 3), own=normal(5, 3))],
    F.group_norm: [normed(F.group_norm, 4, num_groups=2), normed(F.group_norm, 4, 3, 2, num_groups=2, eps=0.1)],
    F.instance_norm: [normed(F.instance_norm, 3, 5, eps=0.1), by_statistics(F.instance_norm, training=False)],
    F.batch_norm: [by_statistics(F.batch_norm, training=False)],
    F.prelu: [entrywise(F.prelu, 1), entrywise(F.prelu, 3), entrywise(F.prelu, 3, size=(3,))],
    torch.add: [entrywise(lambda x, p: torch.add(x, p, alpha=3), 3, 1), entrywise(torch.add, 2)],
    Tensor.add: [entrywise(lambda x, p: x.add(p, alpha=-2), 3, 2), entrywise(lambda x, p: p.add(x, alpha=2), 1, 2)],
    Tensor.add_: [entrywise(in_place("add_"), 3, 2), entrywise(in_place("add_"), 1)],
    torch.sub: [entrywise(lambda x, p: torch.sub(x, p, alpha=3), 3, 1), entrywise(torch.sub, 2)],
    Tensor.sub: [entrywise(lambda x, p: x.sub(p, alpha=-2), 3, 2), entrywise(lambda x, p: p.sub(x, alpha=2), 1, 2)],
    Tensor.sub_: [entrywise(in_place("sub_"), 3, 2), entrywise(in_place("sub_"), 1)],
    torch.mul: [entrywise(torch.mul, 3, 1), entrywise(lambda x, p: torch.mul(p, x), 2)],
    Tensor.mul: [entrywise(Tensor.mul, 3, 2), entrywise(lambda x, p: p.mul(x), 3, 1)],
    Tensor.mul_: [entrywise(in_place("mul_"), 3, 2), entrywise(in_place("mul_"), 1)],
}  # fmt: skip
"""By function, models that call it in different ways."""
SLOW = {torch.bmm: ("replay", "repeat")}
"""Where one of the slow ways may stand in: a product with several matrices of parameters at once."""


def name_of(function):
    return f"{getattr(function, '__qualname__', function.__name__)}".replace("_VariableFunctionsClass", "torch")


KINDS = [(function, build) for function, builds in CALLS.items() for build in builds]
KIND_IDS = [f"{name_of(function)}-{number}" for function in CALLS for number in range(len(CALLS[function]))]


@functools.cache
def problem_of(build):
    """The problem, in float64; what all tests of it share is never changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = build()
        model = made.model.double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in made.inputs)
        width = model(*inputs).flatten(1).shape[1]
        batch = (*inputs, torch.randn(len(inputs[0]), width).double())
    return zoo.averaged_problem(model, summed, batch), made.own


@functools.cache
def truth(build):
    return references.shares(problem_of(build)[0])


def by_hooks(problem, rules=RULES, **options):
    """What a listener finds in the training's own pass, and by which ways."""
    model = copy.deepcopy(problem.model)
    listener = Listener(model, experience=Experience(rules=rules), **{"moments": True, **options})
    listener.arm()
    problem.loss(model, problem.batch).backward()
    found = listener.collect(problem.batch)
    listener.disarm()
    return found, listener.experience.coverage


def test_every_rule_is_tried():
    assert set(RULES) <= set(CALLS)


@pytest.mark.parametrize(("function", "build"), KINDS, ids=KIND_IDS)
def test_rule_is_right_and_used(function, build):
    problem, own = problem_of(build)
    H = truth(build)
    arguments = (problem.model, problem.loss, problem.batch)
    close(gradmon.per_example_gradients(*arguments), H)
    close(gradmon.per_example_gram(*arguments), references.gram(H))
    found, coverage = by_hooks(problem)
    assert {coverage[name] for name in own} <= {function.__name__.strip("_"), *SLOW.get(function, ())}
    close(found.gram, references.gram(H))
    close(found.means, H.mean(0))
    close(found.variances, H.var(0, ddof=1))


@pytest.mark.parametrize("way", ["replay", "repeat"])
@pytest.mark.parametrize(("function", "build"), KINDS, ids=KIND_IDS)
def test_without_rules_there_are_two_slow_ways(function, build, way, monkeypatch):
    if way == "repeat":
        monkeypatch.setattr(ways, "replay", lambda part: None)
    problem, own = problem_of(build)
    H = truth(build)
    found, coverage = by_hooks(problem, {})
    assert {coverage[name] for name in own} <= {way, "repeat"}
    close(found.gram, references.gram(H))
    close(found.variances, H.var(0, ddof=1))
    arguments = (problem.model, problem.loss, problem.batch)
    close(gradmon.per_example_gradients(*arguments, rules={}), H)
    close(gradmon.per_example_gram(*arguments, rules={}), references.gram(H))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_in_both_modes(training):
    case = zoo.batch_norm_mlp if training else zoo.batch_norm_eval
    problem = case.make(0, torch.float64)
    H = references.shares(problem)
    found, coverage = by_hooks(problem)
    norms = {name for name in coverage if problem.model.get_submodule(name.rpartition(".")[0]).__class__.__name__
             .startswith("BatchNorm")}  # fmt: skip
    assert norms
    assert {coverage[name] for name in norms} == {"batch_norm"}
    close(found.gram, references.gram(H))


# --- the forms of a gradient ---------------------------------------------------------------------------------------


def by_autograd(function, shape, left, right):
    """``d <left_i, function(w, right_i)> / dw`` for each example, summed over its planes, (n, numel)."""
    rows = []
    for own_left, own_right in zip(left, right, strict=True):
        w = torch.zeros(shape, dtype=left.dtype, requires_grad=True)
        (grad,) = torch.autograd.grad((own_left * function(w, own_right)).sum(), w)
        rows.append(grad.flatten())
    return torch.stack(rows)


def random(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


def dense(scratch, *shape, n=5):
    rows = random(n, *shape)
    return Dense(rows), rows.reshape(n, -1)


def outer(scratch, times, rows, columns, n=5, shape=None):
    left, right = random(n, times, rows), random(n, times, columns)
    return Outer(left, right, scratch, shape), torch.einsum("nti,ntj->nij", left, right).flatten(1)


def looked_up(scratch, size, length, width, n=5):
    ids, flow = torch.randint(size, (n, length)), random(n, length, width)
    rows = torch.zeros(n, size, width, dtype=torch.float64)
    for i, t in itertools.product(range(n), range(length)):
        rows[i, ids[i, t]] += flow[i, t]
    return Lookup(ids, flow, size, scratch), rows.flatten(1)


def lazy(scratch, *shape, n=5):
    rows = random(n, math.prod(shape))
    return Lazy(lambda examples: rows[examples].clone(), n, torch.Size(shape), scratch, [rows]), rows


def relocated(scratch, make, shape, *sizes, **options):
    """Another form, its numbers scattered over a larger tensor."""
    inner, rows = make(scratch, *sizes, **options)
    places = torch.randperm(math.prod(shape))[: rows.shape[1]]
    found = torch.zeros(len(rows), math.prod(shape), dtype=torch.float64)
    found[:, places] = rows
    return Relocated(inner, places, torch.Size(shape), scratch), found


def convolution(scratch, kernel, stride, before, dilation, groups, *, planes=1, n=5, channels=(4, 6)):
    dims = len(kernel)
    sizes = (7, 6, 5)[:dims]
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    shape = (channels[0], channels[1] // groups, *kernel)
    right = random(n, planes, channels[1], *sizes)

    def convolved(w, x):
        return function(x, w, None, stride, before, dilation, groups)

    positions = convolved(torch.zeros(shape, dtype=torch.float64), right[0]).shape[2:]
    left = random(n, planes, channels[0], *positions)
    form = Convolution(left, right, Windows(kernel, stride, before, dilation, groups), scratch)
    return form, by_autograd(convolved, shape, left, right)


FORMS = {
    "dense": (dense, 4, 3),
    "dense, a vector": (dense, 7),
    "dense, a number": (dense,),
    "outer, light": (outer, 1, 6, 7),
    "outer, light, small": (outer, 1, 2, 3),
    "outer": (outer, 3, 6, 7),
    "outer, many times": (outer, 40, 3, 5),
    "outer that ends in ones": (functools.partial(outer, shape=torch.Size((4, 5, 1, 1))), 2, 4, 5),
    "look-up": (looked_up, 6, 9, 3),
    "look-up of many": (looked_up, 100, 4, 3),
    "look-up of one": (looked_up, 1, 4, 3),
    "lazy": (lazy, 6, 2, 3),
    "lazy, a number": (lazy,),
    "relocated, dense": (relocated, dense, (5, 6), 4, 3),
    "relocated, outer": (relocated, outer, (9, 8), 1, 6, 7),
    "relocated, outer over time": (relocated, outer, (8, 9), 3, 7, 6),
    "relocated, transposed": (relocated, outer, (7, 6), 3, 6, 7),
    "relocated, look-up": (relocated, looked_up, (30,), 6, 9, 3),
    "convolution": (convolution, (3, 2), (1, 1), (0, 0), (1, 1), 1),
    "convolution in planes": (functools.partial(convolution, planes=3), (3, 2), (1, 1), (1, 1), (1, 1), 1),
    "convolution, strided": (convolution, (3, 2), (2, 3), (2, 1), (1, 1), 1),
    "convolution, dilated": (convolution, (2, 3), (1, 1), (1, 0), (3, 2), 1),
    "convolution, in groups": (convolution, (3, 2), (2, 1), (1, 1), (1, 2), 2),
    "convolution, each channel": (functools.partial(convolution, channels=(6, 6)), (2, 2), (1, 1), (0, 1), (1, 1), 6),
    "convolution, one dimension": (convolution, (3,), (2,), (1,), (2,), 2),
    "convolution, three dimensions": (convolution, (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 2), 1),
}
BUDGETS = (0, 1, 7, 30, 100, 10**6)
EVERY_FORM = pytest.mark.parametrize("name", FORMS)


def made(name, budget=10**6):
    """A form, and its matrix, (n, numel)."""
    function, *arguments = FORMS[name]
    return function(Scratch(budget), *arguments)


def height(form):
    return form.shape[0] if form.shape else 1


def some_slices(length):
    bounds = sorted(set(torch.randint(length + 1, (4,)).tolist()) | {0, length})
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


@EVERY_FORM
def test_form_says_what_it_is(name):
    form, rows = made(name)
    assert form.examples == len(rows)
    assert math.prod(form.shape) == rows.shape[1]
    assert all(isinstance(tensor, Tensor) for tensor in form.kept)
    assert form.kept


@EVERY_FORM
def test_blocks_of_a_form(name):
    form, rows = made(name)
    matrix = rows.reshape(len(rows), height(form), -1)
    for examples, part in itertools.product(some_slices(len(rows)), some_slices(height(form))):
        expected = matrix[examples, part].flatten(1)
        close(form.block(examples, part), expected)
        close(form.block(examples, part, ordered=True), expected)
    for part in some_slices(height(form)):
        unordered = form.block(slice(0, len(rows)), part, ordered=False)
        expected = matrix[:, part].flatten(1)
        close(unordered @ unordered.T, expected @ expected.T)
        close(unordered.sort(1).values, expected.sort(1).values)


@EVERY_FORM
def test_unordered_blocks_have_the_same_order_for_all_examples(name):
    form, _ = made(name)
    together = form.block(slice(0, form.examples), slice(0, height(form)), ordered=False).clone()
    for i in range(form.examples):
        close(form.block(slice(i, i + 1), slice(0, height(form)), ordered=False)[0], together[i])


def some_coordinates(numel):
    """Few and many, the first and the last."""
    counts = {1, numel // 10, numel // 5, numel // 3, numel - 1, numel} - {0}
    found = [torch.randperm(numel)[:count].sort().values for count in sorted(counts)]
    return [*found, torch.tensor([0]), torch.tensor([numel - 1]), torch.arange(0, numel, 2)]


@EVERY_FORM
def test_coordinates_of_a_form(name):
    for budget in BUDGETS:
        form, rows = made(name, budget)
        for index in some_coordinates(rows.shape[1]):
            expected = rows[:, index]
            for _ in range(2):  # what is remembered of an index must not be spoilt by its use
                close(form.take(index), expected)
            close(form.scaled(-3.0).take(index), -3 * expected)
            close(taken(form, index, budget), expected)


def test_both_ways_to_coordinates_are_taken(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Scratch, "pattern", lambda self, *args, real=Scratch.pattern: asked.append(1) or real(self, *args)
    )
    for name in ("outer", "convolution"):
        form, rows = made(name)
        for count, sparse in ((3, True), (rows.shape[1] // 2, False)):
            asked.clear()
            form.take(torch.arange(count))
            assert bool(asked) == sparse


@EVERY_FORM
def test_inner_products_of_a_form(name):
    for budget in BUDGETS:
        form, rows = made(name, budget)
        G = rows @ rows.T
        short, scaled = form.gram(), form.scaled(0.5).gram()
        if short is not None:
            close(short, G)
        if scaled is not None:
            close(scaled, G / 4)
        close(inner_products([[form]], budget), G)


@pytest.mark.parametrize("name", ["outer, light", "outer, many times", "look-up", "relocated, outer"])
def test_some_forms_know_a_shorter_way_to_their_inner_products(name):
    assert (made(name)[0].gram() is None) == (name == "outer, many times")


def test_bias_takes_the_inner_products_that_its_matrix_has_made():
    form, _ = made("outer, light")
    bias = Dense(form.left[:, 0], form.left_products)
    close(bias.gram(), form.left[:, 0] @ form.left[:, 0].T)
    assert bias.scaled(2.0).gram() is None  # those that were made are no longer right


@EVERY_FORM
def test_scaled_form(name):
    form, rows = made(name)
    close(form.scaled(0.25).block(slice(0, len(rows)), slice(0, height(form))), rows / 4)
    close(form.block(slice(0, len(rows)), slice(0, height(form))), rows)
    assert form.scaled(0.25).shape == form.shape


@EVERY_FORM
def test_total_and_single_gradients_of_a_form(name):
    for budget in BUDGETS:
        form, rows = made(name, budget)
        close(total(form, budget), rows.sum(0).reshape(form.shape))
        for i in range(len(rows)):
            close(one(form, i), rows[i].reshape(form.shape))


@EVERY_FORM
def test_chunks_are_everything_once_and_as_small_as_they_can(name):
    form, rows = made(name)
    width = rows.shape[1] // height(form)
    least = len(rows) * width if form.sliceable else rows.shape[1]
    for budget in BUDGETS:
        seen = torch.zeros(len(rows), height(form), dtype=torch.int64)
        for examples, part in chunks([form], budget):
            seen[examples, part] += 1
            assert 0 < (examples.stop - examples.start) * (part.stop - part.start) * width <= max(budget, least)
        assert (seen == 1).all()


# --- products of several forms -------------------------------------------------------------------------------------

MATRICES = {
    "outer": lambda s, n: outer(s, 3, 6, 4, n=n),
    "outer, light": lambda s, n: outer(s, 1, 6, 4, n=n),
    "dense": lambda s, n: dense(s, 6, 4, n=n),
    "look-up": lambda s, n: looked_up(s, 6, 5, 4, n=n),
    "lazy": lambda s, n: lazy(s, 6, 4, n=n),
    "transposed": lambda s, n: relocated(s, outer, (6, 4), 2, 4, 6, n=n),
    "part": lambda s, n: relocated(s, dense, (6, 4), 2, 4, n=n),
}
"""Forms of a parameter of shape (6, 4)."""
USES = [[name] for name in MATRICES] + [list(pair) for pair in itertools.combinations(MATRICES, 2)]
USES += [["outer", "outer", "outer, light"], ["outer", "look-up", "lazy", "part"], ["part", "part"], ["lazy", "lazy"]]


def used(names, scratch, n):
    """The forms of several uses of a parameter, and the sum of their gradients."""
    pairs = [MATRICES[name](scratch, n) for name in names]
    return [form for form, _ in pairs], sum(rows for _, rows in pairs)


@pytest.mark.parametrize("names", USES, ids=" + ".join)
def test_inner_products_of_several_uses_and_groups(names):
    for budget, sizes in itertools.product(BUDGETS, ((5,), (5, 1), (2, 3, 4))):
        scratch = Scratch(budget)
        groups = [used(names, scratch, n) for n in sizes]
        rows = torch.cat([rows for _, rows in groups])
        close(inner_products([forms for forms, _ in groups], budget), rows @ rows.T)


@pytest.mark.parametrize("names", USES, ids=" + ".join)
def test_coordinates_of_several_uses(names):
    forms, rows = used(names, Scratch(30), 5)
    for count in (2, 15):
        index = torch.randperm(24)[:count].sort().values
        close(coordinates(forms, index), rows[:, index])


def halves(scratch, n):
    """A parameter of which two uses saw different rows."""
    parts = [outer(scratch, 2, 3, 4, n=n), dense(scratch, 3, 4, n=n)]
    forms = [
        Relocated(form, torch.arange(12) + 12 * k, torch.Size((6, 4)), scratch) for k, (form, _) in enumerate(parts)
    ]
    return forms, torch.cat([rows for _, rows in parts], 1)


@pytest.mark.parametrize("budget", [0, 30, 10**6])
def test_uses_that_saw_different_parts_of_a_parameter(budget):
    scratch = Scratch(budget)
    groups = [halves(scratch, n) for n in (3, 2)]
    close(inner_products([groups[0][0]], budget), groups[0][1] @ groups[0][1].T)
    rows = torch.cat([rows for _, rows in groups])
    close(inner_products([forms for forms, _ in groups], budget), rows @ rows.T)
    close(coordinates(groups[0][0], torch.arange(0, 24, 5)), groups[0][1][:, ::5])


SCALES = [2.0**power for power in (-100, -60, -20, 0, 20, 60, 100)]


def narrow(form, scale):
    """A form in float32, scaled."""
    kinds = {
        Dense: lambda f: Dense(f.rows.float() * scale),
        Outer: lambda f: Outer(f.left.float() * scale, f.right.float(), Scratch(30), f.shape),
        Relocated: lambda f: Relocated(narrow(f.inner, scale), f.places, f.shape, Scratch(30)),
    }
    return kinds[type(form)](form)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("names", [["outer"], ["outer, light"], ["dense"], ["outer", "dense"], ["transposed", "part"]],
                         ids=" + ".join)  # fmt: skip
def test_scale_does_not_matter_to_inner_products(names, scale):
    for sizes in ((5,), (3, 2)):
        groups = [used(names, Scratch(30), n) for n in sizes]
        rows = torch.cat([rows for _, rows in groups])
        found = inner_products([[narrow(form, scale) for form in forms] for forms, _ in groups], 30)
        close(found.double() / scale / scale, rows @ rows.T, 1e-5)


# --- means and variances -------------------------------------------------------------------------------------------


def assert_moments(found, rows, tolerance=TIGHT, scale=1.0):
    """Means and sums of squared deviations, each coordinate by itself."""
    assert found.count == len(rows)
    means = rows.mean(0)
    squares = (rows - means).square().sum(0)
    np.testing.assert_allclose(found.means.double() / scale, means, rtol=tolerance, atol=tolerance * rows.abs().max())
    np.testing.assert_allclose(found.squares.double() / scale / scale, squares, rtol=tolerance,
                               atol=(tolerance * rows.abs().max()) ** 2 * len(rows))  # fmt: skip


@EVERY_FORM
def test_moments_of_a_form(name):
    for budget in BUDGETS:
        form, rows = made(name, budget)
        assert_moments(moments([form], None, budget), rows, 1e-9)
        for index in (torch.arange(0, rows.shape[1], 3), torch.arange(rows.shape[1])):
            assert_moments(moments([form], index, budget), rows[:, index], 1e-9)


@pytest.mark.parametrize("names", USES, ids=" + ".join)
def test_moments_of_several_uses(names):
    for budget in BUDGETS:
        forms, rows = used(names, Scratch(budget), 5)
        assert_moments(moments(forms, None, budget), rows, 1e-9)
        index = torch.arange(1, 24, 4)
        assert_moments(moments(forms, index, budget), rows[:, index], 1e-9)


@pytest.mark.parametrize("way", ["all", "some"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["outer", "outer, light", "dense"])
def test_scale_does_not_matter_to_moments(name, scale, way):
    form, rows = MATRICES[name](Scratch(10**6), 5)
    index = None if way == "all" else torch.arange(0, 24, 2)
    found = moments([narrow(form, scale)], index, 10**6)
    assert_moments(found, rows if index is None else rows[:, index], 1e-5, scale)


@pytest.mark.parametrize("way", ["all", "some"])
@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3, 0.0])
def test_moments_of_coordinates_that_are_nearly_constant(spread, scale, way):
    """In float32: the variance of what hardly varies keeps the digits that the numbers themselves have."""
    n = 64
    left = (1 + spread * random(n, 1, 8)).float() * scale
    right = (1 + spread * random(n, 1, 8)).float()
    right[:, :, :4] = random(n, 1, 4).float()  # some vary whatever the spread is
    rows = (left[:, 0, :, None].double() / scale * right[:, 0, None, :].double()).flatten(1)
    index = None if way == "all" else torch.arange(0, 64, 3)
    found = moments([Outer(left, right, Scratch(10**6))], index, 10**6)
    expected = rows if index is None else rows[:, index]
    squares = (expected - expected.mean(0)).square().sum(0)
    error = (found.squares.double() / scale / scale - squares).abs()
    size = expected.square().sum(0)
    rounding = torch.finfo(torch.float32).eps
    # A number is off by its rounding error, its deviation by as much: (d + r)^2 - d^2 is about 2 d r.
    assert (error <= 1e-3 * squares + 8 * rounding * (size * squares).sqrt() + 16 * rounding**2 * size).all()
    np.testing.assert_allclose(found.means.double() / scale, expected.mean(0), rtol=1e-5, atol=1e-5)
    assert (found.squares >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_moments_of_two_groups_are_those_of_both_together(scale, dtype):
    rows = random(20, 6) + torch.tensor([0, 1, -3, 10, 100, 0.01], dtype=torch.float64)
    rows[:7, 0] = 0.0
    rows[7:, 1] = 0.0
    parts = (rows * scale).to(dtype)
    for cut in (1, 7, 19):
        joined = Moments.of(parts[:cut]).with_(Moments.of(parts[cut:]))
        assert_moments(joined, rows, 1e-4 if dtype == torch.float32 else 1e-10, scale)
    parts = functools.reduce(Moments.with_, (Moments.of(part) for part in parts.split(3)))
    assert_moments(parts, rows, 1e-4 if dtype == torch.float32 else 1e-10, scale)


@pytest.mark.parametrize("scale", [*SCALES, 2.0**66])
def test_moments_of_two_groups_far_apart(scale):
    """Each group alone is within the range of float32, also where its squares are; their distance's square is not."""
    rows = torch.cat([1 + 1e-3 * random(4, 3), -1 + 1e-3 * random(4, 3)])
    parts = (rows * scale).float()
    joined = Moments.of(parts[:4]).with_(Moments.of(parts[4:]))
    assert_moments(joined, rows, 1e-4, scale)


# --- one's own rules -----------------------------------------------------------------------------------------------


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
    return zoo.averaged_problem(model, summed, (x, torch.randn(SIZE, width).double()))


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
        problem = zoo.averaged_problem(model, per_example, (x, mask))
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
