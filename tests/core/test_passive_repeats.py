"""Several forward passes before one backward pass that see the same examples: in the same order, or no number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Unavailable
from tests.core.passive import listened

SIZE = 6
ORDERS = "the model was called on the same examples in different orders"
PARTS = "the model was called on parts of the batch whose rows are not its examples"


def mlp(width=4):
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(*sizes):
    return torch.randn(SIZE, *sizes).double(), torch.randint(3, (SIZE,))


def there_and_back(model, x, y):
    return F.cross_entropy(model(x) + model(x.flip(0)).flip(0), y)


def back_first(model, x, y):
    found = model(x.flip(0)).flip(0)
    return F.cross_entropy(found + model(x), y)


def twice_in_one_other_order(model, x, y):
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    return F.cross_entropy(model(x[order])[order] + model(2 * x), y)


def others_of_the_batch(model, x, y):
    return F.triplet_margin_loss(model(x), model(x + 0.1), model(x[torch.randperm(SIZE)]), margin=10)


@pytest.mark.parametrize("loss", [there_and_back, back_first, twice_in_one_other_order, others_of_the_batch])
def test_the_same_examples_in_another_order(loss):
    torch.manual_seed(1)
    model, (x, y) = mlp(), batch(4)
    with pytest.raises(Unavailable, match=ORDERS):
        listened(model, (x, y), lambda: loss(model, x, y).backward())


@pytest.mark.parametrize("sizes", [(SIZE, 4), (SIZE,)])
def test_one_example_after_the_other_with_as_many_rows_as_there_are_examples(sizes):
    model, (x, y) = mlp(sizes[-1]), batch(*sizes)

    def run():
        parts = [model(one).reshape(-1, 3).mean(0) for one in x]
        F.cross_entropy(torch.stack(parts), y).backward()

    with pytest.raises(Unavailable, match=PARTS if len(sizes) > 1 else None):
        listened(model, (x, y), run)


def over_time(model, x, y):
    return F.cross_entropy(sum(model(x[:, step]) for step in range(x.shape[1])), y)


def two_views(model, x, y):
    return F.cross_entropy(model(x[:, 0] + 0.1) - model(x[:, 1] * 2), y)


def the_same_twice(model, x, y):
    return F.cross_entropy(model(x[:, 0]) + model(x[:, 0].clone()), y)


@pytest.mark.parametrize("loss", [over_time, two_views, the_same_twice])
@pytest.mark.parametrize("shared", [False, True])
def test_the_same_examples_in_the_same_order_keep_their_numbers(loss, shared):
    model, (x, y) = mlp(), batch(SIZE, 4)
    if shared:  # one memory for inputs and others of the batch
        whole = torch.randn(SIZE, SIZE + 1, 4).double()
        held, x = whole[:, -1], whole[:, :-1]
    else:
        held = torch.randn(SIZE, 4).double()
    rows = []
    for place in range(SIZE):
        one = slice(place, place + 1)
        found = torch.autograd.grad(loss(model, x[one], y[one]), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]))
    expected = torch.stack(rows)
    gram = listened(model, (held, x, y), lambda: loss(model, x, y).backward()).gram
    torch.testing.assert_close(gram, expected @ expected.T)


def test_parts_of_a_batch_are_other_examples_also_beside_a_pass_that_is_only_looked_at():
    model, (x, y) = mlp(), batch(4)
    rows = []
    for place in range(SIZE):
        one = slice(place, place + 1)
        found = torch.autograd.grad(F.cross_entropy(model(x[one]), y[one]), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]))
    expected = torch.stack(rows)

    def run():
        for place in range(SIZE):
            one = slice(place, place + 1)
            model(x[one])
            (F.cross_entropy(model(x[one]), y[one]) / SIZE).backward()

    torch.testing.assert_close(listened(model, (x, y), run).gram, expected @ expected.T)


def test_an_order_that_sends_no_gradient_is_no_matter():
    model, (x, y) = mlp(), batch(4)

    def run():
        model(x.flip(0))
        F.cross_entropy(model(x) + model(2 * x), y).backward()

    assert listened(model, (x, y), run).gram is not None
