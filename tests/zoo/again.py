"""Parametrised weights; parameters used again, in place, in part; rows that are not the batch's rows."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.nn.utils.parametrizations import weight_norm as with_weight_norm
from torch.nn.utils.parametrize import register_parametrization

from tests.zoo.problem import (
    Problem,
    averaged,
    averaged_problem,
    case,
    classifier,
    classify,
    net,
    normal,
    regress,
    restoring,
)


@case()
def orthogonal_weights() -> Problem:
    layers = (orthogonal(nn.Linear(4, 4)), nn.Tanh(), orthogonal(nn.Linear(4, 3), orthogonal_map="cayley"))
    return classifier(nn.Sequential(*layers), torch.randn(5, 4), 3)


@case(kinked=True)
def spectral_norm_in_training() -> Problem:
    layers = (spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 4), nn.Unflatten(1, (2, 2)))
    model = nn.Sequential(*layers, spectral_norm(nn.Conv1d(2, 3, 2)), nn.Flatten())
    problem = classifier(model, torch.randn(4, 4), 3)
    return dataclasses.replace(problem, example_loss=restoring(averaged(classify)))


@case(once_differentiable=True)
def weight_norm_of_convolutions() -> Problem:
    first = with_weight_norm(nn.Conv2d(2, 3, 2))
    model = nn.Sequential(first, nn.Tanh(), with_weight_norm(nn.ConvTranspose2d(3, 2, 2), dim=1), nn.Flatten())
    return averaged_problem(model, regress, (torch.randn(4, 2, 3, 3), torch.randn(4, 18)))


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down, self.up = normal(1, columns), normal(rows, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@case()
def low_rank_update_of_a_frozen_weight() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for place, shape in ((0, (5, 4)), (2, (3, 5))):
        model[place].weight.requires_grad_(False)
        register_parametrization(model[place], "weight", LowRank(*shape))
    return classifier(model, torch.randn(5, 4), 3)


@case()
def module_used_with_three_lengths() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.shared(x))
        x = torch.tanh(m.shared(x[:, ::2]))
        return m.shared(x.mean(1))

    return classifier(net(forward, shared=nn.Linear(4, 4)), torch.randn(6, 6, 4), 4)


@case()
def convolution_used_with_three_lengths() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = 0.0
        while x.shape[-1] >= 2:
            x = torch.tanh(m.conv(x))
            total = total + x.mean(-1)
        return m.head(total)

    return classifier(net(forward, conv=nn.Conv1d(3, 3, 2), head=nn.Linear(3, 3)), torch.randn(3, 3, 4), 3)


@case()
def recurrence_used_with_two_lengths() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, state = m.gru(x)
        return m.head(torch.cat([m.gru(out[:, 1:], state)[0][:, -1], m.gru(x[:, :1])[0][:, 0]], dim=1))

    return classifier(net(forward, gru=nn.GRU(2, 2, batch_first=True), head=nn.Linear(4, 2)), torch.randn(3, 3, 2), 2)


@case(kinked=True)
def in_place_after_layers() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.add_(x).mul_(m.gamma)
        y.relu_()
        y = m.norm(y)
        y.add_(1.0)
        y = m.body(y.flatten(1))
        y[:, 0] *= 2.0
        y[:, 1:] += m.shift
        y.sigmoid_()
        return m.head(y)

    parts = {"conv": nn.Conv2d(2, 2, 3, padding=1), "norm": nn.GroupNorm(1, 2), "body": nn.Linear(12, 4)}
    model = net(forward, gamma=normal(2, 1, 1), shift=normal(3), head=nn.Linear(4, 3), **parts)
    return classifier(model, torch.randn(4, 2, 2, 3), 3)


@case()
def in_place_on_what_a_layer_has_read() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.body(x)
        shifted, frozen = hidden + m.shift, m.frozen(hidden)
        hidden.mul_(2.0)
        return m.head(torch.tanh(shifted + frozen + hidden))

    model = net(forward, body=nn.Linear(3, 4), shift=normal(4), frozen=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.frozen.weight.requires_grad_(False)
    return classifier(model, torch.randn(4, 3), 3)


@case()
def frozen_weights_or_biases() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.GroupNorm(1, 2),
        nn.Tanh(),
        nn.Conv2d(2, 2, 1),
        nn.Flatten(2),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    for frozen in (model[0].weight, model[1].bias, model[3].bias, model[5].weight, model[6].weight, model[9].bias):
        frozen.requires_grad_(False)
    return classifier(model, torch.randn(3, 1, 3, 3), 3)


@case(integer=True)
def frozen_embedding() -> Problem:
    model = net(lambda m, t: m.head(torch.tanh(m.body(m.embed(t))).flatten(1)), embed=nn.Embedding(6, 3))
    model.body, model.head = nn.Linear(3, 3), nn.Linear(9, 3)
    model.embed.requires_grad_(False)
    return classifier(model, torch.randint(6, (4, 3)), 3, input_path=None, input_module="embed")


class Doubled(nn.Linear):
    """A Linear layer that is none."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(2 * input, self.weight.abs(), self.bias) + self.weight.sum(1)


class Shifted(nn.Embedding):
    """An embedding of other tokens."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input + 1) % self.num_embeddings) * 0.5


@case(kinked=True)
def layers_that_are_not_what_they_seem() -> Problem:
    def forward(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(m.doubled(x) + m.shifted(tokens))
        return m.head.forward(torch.tanh(m.body(input=hidden)))

    parts = {"doubled": Doubled(3, 4), "shifted": Shifted(4, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    batch = (torch.randn(4, 3), torch.randint(4, (4,)), torch.randint(3, (4,)))
    return averaged_problem(net(forward, **parts), classify, batch)


@case(kinked=True)
def partly_detached() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = m.never(x)
        first = torch.tanh(m.body(x + shift))
        return m.head(first + torch.tanh(m.body(first.detach())))

    parts = {"never": nn.Linear(4, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    return classifier(net(forward, **parts), torch.randn(4, 4), 3)


class Reverse(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@case(kinked=True)
def gradients_that_are_no_slopes() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.body(x))
        x = m.middle(x + (torch.round(4 * x) / 4 - x).detach())
        return m.head(x) + m.other(Reverse.apply(x))

    parts = {name: nn.Linear(4, 3) for name in ("head", "other")}
    return classifier(net(forward, body=nn.Linear(3, 4), middle=nn.Linear(4, 4), **parts), torch.randn(4, 3), 3)


@case()
def views_interleaved() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = torch.stack([x, x.flip(1)], dim=1).flatten(0, 1)
        return m.head(torch.tanh(m.body(rows))).unflatten(0, (-1, 2)).square().sum(1)

    return classifier(net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3)), torch.randn(4, 4), 3)


@case()
def patches_as_rows() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(2, 3, 0, 1, 4, 5)
        rows = torch.tanh(m.body(patches.flatten(3).flatten(0, 2)))
        return m.head(rows).unflatten(0, (4, -1)).mean(0)

    return classifier(net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3)), torch.randn(4, 1, 4, 4), 3)
