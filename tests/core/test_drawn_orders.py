"""Orders that a forward pass draws: numbers where an example's rows stay its own, a reason where they do not."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Unavailable
from tests.core.passive import listened
from tests.zoo.problem import net

SIZE = 7
REASON = r"drawn at random|do not follow the order"


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def batch(*shape):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(SIZE, *part, generator=generator).double() for part in (shape, (3,)))


def shuffled(draw):
    def forward(m, x):
        order = draw(len(x))
        return m.head(torch.tanh(m.body(m.stem(x)[order]))[order.argsort()])

    return net(forward, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 3)).double()


def by_python(n):
    order = list(range(n))
    random.shuffle(order)
    return torch.tensor(order)


DRAWN = {
    "randperm": torch.randperm,
    "argsort": lambda n: torch.rand(n).argsort(),
    "argsort of a column": lambda n: torch.rand(n, 1).argsort(0).flatten(),
    "sort": lambda n: torch.randn(n).sort().indices,
    "topk": lambda n: torch.rand(n).topk(n).indices,
    "generator": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(n)),
    "numpy": lambda n: torch.from_numpy(np.random.permutation(n)),
    "Python": by_python,
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("seed", [0, 5, 6])  # with some, an order of three is the usual one
def test_rows_in_an_order_that_is_drawn_and_undone_are_not_taken_for_those_of_others(name, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model, data = shuffled(DRAWN[name]), batch(4)
    with pytest.raises(Unavailable, match=REASON):
        gradmon.per_example_gram(model, mse, data)
    with pytest.raises(Unavailable, match=REASON):
        listened(model, data, lambda: mse(model, data).backward())


def mixup(m, x):
    m.order = torch.randperm(len(x))
    return m.body(0.3 * x + 0.7 * x[m.order])


def tokens_in_another_order(m, x):
    return m.body(x.view(len(x), 5, 2)[:, torch.randperm(5)].flatten(1))


def tokens_masked(m, x):
    """As a masked autoencoder does: an order of its own for each example."""
    kept = torch.rand(len(x), 5).argsort(1)[:, :2]
    return m.body(x.view(len(x), 5, 2).gather(1, kept[..., None].expand(-1, -1, 2)).flatten(1).repeat(1, 3)[:, :10])


def some_conditions_dropped(m, x):
    dropped = torch.rand(len(x)) < 0.4
    order = torch.randperm(len(x))
    m.order = order
    return m.body(torch.where(dropped[:, None], torch.zeros_like(x), x) + 0 * order[0])


@pytest.mark.parametrize("forward", [mixup, tokens_in_another_order, tokens_masked, some_conditions_dropped])
def test_rows_that_stay_an_examples_own_have_their_numbers(forward):
    model = net(forward, body=nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3))).double()
    data = batch(10)
    torch.manual_seed(4)
    seen = []
    handle = model.body.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    loss = mse(model, data)
    handle.remove()
    loss.backward()
    expected = gradmon.per_example_gram(model.body, mse, (seen[0], data[1]))
    torch.manual_seed(4)
    torch.testing.assert_close(gradmon.per_example_gram(model, mse, data), expected, rtol=1e-9, atol=1e-12)
    torch.manual_seed(4)
    found = listened(model, data, lambda: mse(model, data).backward())
    torch.testing.assert_close(found.gram, expected, rtol=1e-9, atol=1e-12)
