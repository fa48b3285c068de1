"""Ways to train of which a passive number is right, or there is none."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from tests import references
from tests.core.passive import data, mlp, mse, shares
from tests.core.passive_scenes import Scene, plain, scene
from tests.zoo.problem import classify, net, normal


def sparse_embedding():
    torch.manual_seed(1)
    model = net(lambda m, t: m.head(m.embed(t).flatten(1)), embed=nn.Embedding(5, 2, sparse=True), head=nn.Linear(6, 3))
    model = model.double()
    twin = copy.deepcopy(model)
    twin.embed.sparse = False
    batch = (torch.randint(5, (6, 3)), torch.randint(3, (6,)))
    return Scene(model, batch, plain(classify), shares(twin, batch, classify), classify)


def bag_of_offsets():
    torch.manual_seed(1)
    model = net(
        lambda m, t, o: m.head(torch.tanh(m.bag(t, o))), bag=nn.EmbeddingBag(5, 3), head=nn.Linear(3, 3)
    ).double()
    tokens = [torch.tensor(row) for row in ([1, 2, 2], [3], [0, 4], [1, 1, 1, 2])]
    labels = torch.tensor([0, 2, 1, 0])
    rows = []
    for row, label in zip(tokens, labels, strict=True):
        value = F.cross_entropy(model(row, torch.tensor([0])), label[None])
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy())
    batch = (torch.cat(tokens), torch.tensor([0, 3, 4, 6]), labels)
    return Scene(model, batch, plain(classify), np.stack(rows), classify)


def embedding_of_bounded_norm():
    torch.manual_seed(1)
    model = net(
        lambda m, t: m.head(m.embed(t).flatten(1)), embed=nn.Embedding(5, 2, max_norm=0.5), head=nn.Linear(6, 3)
    )
    return scene(model.double(), classify, (torch.randint(5, (6, 3)), torch.randint(3, (6,))))


def penalty_outside():
    def loss(model, batch):
        return mse(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())

    return scene(mlp(), loss)


def decay_of_one_weight_inside():
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.mse_loss(m.head(torch.tanh(m.body(x))), x) + 0.1 * m.body.weight.square().sum()

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3)).double()
    return scene(model, lambda model, batch: model(batch[0]))


def head_outside():
    def loss(model, batch):
        return F.mse_loss(F.linear(model.body(batch[0]), model.last), batch[1])

    return scene(net(None, body=mlp(), last=normal(2, 2)).double(), loss)


def penalty_of_the_slope():
    def loss(model, batch):
        x = batch[0].detach().clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, batch[1]) + slope.square().sum(1).mean()

    return scene(mlp(), loss)


def penalty_of_the_gradient():
    def loss(model, batch):
        value = mse(model, batch)
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + 0.1 * sum(grad.square().sum() for grad in grads)

    made = scene(mlp(), mse)
    return made._replace(train=plain(loss), shares=np.full_like(made.shares, math.nan))  # there are no shares


def sharpness_aware():
    """Two passes at two places: the gradient of the second, at moved weights, is the one that is used."""

    def train(model, batch):
        mse(model, batch).backward()
        with torch.no_grad():
            moves = [0.1 * p.grad for p in model.parameters()]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        model.zero_grad()
        mse(model, batch).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)

    made = scene(mlp(), mse, train=train)
    moved = copy.deepcopy(made.model)
    h = references.batch_gradient(moved, mse, made.batch)
    with torch.no_grad():
        start = 0
        for p in moved.parameters():
            p.add_(0.1 * torch.from_numpy(h[start : start + p.numel()]).view_as(p))
            start += p.numel()
    return made._replace(shares=shares(moved, made.batch))


def backward_in_two_parts():
    def train(model, batch):
        losses = (model(batch[0]) - batch[1]).square().mean(1) / len(batch[0])
        losses[:3].sum().backward(retain_graph=True)
        losses[3:].sum().backward()

    return scene(mlp(), mse, train=train)


def backward_of_two_terms():
    def train(model, batch):
        out = model(batch[0])
        (0.5 * F.mse_loss(out[:, 0], batch[1][:, 0])).backward(retain_graph=True)
        (0.5 * F.mse_loss(out[:, 1], batch[1][:, 1])).backward()

    return scene(mlp(), mse, train=train)


def body_first_then_head():
    """The graph is cut in two, and each half has its own backward pass."""

    def train(model, batch):
        hidden = model[1](model[0](batch[0]))
        leaf = hidden.detach().requires_grad_()
        F.mse_loss(model[2](leaf), batch[1]).backward()
        hidden.backward(leaf.grad)

    return scene(mlp(), mse, train=train)


def reentrant_checkpoint():
    def loss(model, batch):
        hidden = model[0](batch[0])
        return F.mse_loss(checkpoint(nn.Sequential(*model[1:]), hidden, use_reentrant=True), batch[1])

    return scene(mlp(), mse, train=plain(loss))


class Affine(torch.autograd.Function):
    """A Linear layer whose gradients are written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0)


def gradients_by_hand():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(Affine.apply(x, m.weight, m.bias)))

    torch.manual_seed(1)
    return scene(net(forward, weight=normal(4, 3), bias=normal(4), head=nn.Linear(4, 2)).double(), mse)


def user_hook_on_an_activation():
    factors = torch.tensor([[1.0], [0.0], [-2.0], [3.0], [0.5], [1.0]], dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.body(x)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * factors[: len(grad)])
        return m.head(torch.tanh(out))

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    batch = data(6)[0]
    seen = []
    for i in range(6):

        def term(m, x, i=i):
            out = m.body(x)
            out.register_hook(lambda grad, i=i: grad * factors[i])
            return m.head(torch.tanh(out))

        alone = copy.deepcopy(model)
        alone.function = term
        value = mse(alone, (batch[0][i : i + 1], batch[1][i : i + 1]))
        seen.append(references.gradient(value, list(alone.parameters())).numpy())
    return Scene(model, batch, plain(mse), np.stack(seen))


def user_hook_on_a_parameter():
    model = mlp()
    model[0].weight.register_hook(lambda grad: 3 * grad)
    made = scene(mlp(), mse)
    made.shares[:, :12] *= 3
    return made._replace(model=model)


def optimizer_in_the_backward_pass():
    model = mlp()
    made = scene(mlp(), mse)

    @torch.no_grad()
    def descend(p):
        p.sub_(0.5 * p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(descend)
    return made._replace(model=model)


def inputs_that_are_overwritten():
    def train(model, batch):
        x = batch[0].clone()
        F.mse_loss(model(x), batch[1]).backward()
        x.zero_()

    return scene(mlp(), mse, train=train)


def gradients_that_are_assigned():
    def train(model, batch):
        parameters = list(model.parameters())
        for p, grad in zip(parameters, torch.autograd.grad(mse(model, batch), parameters), strict=True):
            p.grad = grad

    return scene(mlp(), mse, train=train)


def gradients_of_tasks_that_are_projected():
    def train(model, batch):
        parameters = list(model.parameters())
        out = model(batch[0])
        losses = [F.mse_loss(out[:, k], batch[1][:, k]) for k in range(2)]
        grads = [torch.autograd.grad(value, parameters, retain_graph=True) for value in losses]
        for p, a, b in zip(parameters, *grads, strict=True):
            p.grad = a - b * ((a * b).sum() / (b * b).sum().clamp_min(1e-30))

    made = scene(mlp(), mse, train=train)
    return made._replace(shares=np.full_like(made.shares, math.nan))


def gradients_of_some_parameters_only():
    def train(model, batch):
        mse(model, batch).backward(inputs=list(model[0].parameters()))

    made = scene(mlp(), mse, train=train)
    made.shares[:, 16:] = 0
    return made


def functional_call():
    def loss(model, batch):
        parameters = {name: p * 1.0 for name, p in model.named_parameters()}
        return F.mse_loss(torch.func.functional_call(model, parameters, (batch[0],)), batch[1])

    return scene(mlp(), loss)


def forward_without_hooks():
    return scene(mlp(), lambda model, batch: F.mse_loss(model.forward(batch[0]), batch[1]))


def copy_of_an_armed_model():
    def train(model, batch):
        teacher = copy.deepcopy(model)
        target = teacher(batch[0].flip(0))
        target.sum().backward()
        out = model(batch[0])
        (F.mse_loss(out, batch[1]) + 0.0 * target.detach().sum()).backward()

    return scene(mlp(), mse, train=train)


def table_before_the_examples():
    def loss(model, batch):
        return F.mse_loss(model(torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]], batch[0]), batch[1])

    def forward(m: Any, table: Tensor, x: Tensor) -> Tensor:
        return m.head(torch.tanh(x @ m.body(table).T))

    torch.manual_seed(1)
    return scene(net(forward, body=nn.Linear(3, 3), head=nn.Linear(4, 2)).double(), loss)


def number_before_the_examples():
    def loss(model, batch):
        return F.mse_loss(model(torch.tensor(0.5), batch[0]), batch[1])

    def forward(m: Any, temperature: Tensor, x: Tensor) -> Tensor:
        return m.body(x) * temperature

    return scene(net(forward, body=mlp()), loss)


def cached_parametrization():
    def loss(model, batch):
        with torch.nn.utils.parametrize.cached():
            return F.mse_loss(model(batch[0]) + model(-batch[0]), batch[1])

    torch.manual_seed(1)
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    return scene(model, loss)


def compiled_model():
    model = mlp()
    return scene(model, mse)._replace(model=torch.compile(model, backend="eager"))


def compiled_call():
    model = mlp()
    call = torch.compile(model, backend="eager")
    return scene(model, mse, train=lambda model, batch: mse(call, batch).backward())


NEVER_WRONG = [sparse_embedding, bag_of_offsets, embedding_of_bounded_norm, penalty_outside, decay_of_one_weight_inside]
NEVER_WRONG += [head_outside, penalty_of_the_slope, penalty_of_the_gradient, sharpness_aware, backward_in_two_parts]
NEVER_WRONG += [backward_of_two_terms, body_first_then_head, reentrant_checkpoint, gradients_by_hand]
NEVER_WRONG += [user_hook_on_an_activation, user_hook_on_a_parameter, optimizer_in_the_backward_pass]
NEVER_WRONG += [inputs_that_are_overwritten, gradients_that_are_assigned, gradients_of_tasks_that_are_projected]
NEVER_WRONG += [gradients_of_some_parameters_only, functional_call, forward_without_hooks, copy_of_an_armed_model]
NEVER_WRONG += [table_before_the_examples, number_before_the_examples, cached_parametrization]
NEVER_WRONG += [compiled_model, compiled_call]
