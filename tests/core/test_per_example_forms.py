"""The forms in which the examples' gradients of a parameter are held."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from gradmon.per_example.forms import Dense, chunks, one, taken, total
from gradmon.per_example.products import inner_products
from gradmon.per_example.scratch import Scratch
from tests.core.rules import BUDGETS, EVERY_FORM, close, made

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


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
