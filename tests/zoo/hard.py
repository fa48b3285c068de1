"""Rows that are hard to follow, or that there are none of: a number must be right, or there must be none."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pack_padded_sequence

from tests.zoo.interacting import linear_rows, split
from tests.zoo.problem import HARD_CASES, Parameters, Problem, averaged_problem, case, classifier, classify, net, normal

hard_case = functools.partial(case, into=HARD_CASES)


@hard_case()
def recurrent_cells() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        state, hidden = None, x.new_zeros(len(x), 2)
        for moment in x.unbind(1):
            state = m.lstm(moment, state)
            hidden = m.gru(state[0], hidden)
        return m.head(hidden)

    model = net(forward, lstm=nn.LSTMCell(3, 2), gru=nn.GRUCell(2, 2), head=nn.Linear(2, 3))
    return classifier(model, torch.randn(3, 3, 3), 3)


@hard_case(kinked=True)
def lstm_packed() -> Problem:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(torch.relu(m.body(x)), lengths, batch_first=True, enforce_sorted=False)
        return m.head(m.lstm(packed)[1][0][-1])

    model = net(forward, body=nn.Linear(3, 2), lstm=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 3))
    batch = (torch.randn(4, 4, 3), torch.tensor([2, 4, 1, 3]), torch.randint(3, (4,)))
    return averaged_problem(model, classify, batch)


@hard_case()
def rows_sorted() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        rows = torch.tanh(m.body(x[order]))
        return m.head(rows[order.argsort()])

    return classifier(net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3)), torch.randn(5, 4), 3)


@hard_case()
def mixture_of_experts() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.body(x))
        out = torch.zeros_like(hidden)
        for expert, chosen in ((m.first, x[:, 0] > 0), (m.second, x[:, 0] <= 0)):
            if chosen.any():
                out[chosen] = torch.tanh(expert(hidden[chosen]))
        return m.head(out)

    experts = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}
    x = torch.randn(5, 4)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])
    return classifier(net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3), **experts), x, 3)


@hard_case()
def examples_one_by_one() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = torch.stack([torch.tanh(m.body(row)) for row in x])
        return torch.cat([m.head(row[None]) for row in rows])

    return classifier(net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3)), torch.randn(3, 3), 3)


@hard_case()
def vmap_inside() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.vmap(lambda row: torch.tanh(m.weight @ row + m.bias))(x))

    return classifier(net(forward, weight=normal(4, 3), bias=normal(4), head=nn.Linear(4, 3)), torch.randn(4, 3), 3)


@hard_case()
def learned_weights_of_losses() -> Problem:
    def forward(m: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        hidden = torch.tanh(m.body(x))
        first, second = F.cross_entropy(m.classes(hidden), y), F.mse_loss(m.values(hidden), z)
        return first * torch.exp(-m.weights[0]) + second * torch.exp(-m.weights[1]) + m.weights.sum()

    model = net(forward, body=nn.Linear(3, 4), classes=nn.Linear(4, 3), values=nn.Linear(4, 2), weights=normal(2))
    batch = (torch.randn(4, 3), torch.randint(3, (4,)), torch.randn(4, 2))
    return averaged_problem(model, lambda model, batch: model(*batch), batch)


@hard_case()
def gradient_penalty() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0] if batch[0].requires_grad else batch[0].detach().requires_grad_()
        with torch.enable_grad():
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, batch[1]) + 0.3 * slope.square().sum(1).mean()

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return averaged_problem(model, loss, (torch.randn(4, 3), torch.randn(4, 2)))


@hard_case(interacting=True)
def halves_through_different_layers() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = split(batch[0])
        rows = linear_rows(copies[:2], rows[:2], "first") + linear_rows(copies[2:], rows[2:], "second")
        return F.cross_entropy(torch.cat(linear_rows(copies, [torch.tanh(x) for x in rows], "head")), batch[1])

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(torch.cat([m.first(x[:2]), m.second(x[2:])])))

    model = net(forward, first=nn.Linear(3, 4), second=nn.Linear(3, 4), head=nn.Linear(4, 3))
    return Problem(model, classify, (torch.randn(4, 3), torch.randint(3, (4,))), 4, untied=untied)


@hard_case(interacting=True)
def parameter_with_a_row_for_each_example() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = [x + own["latent"][i] for i, (own, x) in enumerate(zip(copies, split(batch[0]), strict=True))]
        return F.cross_entropy(torch.cat(linear_rows(copies, [torch.tanh(x) for x in rows], "head")), batch[1])

    model = net(lambda m, x: m.head(torch.tanh(x + m.latent)), latent=normal(4, 3), head=nn.Linear(3, 3))
    return Problem(model, classify, (torch.randn(4, 3), torch.randint(3, (4,))), 4, untied=untied)
