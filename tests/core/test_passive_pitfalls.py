"""Where numbers from the training's own passes could go wrong without anybody noticing."""

from collections.abc import MutableMapping

import numpy as np
import pytest
import torch
from torch import nn

import gradmon
from gradmon.per_example import Listener
from tests.core.listened import found_in


def right_or_silent(model, run, rows, batch=None, **options):
    """The Gram matrix is that of the rows, or there is none."""
    try:
        found = found_in(model, run, batch, **options)
    except gradmon.Unavailable:
        return False
    G = rows @ rows.T
    np.testing.assert_allclose(found.gram, G, rtol=1e-9, atol=1e-12 * float(G.abs().max()))
    return True


def rows_of(model, losses):
    """B times the gradient of each of B terms of a loss."""
    rows = []
    for term in losses:
        parts = torch.autograd.grad(term, list(model.parameters()), retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if part is None else part).flatten()
                       for p, part in zip(model.parameters(), parts, strict=True)])
        )  # fmt: skip
    return torch.stack(rows) * len(rows)


class HeadOnRealTokens(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.body, self.head, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x, mask):
        h = self.body(x).tanh()
        if self.how == "mask":
            h = h[mask]
        elif self.how == "nonzero":
            at = mask.nonzero(as_tuple=True)
            h = h[at[0], at[1]]
        else:
            h = torch.cat([h[i, : int(mask[i].sum())] for i in range(len(h))])
        return self.head(h)


@pytest.mark.parametrize("how", ["mask", "nonzero", "lengths"])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 4, 3, 2], [4, 4, 4, 4, 4, 4]])
def test_rows_whose_number_depends_on_the_batch(how, lengths):
    torch.manual_seed(0)
    model = HeadOnRealTokens(how).double()
    x = torch.randn(6, 5, 3).double()
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    owner = torch.arange(6)[:, None].expand(6, 5)[mask]

    def terms():
        squares = model(x, mask).square().sum(1) / 24
        return [squares[owner == i].sum() for i in range(6)]

    rows = rows_of(model, terms())
    right_or_silent(model, lambda: sum(terms()).backward(), rows, (x, mask))


def assert_right_while_it_trains(model, x):
    """Three steps of gradient descent from where the first flows may be zero."""
    listener = Listener(model)
    for _ in range(3):
        rows = rows_of(model, [model(x[i : i + 1]).sub(1).square().sum() / 5 for i in range(5)])
        listener.arm()
        (model(x).sub(1).square().sum() / 5).backward()
        found = listener.collect(x)
        listener.disarm()
        np.testing.assert_allclose(found.gram, rows @ rows.T, rtol=1e-9, atol=1e-14)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
                parameter.grad = None


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


@pytest.mark.parametrize("zero_head", [False, True])
def test_loop_of_cells(zero_head):
    torch.manual_seed(0)
    model, x = Cells().double(), torch.randn(5, 3, 3).double()
    if zero_head:
        nn.init.zeros_(model.head.weight)
    assert_right_while_it_trains(model, x)


def test_complex_products_of_which_the_first_flow_is_zero():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.head = nn.Parameter(torch.randn(3, 2)), nn.Linear(4, 2)

        def forward(self, x):
            spectrum = torch.fft.rfft(x) * torch.view_as_complex(self.filter)
            return self.head(torch.fft.irfft(spectrum, n=4))

    torch.manual_seed(0)
    model, x = Filter().double(), torch.randn(5, 4).double()
    nn.init.zeros_(model.head.weight)
    assert_right_while_it_trains(model, x)


def test_penalty_that_is_zero_at_first():
    torch.manual_seed(0)
    model, x = nn.Linear(40, 30).double(), torch.randn(5, 40).double()
    start = [p.detach().clone() for p in model.parameters()]
    listener = Listener(model)
    for step in range(3):
        model.zero_grad()
        listener.arm()
        penalty = sum((p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True))
        (model(x).square().mean() + penalty).backward()
        if step:
            with pytest.raises(gradmon.Unavailable, match="add up"):
                listener.collect(x)
        listener.disarm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)


def test_input_buffer_that_is_used_again():
    torch.manual_seed(0)
    model, buffer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.empty(4, 3).double()
    listener = Listener(model)
    for count in (1, 2, 2, 1):
        xs = [torch.randn(4, 3).double() for _ in range(count)]
        rows = rows_of(model, [model(x).square().sum() / (4 * count) for x in torch.cat(xs)[:, None]])
        model.zero_grad()
        listener.arm()
        for x in xs:
            (model(buffer.copy_(x)).square().sum() / (4 * count)).backward()
        if count == 1:
            np.testing.assert_allclose(listener.collect().gram, rows @ rows.T, rtol=1e-9, atol=1e-14)
        else:
            with pytest.raises(gradmon.Unavailable, match=r"overwritten|add up"):
                listener.collect()
        listener.disarm()


def test_two_backward_passes_of_the_same_batch():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()

    def run():
        model(x).square().sum().backward()
        model(x).sum().backward()

    rows = rows_of(model, [model(row).square().sum() + model(row).sum() for row in x[:, None]])
    assert right_or_silent(model, run, rows, x)


def test_attack_on_the_inputs_before_the_step():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()

    def run():
        moved = x.clone().requires_grad_()
        (direction,) = torch.autograd.grad(model(moved).square().sum(), moved)
        model(x + direction.sign()).square().sum().backward()

    moved = x.clone().requires_grad_()
    (direction,) = torch.autograd.grad(model(moved).square().sum(), moved)
    rows = rows_of(model, [model(row).square().sum() for row in (x + direction.sign())[:, None]])
    assert right_or_silent(model, run, rows, x)


def test_passes_of_our_own_are_not_listened_to():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    rows = rows_of(model, [model(row).square().sum() for row in x[:, None]])
    listener = Listener(model)
    for _ in range(2):
        model.zero_grad()
        listener.arm()
        gradmon.measure(model, lambda m, b: m(b).square().sum(), x, metrics=["noise_scale", "weight_condition"])
        model(x).square().sum().backward()
        np.testing.assert_allclose(listener.collect(x).gram, rows @ rows.T, rtol=1e-9)
        listener.disarm()


def test_table_with_a_maximal_norm_is_left_alone():
    results = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 3, max_norm=0.7), nn.Flatten(), nn.Linear(12, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        monitor = (
            gradmon.Monitor(model, optimizer, metrics=["noise_scale"], schedule=gradmon.every(1), mask=None)
            if monitored
            else None
        )
        for _ in range(4):
            ids = torch.randint(9, (5, 4))
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(ids)
        results.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in results), strict=True))


def test_mapping_of_ones_own_is_not_written_to():
    class Record(MutableMapping):
        def __init__(self, items):
            self.held = dict(items)

        def __getitem__(self, key):
            return self.held[key]

        def __setitem__(self, key, value):
            self.held[key] = value

        def __delitem__(self, key):
            del self.held[key]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    class Model(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"])

    torch.manual_seed(0)
    model, x = Model(3, 2).double(), torch.randn(4, 3).double()
    batch = Record({"x": x})
    rows = rows_of(model, [nn.Linear.forward(model, row).square().sum() for row in x[:, None]])
    assert right_or_silent(model, lambda: model(batch).square().sum().backward(), rows)
    assert batch["x"] is x


@pytest.mark.parametrize("places", [(1, 4), (4,)])
def test_positions_as_an_argument(places):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place, self.head = nn.Embedding(7, 3), nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, ids, place):
            return self.head((self.token(ids) + self.place(place)).tanh())

    torch.manual_seed(0)
    model, ids, place = Model().double(), torch.randint(7, (5, 4)), torch.arange(4).reshape(places)
    rows = rows_of(model, [model(row, place).square().sum() for row in ids[:, None]])
    assert right_or_silent(model, lambda: model(ids, place).square().sum().backward(), rows, ids)


def test_mean_and_variance_over_two_backward_passes_of_the_same_batch():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()

    def run():
        model(x).square().sum().backward()
        model(x).sum().backward()

    with pytest.raises(gradmon.Unavailable, match="mean and variance"):
        found_in(model, run, x, gram=False, moments=True)
    assert "mean and variance" in found_in(model, run, x, moments=True).missing


def test_one_constant_input_does_not_make_the_examples_the_same():
    class Model(nn.Linear):
        def forward(self, constant, x):
            return super().forward(x) + constant

    torch.manual_seed(0)
    model, constant = Model(3, 2).double(), torch.randn(4, 2).double()
    xs = [torch.randn(4, 3).double() for _ in range(2)]
    rows = rows_of(model, [
        model(c[None], row[None]).square().sum() for x in xs for c, row in zip(constant, x, strict=True)
    ])  # fmt: skip
    assert right_or_silent(model, lambda: [model(constant, x).square().sum().backward() for x in xs], rows)


def test_lengths_as_plain_numbers():
    class Model(nn.Linear):
        def forward(self, x, lengths):
            return super().forward(torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]))

    torch.manual_seed(0)
    model, x = Model(3, 2).double(), torch.randn(4, 3, 3).double()
    listener = Listener(model)
    for lengths in ([2, 2, 2, 2], [3, 1, 2, 2]):
        listener.arm()
        model(x, lengths).square().sum().backward()
        with pytest.raises(gradmon.Unavailable):
            listener.collect(x)
        listener.disarm()
