"""What is made of the forms: inner products, means and variances."""

import functools
import itertools

import numpy as np
import pytest
import torch

from gradmon.per_example.forms import Dense, Outer, Relocated
from gradmon.per_example.products import Moments, coordinates, inner_products, moments
from gradmon.per_example.scratch import Scratch
from tests.core.rules import BUDGETS, EVERY_FORM, TIGHT, close, dense, lazy, looked_up, made, outer, random, relocated

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

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
