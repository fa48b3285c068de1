"""Orders that the batch chooses: the first examples may be in order by chance, and the others are not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Monitor, Unavailable, every
from tests.core.passive import listened
from tests.zoo.problem import net

KEYS = [1, 1, 1, 0, 2, 0, 1]
SIZE = len(KEYS)
REASON = "do not follow the order"
METRICS = ["gradient_rank", "gradient_confusion", "noise_scale"]


def batch(keys=KEYS):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(SIZE, 4, generator=generator).double() for _ in range(2))
    return x, torch.tensor(keys), y


def mse(model, batch):
    return F.mse_loss(model(*batch[:2]), batch[2])


def reordered(order):
    """A model whose middle layer sees the examples in another order."""

    def forward(m, x, key):
        places = order(x, key)
        found = m.body(torch.tanh(m.stem(x))[places])
        back = torch.empty_like(found)
        back[places] = found
        return m.head(torch.tanh(back))

    return net(forward, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 4)).double()


def dispatched(m, x, key):
    """Each expert has a place for every example, and fills them one after the other."""
    chosen = F.one_hot(key, 3).double()
    place = F.one_hot((chosen.cumsum(0) * chosen).sum(1).long() - 1, len(x)).double()
    slots = chosen[:, :, None] * place[:, None]
    given = torch.einsum("bes,bd->sed", slots, torch.tanh(m.stem(x)))
    return m.head(torch.tanh(torch.einsum("bes,sed->bd", slots, m.body(given))))


ORDERS = {
    "sort": lambda x, key: key.sort(stable=True).indices,
    "argsort": lambda x, key: key.argsort(dim=0, stable=True),
    "topk": lambda x, key: (key + torch.arange(len(key), 0, -1) / 100).topk(len(key)).indices,
    "numpy": lambda x, key: torch.from_numpy(np.argsort(key.numpy(), kind="stable")),
    "numpy without asking": lambda x, key: torch.from_numpy(np.argsort(np.asarray(key), kind="stable")),
    "list": lambda x, key: torch.tensor(sorted(range(len(x)), key=key.tolist().__getitem__)),
    "compared": lambda x, key: torch.tensor(sorted(range(len(x)), key=lambda place: key[place])),
    "nonzero": lambda x, key: torch.cat([(key == k).nonzero().flatten() for k in range(3)]),
    "where": lambda x, key: torch.cat([torch.where(key == k)[0] for k in range(3)]),
    "mask": lambda x, key: torch.cat([torch.arange(len(x))[key == k] for k in range(3)]),
}
MODELS = {name: reordered(order) for name, order in ORDERS.items()}
MODELS["places of experts"] = net(dispatched, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 4)).double()


@pytest.mark.parametrize("name", MODELS)
def test_an_order_in_which_the_first_examples_are_by_chance_is_found_out(name):
    model, data = MODELS[name], batch()
    with pytest.raises(Unavailable, match=REASON):
        gradmon.per_example_gram(model, mse, data)
    with pytest.raises(Unavailable, match=REASON):
        listened(model, data, lambda: mse(model, data).backward())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passive", [False, True])
def test_a_batch_in_order_says_nothing_of_the_next(name, passive):
    model = MODELS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, None if passive else mse, metrics=METRICS, schedule=every(1), mask=None) as monitor:
        for keys in ([1] * SIZE, KEYS):
            optimizer.zero_grad()
            mse(model, batch(keys)).backward()
            optimizer.step()
            monitor.step(batch(keys))
            reasons = {name: monitor.readings[name].reason for name in METRICS}
            if keys == KEYS:
                assert all(reason is not None and REASON in reason for reason in reasons.values())
            else:
                assert set(reasons.values()) <= {None, "no signal above the noise"}


def in_order_where_it_is_not(m, x, key):
    """Sorts only what is not sorted."""
    sorts = bool((key[1:] < key[:-1]).any())
    places = key.argsort(stable=True) if sorts else slice(None)
    found = m.body(torch.tanh(m.stem(x))[places])
    back = torch.empty_like(found)
    back[places] = found
    return m.head(torch.tanh(back))


@pytest.mark.parametrize("passive", [False, True])
def test_a_batch_that_need_not_be_sorted_says_nothing_of_the_next(passive):
    model = net(in_order_where_it_is_not, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, None if passive else mse, metrics=METRICS, schedule=every(1), mask=None) as monitor:
        for keys in ([1] * SIZE, [1] * SIZE, KEYS, KEYS):
            optimizer.zero_grad()
            mse(model, batch(keys)).backward()
            optimizer.step()
            monitor.step(batch(keys))
            reasons = {monitor.readings[name].reason for name in METRICS}
            assert reasons <= {None, "no signal above the noise"} if keys != KEYS else None not in reasons
    assert all(reason is not None and REASON in reason for reason in reasons)


@pytest.mark.parametrize("passive", [False, True])
def test_an_order_by_plain_numbers(passive):
    def forward(m, x, key):
        x = x * torch.ones(len(key), 1)  # as many as there are numbers
        places = torch.tensor(sorted(range(len(key)), key=key.__getitem__))
        return m.head(torch.tanh(m.body(torch.tanh(m.stem(x))[places]))[places.argsort()])

    model = net(forward, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, None if passive else mse, metrics=METRICS, schedule=every(1), mask=None) as monitor:
        for keys in ([1] * SIZE, KEYS):
            x, _, y = batch()
            optimizer.zero_grad()
            mse(model, (x, keys, y)).backward()
            optimizer.step()
            monitor.step((x, keys, y))
            reasons = {monitor.readings[name].reason for name in METRICS}
            assert reasons <= {None, "no signal above the noise"} if keys != KEYS else None not in reasons
    assert all(REASON in reason for reason in reasons)


def test_tokens_of_which_there_are_as_many_as_examples_are_not_taken_for_these():
    def loss(model, batch):
        return model.head(torch.tanh(model.stem(batch[0]))[batch[1]]).square().sum()

    model = net(None, stem=nn.Linear(4, 5), head=nn.Linear(5, 3)).double()
    picked = torch.zeros(SIZE, 3, dtype=torch.bool)
    picked[[0, 1, 2, 3, 3, 5, 6], [1, 0, 2, 0, 1, 2, 1]] = True
    with pytest.raises(Unavailable, match=REASON):
        gradmon.per_example_gram(model, loss, (torch.randn(SIZE, 3, 4).double(), picked))


def last_of_each(m, x, key):
    """Picks by the batch, but each example its own."""
    hidden = torch.tanh(m.stem(x[:, None].expand(-1, 3, -1)) * torch.arange(1, 4)[:, None])
    return m.head(m.body(hidden[torch.arange(len(x)), key]))


def read_one_by_one(m, x, key):
    return m.head(m.body(torch.tanh(m.stem(x) * torch.tensor([float(k) + 1 for k in key])[:, None])))


def ranked(m, x, key):
    return m.head(m.body(torch.tanh(m.stem(x) / (1 + key.argsort().argsort()[:, None]))))


@pytest.mark.parametrize("forward", [last_of_each, read_one_by_one, ranked])
def test_what_reads_the_batch_and_leaves_the_examples_in_order_keeps_its_numbers(forward):
    model = net(forward, stem=nn.Linear(4, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 4)).double()
    data = batch([2, 0, 1] * 2 + [2]) if forward is not ranked else batch([5, 2, 0, 1, 6, 3, 4])
    losses = (model(*data[:2]) - data[2]).square().mean(1)
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    torch.testing.assert_close(gradmon.per_example_gradients(model, mse, data), expected)
    gram = listened(model, data, lambda: mse(model, data).backward()).gram
    torch.testing.assert_close(gram, expected @ expected.T)
