"""Calls with parameters, forms of their gradients, and what both are compared with."""

import copy
import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from gradmon.per_example import RULES, Experience, Listener
from gradmon.per_example.convolution import Convolution, Windows
from gradmon.per_example.forms import Dense, Lazy, Outer, Relocated
from gradmon.per_example.lookup import Lookup
from gradmon.per_example.scratch import Scratch
from tests import references
from tests.zoo.problem import Net, averaged_problem, net, normal

SIZE = 4
TIGHT = 1e-11


def close(found, expected, tolerance=TIGHT):
    """Equal up to rounding, relative to the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-300))


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
    return averaged_problem(model, summed, batch), made.own


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
