"""Batches and losses."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.problem import Problem, averaged, averaged_problem, case, classifier, classify, net, normal, summed, take


@case()
def dict_batch() -> Problem:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return batch["scale"] * F.cross_entropy(model(batch["group"], batch["features"]), batch["label"])

    def forward(m: Any, group: Tensor, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.body(x) + m.groups(group)))

    model = net(forward, groups=nn.Embedding(3, 5), body=nn.Linear(4, 5), head=nn.Linear(5, 3))
    batch = {"label": torch.randint(3, (5,)), "group": torch.randint(3, (5,)), "features": torch.randn(5, 4)}
    return averaged_problem(model, loss, batch | {"scale": 0.5, "split": "train"}, input_path=("features",))


@case()
def nested_tuple_batch() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (group, (a, b)), y = batch
        return F.cross_entropy(model(group, a, b), y)

    def forward(m: Any, group: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return m.head(torch.tanh(m.left(a) + m.right(b) + m.groups(group)))

    model = net(forward, groups=nn.Embedding(3, 4), left=nn.Linear(3, 4), right=nn.Linear(2, 4), head=nn.Linear(4, 3))
    batch = ((torch.randint(3, (3,)), (torch.randn(3, 3), torch.randn(3, 2))), torch.randint(3, (3,)))
    return averaged_problem(model, loss, batch, input_path=(0, 1, 0))


@dataclasses.dataclass
class Samples:
    """A batch that is a dataclass."""

    target: Tensor
    image: Tensor
    source: str = "synthetic"


@case()
def dataclass_batch() -> Problem:
    def loss(model: nn.Module, batch: Samples) -> Tensor:
        return F.cross_entropy(model(batch.image), batch.target)

    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    batch = Samples(torch.randint(3, (4,)), torch.randn(4, 1, 3, 3))
    return averaged_problem(model, loss, batch, input_path=("image",))


class Pair(NamedTuple):
    """A batch that is a named tuple."""

    left: Tensor
    right: Tensor
    distance: Tensor


@case()
def named_tuple_batch() -> Problem:
    def loss(model: nn.Module, batch: Pair) -> Tensor:
        gap = (model(batch.left) - model(batch.right)).square().sum(-1)
        return (gap - batch.distance).square().mean()

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return averaged_problem(
        model, loss, Pair(torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)), input_path=("left",)
    )


@case()
def sum_loss() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    batch = (torch.randn(5, 4), torch.randint(3, (5,)))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Problem(model, loss, batch, 5, example_loss=summed(loss))


def values(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@case(values=True)
def values_mean() -> Problem:
    batch = (torch.randn(6, 4), torch.randint(3, (6,)))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(model, values, batch, 6, example_loss=averaged(values))


@case(values=True)
def values_sum() -> Problem:
    batch = (torch.randn(3, 4), torch.randint(3, (3,)))
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return Problem(model, values, batch, 3, reduction="sum", example_loss=summed(values))


@case()
def label_smoothing() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    batch = (torch.randn(9, 3), torch.randint(4, (9,)))
    return averaged_problem(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), loss, batch)


@case()
def penalty() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return classify(model, batch) + 0.05 * sum(p.square().sum() for p in model.parameters())

    batch = (torch.randn(4, 4), torch.randint(3, (4,)))
    return averaged_problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), loss, batch)


@case()
def pair_of_examples() -> Problem:
    return classifier(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(2, 2), 2)


@case()
def smoothed_tokens_with_some_ignored() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], ignore_index=-1, label_smoothing=0.2)

    def term(model: nn.Module, batch: Any, i: int) -> Tensor:
        x, y = take(batch, i)
        options = {"ignore_index": -1, "label_smoothing": 0.2, "reduction": "sum"}
        return F.cross_entropy(model(x)[0], y[0], **options) / (batch[1] >= 0).sum()

    labels = torch.tensor([[0, 1, 2, 3], [3, -1, -1, -1], [2, 2, -1, 0], [-1, 1, 3, -1]])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    return Problem(model, loss, (torch.randn(4, 4, 3), labels), 4, example_loss=term)


@case()
def sum_over_tokens() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    return Problem(model, loss, (torch.randn(4, 3, 4), torch.randint(3, (4, 4))), 4, example_loss=summed(loss))


@case()
def loss_inside_the_model() -> Problem:
    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = m.head(torch.tanh(m.body(x)))
        return {"logits": logits, "loss": F.cross_entropy(logits, y)}

    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3))
    batch = (torch.randn(4, 3), torch.randint(3, (4,)))
    return averaged_problem(model, lambda model, batch: model(*batch)["loss"], batch)


@case()
def called_by_its_parts() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        code = torch.tanh(model.encoder(batch))
        return F.mse_loss(model.decoder(code), batch) + 0.1 * code.square().mean()

    parts = {"encoder": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "decoder": nn.Linear(2, 4)}
    return averaged_problem(net(None, **parts), loss, torch.randn(5, 4), input_path=())


@case()
def parameters_used_in_the_loss() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        hidden = torch.tanh(model.body(batch[0]))
        return F.cross_entropy(F.linear(hidden, model.last) * model.scale, batch[1])

    model = net(None, body=nn.Linear(3, 4), last=normal(3, 4), scale=normal(3))
    return averaged_problem(model, loss, (torch.randn(4, 3), torch.randint(3, (4,))))


@case()
def spread_that_is_a_parameter() -> Problem:
    def forward(m: Any, x: Tensor, action: Tensor) -> Tensor:
        policy = torch.distributions.Normal(m.head(torch.tanh(m.body(x))), m.spread.exp())
        return policy.log_prob(action).sum(-1)

    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2), spread=normal(2))
    batch = (torch.randn(4, 3), torch.randn(4, 2))
    return averaged_problem(model, lambda model, batch: -model(*batch).mean(), batch)
