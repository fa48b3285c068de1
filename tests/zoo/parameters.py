"""Parameters used in unusual ways, and in algebra."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm as with_weight_norm
from torch.utils.checkpoint import checkpoint

from tests.zoo.problem import Problem, averaged_problem, case, classifier, classify, net, normal


@case()
def module_used_twice() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.shared(torch.tanh(m.shared(x)))))

    return classifier(net(forward, shared=nn.Linear(4, 4), head=nn.Linear(4, 3)), torch.randn(4, 4), 3)


@case()
def module_used_three_times() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        pooled = torch.tanh(m.shared(x)).mean(1)
        return m.head(m.shared(torch.tanh(m.shared(pooled))))

    return classifier(net(forward, shared=nn.Linear(4, 4), head=nn.Linear(4, 3)), torch.randn(5, 4, 4), 3)


@case()
def functional_parameters() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, m.first, m.bias) * m.scale)
        x = torch.tanh(x @ m.second)
        return torch.einsum("bi,oi->bo", x, m.third) / m.temperature

    matrices = {"first": normal(5, 4), "second": normal(5, 5), "third": normal(3, 5)}
    vectors = {"bias": normal(5), "scale": normal(5), "temperature": nn.Parameter(torch.tensor(1.5))}
    return classifier(net(forward, **matrices, **vectors), torch.randn(5, 4), 3)


@case()
def parameter_times_fixed_mask() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(F.linear(x, m.weight * m.kept)))

    model = net(forward, weight=normal(5, 4), kept=(torch.arange(20) % 3 > 0).view(5, 4), head=nn.Linear(5, 3))
    return classifier(model, torch.randn(5, 4), 3)


@case(once_differentiable=True)
def weight_norm() -> Problem:
    layers = (with_weight_norm(nn.Linear(4, 5)), nn.Tanh(), with_weight_norm(nn.Linear(5, 3)))
    return classifier(nn.Sequential(*layers), torch.randn(6, 4), 3)


@case()
def frozen_parameters() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    for frozen in (model[0].weight, model[2].weight, model[2].bias, model[4].weight):
        frozen.requires_grad_(False)
    return classifier(model, torch.randn(5, 4), 3)


@case()
def unused_parameters() -> Problem:
    parts = {"never": nn.Linear(3, 2), "body": nn.Linear(4, 5), "lost": normal(3), "head": nn.Linear(5, 3)}
    return classifier(net(lambda m, x: m.head(torch.tanh(m.body(x))), **parts), torch.randn(4, 4), 3)


@case()
def flatten_tokens() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        size, steps, width = x.shape
        return m.head(torch.tanh(m.body(x.reshape(size * steps, width)))).view(size, steps, -1).mean(1)

    return classifier(net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3)), torch.randn(4, 4, 3), 3)


@case()
def flatten_tokens_time_first() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        size, steps, width = x.shape
        flat = x.transpose(0, 1).reshape(steps * size, width)
        return m.head(torch.tanh(m.body(flat))).view(steps, size, -1).mean(0)

    return classifier(net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3)), torch.randn(4, 4, 3), 3)


@case()
def two_views_concatenated() -> Problem:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        rows = m.head(torch.tanh(m.body(torch.cat([a, b]))))
        return rows[: len(a)] + rows[len(a) :].square()

    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3))
    return averaged_problem(model, classify, (torch.randn(4, 3), torch.randn(4, 3), torch.randint(3, (4,))))


@case()
def checkpointed() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.block, x, use_reentrant=False))

    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    return classifier(net(forward, block=block, head=nn.Linear(5, 3)), torch.randn(5, 4), 3)


@case()
def einsum_forms() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(torch.einsum("bti,oi->bto", x, m.left))
        x = torch.tanh(torch.einsum("io, ...i -> ...o", m.right, x))
        heads = torch.einsum("bthd,hde->bthe", x.unflatten(-1, (2, 2)), m.heads).flatten(2)
        mixed = torch.einsum("s t, b s d -> b t d", m.time, heads)
        x = torch.tanh(torch.einsum("btd,d", mixed, m.vector))
        x = torch.einsum("bi,bj,oij->bo", x, x, m.three)
        return torch.einsum(x, [0, 1], m.numbered, [1, 2], [0, 2])

    matrices = {"left": normal(4, 3), "right": normal(4, 4), "heads": normal(2, 2, 2), "time": normal(3, 3)}
    more = {"vector": normal(4), "three": normal(3, 3, 3), "numbered": normal(3, 3)}
    return classifier(net(forward, **matrices, **more), torch.randn(3, 3, 3), 3)


@case()
def examples_last() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(torch.einsum("bi,oi->ob", x, m.first))
        x = torch.tanh(torch.matmul(m.second, x) + m.bias[:, None])
        return F.linear(x.T, m.third)

    parts = {"first": normal(4, 4), "second": normal(4, 4), "bias": normal(4), "third": normal(4, 4)}
    return classifier(net(forward, **parts), torch.randn(4, 4), 4)


@case()
def matmul_left_and_right() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.mix @ x) @ m.right
        x = torch.tanh(torch.matmul(x, m.right.t()) + x.matmul(m.vector).unsqueeze(-1))
        rows = torch.tanh((m.column @ x.flatten(1).unsqueeze(-1)).squeeze(-1))
        return torch.tensordot(rows, m.tensor, dims=([1], [2])).sum(1) + torch.inner(rows, m.inner)

    matrices = {"mix": normal(3, 3), "right": normal(3, 3), "vector": normal(3), "column": normal(4, 9)}
    return classifier(net(forward, **matrices, tensor=normal(2, 3, 4), inner=normal(3, 4)), torch.randn(3, 3, 3), 3)


@case()
def batched_products() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        size = len(x)
        x = torch.tanh(torch.bmm(x, m.right.expand(size, -1, -1)))
        x = torch.tanh(torch.bmm(m.left.unsqueeze(0).expand(size, 3, 3), x))
        x = torch.baddbmm(m.bias.expand(size, 3, 3), x, m.last.repeat(size, 1, 1), beta=0.5, alpha=2.0)
        return torch.baddbmm(x, x, x, alpha=0.1).sum(1)

    parts = {"right": normal(3, 3), "left": normal(3, 3), "bias": normal(1, 3), "last": normal(3, 3)}
    return classifier(net(forward, **parts), torch.randn(3, 3, 3), 3)


@case()
def add_products() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2.0))
        score = torch.addmv(m.scalar, x, m.vector) + torch.mv(x, m.vector)
        return x.mm(m.weight.t()).add(score[:, None] * m.direction)

    parts = {"bias": normal(4), "weight": normal(4, 4), "vector": normal(4), "direction": normal(1, 4)}
    return classifier(net(forward, scalar=normal(1), **parts), torch.randn(4, 4), 4)


@case()
def elementwise_forms() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.sigmoid(m.body(x)) + 0.5
        x = x * m.times - m.minus
        x = torch.sub(m.minuend, x, alpha=0.5).square() + 0.1
        x = m.numerator / x + x / m.denominator
        x = (x.square() + 0.1) ** m.power + torch.pow(m.base.square() + 1, x * 0.1)
        x = torch.addcmul(m.minus, x, m.times, value=0.5) + torch.lerp(x, m.numerator, m.minuend.sigmoid())
        return m.head(torch.where(x > m.times.detach(), x, m.other))

    vectors = {name: normal(1, 4) for name in ("times", "minuend", "numerator", "other")}
    vectors |= {name: normal(4) for name in ("minus", "power", "base")}
    model = net(
        forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3), denominator=nn.Parameter(torch.full((4,), 2.0)), **vectors
    )
    return classifier(model, torch.randn(4, 3), 3)


@case()
def broadcast_parameters() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * m.over_time[:, None] + m.everywhere
        x = torch.tanh(x * m.channels + m.moments.unsqueeze(-1) + m.whole)
        return m.head(x.transpose(0, 1) * m.time_first).sum(0)

    shapes = {"over_time": (4,), "everywhere": (1, 4, 4), "channels": (1, 1, 4), "moments": (4,), "whole": (4, 4)}
    parts = {name: normal(*shape) for name, shape in shapes.items()}
    return classifier(net(forward, **parts, time_first=normal(4, 1, 4), head=nn.Linear(4, 3)), torch.randn(4, 4, 4), 3)


@case()
def parameters_of_no_dimension() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x) * m.gain + m.offset
        x = x + m.gate * torch.tanh(m.second(x))
        return torch.tanh(x) / F.softplus(m.temperature) * m.log_scale.exp() - m.offset * x.mean(1, keepdim=True)

    scalars = {name: normal() for name in ("gain", "offset", "gate", "temperature", "log_scale")}
    return classifier(net(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 4), **scalars), torch.randn(4, 3), 4)


@case()
def parameter_in_products_and_elementwise() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x @ m.weight + x * m.weight.diagonal() + m.weight[0])
        x = torch.tanh(F.linear(x, m.weight, m.weight.mean(0)) * m.weight.norm())
        return m.head(x + (x[:, :, None] * m.weight).sum(1))

    return classifier(net(forward, weight=normal(4, 4), head=nn.Linear(4, 3)), torch.randn(4, 4), 3)


@case()
def bilinear_over_time() -> Problem:
    model = net(lambda m, a, b: m.mix(torch.tanh(m.body(a)), b).mean(1), body=nn.Linear(2, 3), mix=nn.Bilinear(3, 4, 3))
    return averaged_problem(model, classify, (torch.randn(3, 3, 2), torch.randn(3, 3, 4), torch.randint(3, (3,))))


@case()
def linear_over_images() -> Problem:
    layers = (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    return classifier(nn.Sequential(*layers), torch.randn(3, 3, 3, 3), 3)
