"""Deliberately awkward small models, each with a loss, a batch and the truth about each example's own term.

Examples lie along axis 0 of every tensor in a batch (a model may transpose inside). Everything is drawn in float32 and
then converted, so that a case is the same problem in every dtype. Example counts often equal another dimension, so that
confusing the axes shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm as with_weight_norm
from torch.utils.checkpoint import checkpoint

Loss = Callable[[nn.Module, Any], Tensor]
ExampleLoss = Callable[[nn.Module, Any, int], Tensor]
Parameters = dict[str, Tensor]
Untied = Callable[[Sequence[Parameters], Any], Tensor]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One model with its loss and batch.

    `example_loss(model, batch, i)` is example i's own term, run on that example alone: the terms sum to the batch loss.
    Where examples interact it is None and `untied(copies, batch)` is the batch loss with one set of parameters (by
    name) per example. `x` of metrics.md is at `input_path` in the batch or, for integer inputs, is the output of the
    submodule named `input_module`.
    """

    model: nn.Module
    loss: Loss
    batch: Any
    size: int
    reduction: str = "mean"
    example_loss: ExampleLoss | None = None
    untied: Untied | None = None
    input_path: Path | None = (0,)
    input_module: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A named, reproducible problem: `make(seed, dtype)`; the global RNG state is left as found.

    `integer`: x is an embedding's output; `interacting`: examples meet inside the model or the loss; `values`: the loss
    returns (B,); `kinked`: piecewise linear somewhere, so finite differences and Hessians may disagree;
    `once_differentiable`: torch 2.13 has no second derivative of one of its operations, or silently a wrong one.
    """

    name: str
    make: Callable[..., Problem]
    integer: bool = False
    interacting: bool = False
    values: bool = False
    kinked: bool = False
    once_differentiable: bool = False


CASES: list[Case] = []
DROPOUT_CASES: list[Case] = []


def case(*, into: list[Case] = CASES, jitter: float = 0.1, **flags: bool) -> Callable[[Callable[[], Problem]], Case]:
    """Register a problem; `jitter` moves every parameter off its initial value, so that no scale is 1 and no bias 0."""

    def register(build: Callable[[], Problem]) -> Case:
        def make(seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                problem = build()
                with torch.no_grad():
                    for parameter in problem.model.parameters():
                        parameter.add_(jitter * torch.randn(parameter.shape))
            batch = _map(problem.batch, lambda t: t.to(dtype) if t.is_floating_point() else t)
            return dataclasses.replace(problem, model=problem.model.to(dtype), batch=batch)

        made = Case(build.__name__, make, **flags)
        into.append(made)
        return made

    return register


def _map(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a nested batch; other leaves stay."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, function) for value in batch)
    if dataclasses.is_dataclass(batch):
        fields = {field.name: _map(getattr(batch, field.name), function) for field in dataclasses.fields(batch)}
        return type(batch)(**fields)
    return batch


def take(batch: Any, i: int) -> Any:
    """The batch of example i alone."""
    return _map(batch, lambda t: t[i : i + 1])


def get_input(batch: Any, path: Path) -> Tensor:
    """The tensor at a path of indices, keys and attribute names."""
    for key in path:
        batch = getattr(batch, key) if isinstance(key, str) and not isinstance(batch, dict) else batch[key]
    return batch


def set_input(batch: Any, path: Path, value: Tensor) -> Any:
    """A copy of the batch with another tensor at the path."""
    old = get_input(batch, path)
    return _map(batch, lambda t: value if t is old else t)


def averaged(loss: Loss) -> ExampleLoss:
    """Own terms of a loss that is a mean over examples."""
    return lambda model, batch, i: loss(model, take(batch, i)).sum() / _count(batch)


def summed(loss: Loss) -> ExampleLoss:
    """Own terms of a loss that is a sum over examples."""
    return lambda model, batch, i: loss(model, take(batch, i)).sum()


def _count(batch: Any) -> int:
    sizes: list[int] = []
    _map(batch, lambda t: sizes.append(len(t)) or t)
    return sizes[0]


class Net(nn.Module):
    """Named parts (modules, parameters, buffers) and a forward function `forward(net, *inputs)`."""

    def __init__(self, function: Callable[..., Tensor], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def net(function: Callable[..., Tensor], **parts: Any) -> Net:
    """A module without a class of its own."""
    return Net(function, parts)


def normal(*shape: int) -> nn.Parameter:
    """A standard normal parameter over the square root of its last dimension."""
    return nn.Parameter(torch.randn(*shape) / (shape[-1] if shape else 1) ** 0.5)


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy; the batch is `(*inputs, y)`."""
    *inputs, y = batch
    return F.cross_entropy(model(*inputs), y)


def regress(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error over examples and outputs; the batch is `(*inputs, y)`."""
    *inputs, y = batch
    return F.mse_loss(model(*inputs), y)


def classifier(model: nn.Module, x: Tensor, classes: int, **more: Any) -> Problem:
    """A problem with one input and mean cross entropy."""
    return averaged_problem(model, classify, (x, torch.randint(classes, (len(x),))), **more)


def averaged_problem(model: nn.Module, loss: Loss, batch: Any, **more: Any) -> Problem:
    """A problem whose loss is a mean over examples that do not interact."""
    return Problem(model, loss, batch, _count(batch), example_loss=averaged(loss), **more)


# --- plain networks ------------------------------------------------------------------------------------------------


@case()
def mlp_tanh() -> Problem:
    return classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4), 3)


@case(kinked=True)
def mlp_relu_inplace() -> Problem:
    layers = (nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    return classifier(nn.Sequential(*layers), torch.randn(8, 5), 4)


@case(kinked=True)
def prelu() -> Problem:
    layers = (nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 3))
    return classifier(nn.Sequential(*layers), torch.randn(6, 4), 3)


@case()
def regression() -> Problem:
    model = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 2))
    return averaged_problem(model, regress, (torch.randn(5, 3), torch.randn(5, 2)))


@case()
def outputs_as_many_as_examples() -> Problem:
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return classifier(nn.Sequential(*layers), torch.randn(4, 4), 4)


@case(jitter=0.0)
def zero_initialised_head() -> Problem:
    head = nn.Linear(6, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), head), torch.randn(7, 4), 3)


@case()
def bilinear() -> Problem:
    model = net(
        lambda m, a, b: m.head(torch.tanh(m.mix(a, b))), mix=nn.Bilinear(3, 4, 5), head=nn.Linear(5, 2, bias=False)
    )
    return averaged_problem(model, classify, (torch.randn(4, 3), torch.randn(4, 4), torch.randint(2, (4,))))


# --- convolutions and normalisation --------------------------------------------------------------------------------


@case(kinked=True)
def cnn_group_norm() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 8, (3, 2), padding=(1, 0), groups=2, bias=False),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return classifier(model, torch.randn(4, 2, 6, 5), 4)


@case()
def conv1d_dilated() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, dilation=2, padding=2),
        nn.Tanh(),
        nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular", groups=4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    return classifier(model, torch.randn(4, 3, 5), 3)


@case()
def conv_transpose() -> Problem:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1)
    )
    return averaged_problem(model, regress, (torch.randn(3, 3, 3, 2), torch.randn(3, 2, 6, 4)))


@case()
def conv_over_time_permuted() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.conv(x.permute(0, 2, 1))).permute(0, 2, 1)).mean(1)

    model = net(forward, conv=nn.Conv1d(4, 6, 3, padding=1), head=nn.Linear(6, 3))
    return classifier(model, torch.randn(5, 5, 4), 3)


@case()
def residual_instance_norm() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.conv(torch.tanh(m.norm(x)))
        return m.head(torch.tanh(m.last_norm(x)).mean((2, 3)))

    norm = nn.InstanceNorm2d(3, affine=True)
    parts = {"conv": nn.Conv2d(3, 3, 3, padding=1), "last_norm": nn.InstanceNorm2d(3, affine=True)}
    return classifier(net(forward, norm=norm, head=nn.Linear(3, 2), **parts), torch.randn(3, 3, 4, 4), 2)


@case()
def batch_norm_eval() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)
    )
    for norm in (model[1], model[5]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return classifier(model.eval(), torch.randn(4, 1, 4, 4), 5)


@case()
def rms_norm_functional() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.body(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * m.gain
        return m.head(m.norm(torch.sigmoid(x).mean(1)))

    parts = {"body": nn.Linear(3, 4), "gain": normal(4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 4)}
    return classifier(net(forward, **parts), torch.randn(4, 4, 3), 4)


# --- attention, recurrence, tokens ---------------------------------------------------------------------------------


@case(kinked=True)
def transformer_encoder() -> Problem:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 3))
    return classifier(model, torch.randn(4, 3, 4), 3)


@case()
def transformer_time_first() -> Problem:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", norm_first=True, batch_first=False)
    model = net(lambda m, x: m.head(m.layer(x.transpose(0, 1))).mean(0), layer=layer, head=nn.Linear(4, 2))
    return classifier(model, torch.randn(5, 5, 4), 2)


@case()
def multihead_cross_attention() -> Problem:
    def forward(m: Any, query: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        mixed, _ = m.attention(query, memory, memory, key_padding_mask=padding)
        return m.head(mixed).mean(1)

    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True, batch_first=True)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2])
    batch = (torch.randn(3, 2, 4), torch.randn(3, 4, 3), padding, torch.randint(2, (3,)))
    return averaged_problem(net(forward, attention=attention, head=nn.Linear(4, 2)), classify, batch)


@case()
def self_attention_time_first() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.body(x).transpose(0, 1)
        return m.head(m.attention(x, x, x)[0][-1])

    parts = {"body": nn.Linear(3, 4), "attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 4)}
    return classifier(net(forward, **parts), torch.randn(4, 4, 3), 4)


@case()
def cls_token_and_positions() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.cls.expand(len(x), -1, -1), m.embed(x)], dim=1) + m.positions
        scores = torch.einsum("btd,bsd->bts", m.query(x), x).softmax(-1)
        return m.head((scores @ x)[:, 0])

    parts = {"embed": nn.Linear(3, 4), "query": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 3)}
    return classifier(net(forward, cls=normal(1, 1, 4), positions=normal(5, 4), **parts), torch.randn(5, 4, 3), 3)


@case()
def lstm_bidirectional() -> Problem:
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    model = net(lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=lstm, head=nn.Linear(8, 3))
    return classifier(model, torch.randn(4, 5, 3), 3)


@case()
def gru_time_first_learned_state() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, _ = m.gru(x.transpose(0, 1), m.start.expand(1, len(x), 4).contiguous())
        return m.head(out).sum(0)

    model = net(forward, gru=nn.GRU(3, 4), start=normal(1, 1, 4), head=nn.Linear(4, 2))
    return classifier(model, torch.randn(4, 4, 3), 2)


@case(integer=True)
def embedding_padding() -> Problem:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        kept = (tokens != 0).to(m.head.weight.dtype).unsqueeze(-1)
        return m.head(torch.tanh((m.embed(tokens) * kept).sum(1) / kept.sum(1)))

    model = net(forward, embed=nn.Embedding(6, 4, padding_idx=0), head=nn.Linear(4, 3))
    tokens = torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0], [4, 5, 1, 2], [2, 2, 2, 0]])
    return classifier(model, tokens, 3, input_path=None, input_module="embed")


@case(integer=True)
def embedding_regression() -> Problem:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        return m.head(torch.tanh(m.embed(tokens)).flatten(1))

    model = net(forward, embed=nn.Embedding(5, 3), head=nn.Linear(9, 2))
    batch = (torch.randint(5, (5, 3)), torch.randn(5, 2))
    return averaged_problem(model, regress, batch, input_path=None, input_module="embed")


@case(integer=True, once_differentiable=True)
def embedding_bag() -> Problem:
    model = net(lambda m, t: m.head(torch.tanh(m.bag(t))), bag=nn.EmbeddingBag(7, 4), head=nn.Linear(4, 3))
    return classifier(model, torch.randint(7, (4, 4)), 3, input_path=None, input_module="bag")


@case(integer=True)
def indexed_parameter() -> Problem:
    def forward(m: Any, users: Tensor, items: Tensor) -> Tensor:
        return (m.users[users] * m.items(items)).sum(-1) + m.bias[users]

    model = net(forward, users=normal(4, 3), items=nn.Embedding(6, 3), bias=normal(4))
    batch = (torch.tensor([0, 1, 1, 3, 0, 1]), torch.randint(6, (6,)), torch.randn(6))
    return averaged_problem(model, regress, batch, input_path=None, input_module="items")


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)


def next_token_term(model: nn.Module, tokens: Tensor, i: int) -> Tensor:
    own = tokens[i : i + 1]
    logits = model(own[:, :-1])[0]
    return F.cross_entropy(logits, own[0, 1:], ignore_index=0, reduction="sum") / (tokens[:, 1:] != 0).sum()


@case(integer=True)
def tied_language_model() -> Problem:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        hidden, _ = m.rnn(m.embed(tokens) + m.positions.weight[: tokens.shape[1]])
        return F.linear(hidden, m.embed.weight, m.bias)

    parts = {"embed": nn.Embedding(7, 5, padding_idx=0), "positions": nn.Embedding(6, 5), "bias": normal(7)}
    tokens = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 4, 5, 6, 1, 2], [2, 1, 0, 0, 0, 0], [6, 5, 4, 3, 0, 0]])
    model = net(forward, rnn=nn.RNN(5, 5, batch_first=True), **parts)
    more = {"example_loss": next_token_term, "input_path": None, "input_module": "embed"}
    return Problem(model, next_token, tokens, 4, **more)


@case(integer=True)
def tied_output_module() -> Problem:
    model = net(lambda m, t: m.head(torch.tanh(m.body(m.embed(t)))), embed=nn.Embedding(6, 4), body=nn.Linear(4, 4))
    model.head = nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    tokens = torch.tensor([[1, 2, 3, 0, 0], [4, 4, 5, 2, 1], [2, 1, 5, 5, 0]])
    more = {"example_loss": next_token_term, "input_path": None, "input_module": "embed"}
    return Problem(model, next_token, tokens, 3, **more)


def masked_tokens(model: nn.Module, batch: Any) -> Tensor:
    x, mask, y = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    return (losses * mask).sum() / mask.sum()


@case()
def token_mask() -> Problem:
    def term(model: nn.Module, batch: Any, i: int) -> Tensor:
        x, mask, y = take(batch, i)
        losses = F.cross_entropy(model(x)[0], y[0], reduction="none")
        return losses[mask[0]].sum() / batch[1].sum()

    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    batch = (torch.randn(4, 4, 4), mask, torch.randint(4, (4, 4)))
    return Problem(model, masked_tokens, batch, 4, example_loss=term)


# --- parameters used in unusual ways -------------------------------------------------------------------------------


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


# --- batches and losses --------------------------------------------------------------------------------------------


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


# --- interacting examples: untied networks by hand -----------------------------------------------------------------


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


# --- dropout: no independent truth, for tests of determinism -------------------------------------------------------

dropout_case = functools.partial(case, into=DROPOUT_CASES)


@dropout_case()
def dropout_mlp() -> Problem:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return dataclasses.replace(classifier(model, torch.randn(6, 4), 3), example_loss=None)


@dropout_case()
def dropout_transformer() -> Problem:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, activation="gelu", batch_first=True)
    model = net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 3))
    return dataclasses.replace(classifier(model, torch.randn(4, 5, 4), 3), example_loss=None)


FLAGS = ("integer", "interacting", "values", "kinked", "once_differentiable")


def select(**flags: bool) -> list[Case]:
    """The cases with exactly these flags, e.g. `select(interacting=False, kinked=False)`."""
    return [each for each in CASES if all(getattr(each, flag) == wanted for flag, wanted in flags.items())]
