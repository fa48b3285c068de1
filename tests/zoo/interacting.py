"""Examples that interact: untied networks by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.problem import Parameters, Problem, case, classify, net, regress


def linear_rows(copies: Sequence[Parameters], rows: Sequence[Tensor], name: str) -> list[Tensor]:
    """A Linear layer in which row i uses copy i."""
    return [F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"]) for own, x in zip(copies, rows, strict=True)]


def batch_norm_rows(copies: Sequence[Parameters], rows: Sequence[Tensor], name: str) -> list[Tensor]:
    """A BatchNorm layer in train mode: statistics over all rows together, row i scaled and shifted by copy i."""
    everything = torch.cat(list(rows))
    axes = [axis for axis in range(everything.ndim) if axis != 1]
    mean = everything.mean(axes, keepdim=True)
    variance = (everything - mean).square().mean(axes, keepdim=True)
    shape = mean.shape
    result = []
    for own, x in zip(copies, rows, strict=True):
        scaled = (x - mean) / torch.sqrt(variance + 1e-5) * own[f"{name}.weight"].view(shape)
        result.append(scaled + own[f"{name}.bias"].view(shape))
    return result


def split(x: Tensor) -> list[Tensor]:
    return [x[i : i + 1] for i in range(len(x))]


@case(interacting=True)
def batch_norm_mlp() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = batch_norm_rows(copies, linear_rows(copies, split(batch[0]), "0"), "1")
        return F.cross_entropy(torch.cat(linear_rows(copies, [torch.tanh(x) for x in rows], "3")), batch[1])

    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Problem(model, classify, (torch.randn(5, 3), torch.randint(3, (5,))), 5, untied=untied)


@case(interacting=True, kinked=True)
def batch_norm_cnn() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        pairs = zip(copies, split(batch[0]), strict=True)
        rows = [F.conv2d(x, own["0.weight"], stride=2, padding=1) for own, x in pairs]
        rows = [F.relu(x) for x in batch_norm_rows(copies, rows, "1")]
        pairs = zip(copies, rows, strict=True)
        rows = [F.conv2d(x, own["3.weight"], own["3.bias"], groups=2) for own, x in pairs]
        rows = [F.relu(x).flatten(1) for x in batch_norm_rows(copies, rows, "4")]
        return F.cross_entropy(torch.cat(linear_rows(copies, rows, "7")), batch[1])

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return Problem(model, classify, (torch.randn(4, 2, 5, 5), torch.randint(3, (4,))), 4, untied=untied)


@case(interacting=True, values=True)
def batch_norm_over_time_summed() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().flatten(1).sum(1)

    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = batch_norm_rows(copies, linear_rows(copies, split(batch[0]), "body"), "norm")
        rows = linear_rows(copies, [torch.tanh(x) for x in rows], "head")
        return (torch.cat(rows) - batch[1]).square().sum()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.norm(m.body(x))))

    model = net(forward, body=nn.Linear(4, 4), norm=nn.BatchNorm1d(4, momentum=None), head=nn.Linear(4, 2))
    batch = (torch.randn(4, 4, 4), torch.randn(4, 4, 2))
    return Problem(model, loss, batch, 4, reduction="sum", untied=untied)


@case(interacting=True)
def batch_norm_between_shared_layers() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        x = split(batch[0])
        for _ in range(2):
            moved = batch_norm_rows(copies, linear_rows(copies, x, "shared"), "norm")
            x = [old + torch.tanh(new) for old, new in zip(x, moved, strict=True)]
        return F.cross_entropy(torch.cat(linear_rows(copies, x, "head")), batch[1])

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + torch.tanh(m.norm(m.shared(x)))
        return m.head(x + torch.tanh(m.norm(m.shared(x))))

    model = net(forward, shared=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 3))
    return Problem(model, classify, (torch.randn(6, 4), torch.randint(3, (6,))), 6, untied=untied)


@case(interacting=True)
def contrastive() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        left, right = (F.normalize(model(x), dim=-1) for x in batch)
        return F.cross_entropy(left @ right.T / 0.3, torch.arange(len(left)))

    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        views = []
        for x in batch:
            hidden = [torch.tanh(row) for row in linear_rows(copies, split(x), "0")]
            views.append(F.normalize(torch.cat(linear_rows(copies, hidden, "2")), dim=-1))
        return F.cross_entropy(views[0] @ views[1].T / 0.3, torch.arange(len(views[0])))

    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    return Problem(model, loss, (torch.randn(4, 3), torch.randn(4, 3)), 4, untied=untied)


@case(interacting=True)
def batch_norm_without_running_statistics() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        pairs = zip(copies, split(batch[0]), strict=True)
        rows = [F.conv1d(x, own["0.weight"], own["0.bias"]) for own, x in pairs]
        rows = [torch.tanh(x).flatten(1) for x in batch_norm_rows(copies, rows, "1")]
        return F.cross_entropy(torch.cat(linear_rows(copies, rows, "4")), batch[1])

    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    return Problem(model, classify, (torch.randn(4, 2, 4), torch.randint(3, (4,))), 4, untied=untied)


@case(interacting=True)
def batch_norm_without_weights_after_frozen_ones() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = torch.cat(linear_rows(copies, split(batch[0]), "0"))
        rows = (rows - rows.mean(0)) / torch.sqrt((rows - rows.mean(0)).square().mean(0) + 1e-5)
        hidden = linear_rows(copies, split(torch.tanh(rows)), "3")
        return F.cross_entropy(torch.cat(batch_norm_rows(copies, hidden, "4")), batch[1])

    layers = (nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    model = nn.Sequential(*layers)
    model[4].weight.requires_grad_(False)
    return Problem(model, classify, (torch.randn(5, 3), torch.randint(3, (5,))), 5, untied=untied)


@case(interacting=True)
def centred_over_the_batch() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        rows = torch.tanh(torch.cat(linear_rows(copies, split(batch[0]), "body")))
        return F.mse_loss(torch.cat(linear_rows(copies, split(rows - rows.mean(0)), "head")), batch[1])

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.body(x))
        return m.head(x - x.mean(0))

    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    return Problem(model, regress, (torch.randn(4, 3), torch.randn(4, 2)), 4, untied=untied)


@case(interacting=True, kinked=True)
def embedding_scaled_by_frequency() -> Problem:
    def untied(copies: Sequence[Parameters], batch: Any) -> Tensor:
        x, tokens, y = batch
        counts = tokens.flatten().bincount(minlength=5)
        rows = []
        for i, own in enumerate(copies):
            found = F.embedding(tokens[i : i + 1], own["embed.weight"])
            scaled = found / counts[tokens[i : i + 1]].unsqueeze(-1)
            rows.append(torch.tanh((scaled + (found - scaled).detach()).sum(1) + x[i : i + 1]))
        return F.cross_entropy(torch.cat(linear_rows(copies, rows, "head")), y)

    def forward(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
        return m.head(torch.tanh(m.embed(tokens).sum(1) + x))

    model = net(forward, embed=nn.Embedding(5, 3, scale_grad_by_freq=True), head=nn.Linear(3, 3))
    tokens = torch.tensor([[1, 1, 1, 2], [1, 3, 1, 1], [2, 2, 1, 4], [1, 0, 0, 1]])
    return Problem(model, classify, (torch.randn(4, 3), tokens, torch.randint(3, (4,))), 4, untied=untied)
