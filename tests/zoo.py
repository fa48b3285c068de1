"""Deliberately awkward small models, each with a loss, a batch and the truth about each example's own term.

Examples lie along axis 0 of every tensor in a batch (a model may transpose inside). Everything is drawn in float32 and
then converted, so that a case is the same problem in every dtype. Example counts often equal another dimension, so that
confusing the axes shows.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.nn.utils.parametrizations import weight_norm as with_weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import pack_padded_sequence
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
SINGLE_CASES: list[Case] = []
HARD_CASES: list[Case] = []


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


def restoring(term: ExampleLoss) -> ExampleLoss:
    """The same terms, each with the model's buffers as found, for a model that changes what it computes with."""

    def restored(model: nn.Module, batch: Any, i: int) -> Tensor:
        found = [buffer.clone() for buffer in model.buffers()]
        value = term(model, batch, i)
        for buffer, old in zip(model.buffers(), found, strict=True):
            buffer.copy_(old)
        return value

    return restored


def _count(batch: Any) -> int:
    sizes: list[int] = []
    _map(batch, lambda t: sizes.append(len(t)) or t)
    return sizes[0]


class Net(nn.Module):
    """Named parts (modules, parameters, buffers) and a forward function `forward(net, *inputs)`."""

    def __init__(self, function: Callable[..., Tensor] | None, parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def net(function: Callable[..., Tensor] | None, **parts: Any) -> Net:
    """A module without a class of its own."""
    return Net(function, parts)


def normal(*shape: int) -> nn.Parameter:
    """A standard normal parameter over the square root of its last dimension."""
    return nn.Parameter(torch.randn(shape) / (shape[-1] if shape else 1) ** 0.5)


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


# --- convolutions in all their forms -------------------------------------------------------------------------------


@case()
def conv3d_strided_replicate() -> Problem:
    model = nn.Sequential(
        nn.Conv3d(1, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv3d(2, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(9, 2),
    )
    return classifier(model, torch.randn(3, 1, 3, 4, 3), 2)


@case()
def conv2d_circular_strided_dilated_groups() -> Problem:
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular")
    model = net(lambda m, x: m.head(torch.tanh(m.conv(x)).flatten(1)), conv=conv, head=nn.Linear(24, 3))
    return classifier(model, torch.randn(4, 4, 4, 5), 3)


@case()
def conv2d_reflect_replicate_same() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=(1, 2), padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(2, 2, (3, 1), padding=(2, 0), padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2), bias=False),
    )
    return averaged_problem(model, regress, (torch.randn(5, 1, 4, 5), torch.randn(5, 3, 6, 3)))


@case()
def conv1d_reflect_same() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding="same", padding_mode="reflect", dilation=2),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2, padding="valid", stride=3),
    )
    return averaged_problem(model, regress, (torch.randn(4, 2, 5), torch.randn(4, 2, 2)))


@case()
def conv_transpose1d_groups_output_size() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.tanh(m.up(x, output_size=[9])))

    up = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    model = net(forward, up=up, last=nn.ConvTranspose1d(6, 2, 2, bias=False))
    return averaged_problem(model, regress, (torch.randn(4, 4, 4), torch.randn(4, 2, 10)))


@case()
def conv_transpose2d_groups_dilated() -> Problem:
    up = nn.ConvTranspose2d(4, 4, (3, 2), (2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2))
    model = net(lambda m, x: m.head(torch.tanh(m.up(x)).mean(3).flatten(1)), up=up, head=nn.Linear(16, 3))
    return classifier(model, torch.randn(4, 4, 2, 2), 3)


@case()
def conv_transpose3d_groups() -> Problem:
    up = nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1, output_padding=1, groups=2)
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Tanh(), up)
    return averaged_problem(model, regress, (torch.randn(3, 1, 2, 2, 3), torch.randn(3, 2, 3, 3, 5)))


@case()
def depthwise_separable() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.GELU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return classifier(model, torch.randn(3, 3, 4, 4), 3)


@case()
def conv_channels_as_many_as_examples() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.first(x.contiguous(memory_format=torch.channels_last)))
        return m.second(x).mean((2, 3))

    model = net(forward, first=nn.Conv2d(4, 4, 3, padding=1), second=nn.Conv2d(4, 4, 1))
    return classifier(model, torch.randn(4, 4, 4, 4), 4)


@case()
def functional_convolutions() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, m.blur.expand(3, 1, 2, 2), groups=3))
        scale = m.kernel.std((1, 2, 3), keepdim=True)
        x = torch.tanh(F.conv2d(x, (m.kernel - m.kernel.mean((1, 2, 3), keepdim=True)) / scale, m.bias, stride=(2, 1)))
        return F.conv_transpose2d(x, m.up, padding=1).flatten(1)

    parts = {"blur": normal(1, 1, 2, 2), "kernel": normal(2, 3, 2, 2), "bias": normal(2), "up": normal(2, 3, 3, 3)}
    return averaged_problem(net(forward, **parts), regress, (torch.randn(4, 3, 4, 4), torch.randn(4, 6)))


@case()
def examples_as_groups_of_a_convolution() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        size, channels, length = x.shape
        rows = F.conv1d(x.reshape(1, size * channels, length), m.kernel.repeat(size, 1, 1), groups=size)
        return m.head(torch.tanh(rows.view(size, -1)))

    model = net(forward, kernel=normal(2, 2, 3), head=nn.Linear(6, 3))
    return classifier(model, torch.randn(4, 2, 5), 3)


# --- normalisation in all its forms --------------------------------------------------------------------------------


@case()
def layer_norm_over_two_dimensions() -> Problem:
    layers = (nn.LayerNorm((3, 4)), nn.Tanh(), nn.Linear(4, 3), nn.LayerNorm((3, 3), bias=False), nn.Flatten())
    return classifier(nn.Sequential(*layers, nn.Linear(9, 3)), torch.randn(3, 3, 4), 3)


@case()
def rms_norm_modules() -> Problem:
    layers = (nn.RMSNorm((4, 3)), nn.Linear(3, 4), nn.Tanh(), nn.RMSNorm(4, eps=1e-3))
    model = net(lambda m, x: m.head(m.body(x).sum(1)), body=nn.Sequential(*layers), head=nn.Linear(4, 3))
    return classifier(model, torch.randn(4, 4, 3), 3)


@case()
def group_and_instance_norm_over_time() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Conv1d(4, 4, 2),
        nn.GroupNorm(1, 4),
        nn.Tanh(),
        nn.GroupNorm(4, 4),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return classifier(model, torch.randn(4, 3, 5), 3)


@case()
def running_statistics_in_eval() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(2),
        nn.BatchNorm1d(3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return classifier(model.eval(), torch.randn(3, 1, 3, 3), 3)


@case(kinked=True)
def prelu_of_channels() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.PReLU(4), nn.Flatten(2), nn.Conv1d(4, 4, 2), nn.PReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    return classifier(model, torch.randn(4, 1, 3, 3), 3)


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


@case(kinked=True)
def gru_bidirectional() -> Problem:
    gru = nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True)
    model = net(lambda m, x: m.head(torch.relu(m.gru(x)[0]).sum(1)), gru=gru, head=nn.Linear(4, 2))
    return classifier(model, torch.randn(3, 3, 3), 2)


@case(kinked=True)
def lstm_projected_time_first() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about projections, for which float32 has no faster way
            out, (last, _) = m.lstm(torch.relu(m.body(x)).transpose(0, 1))
        return m.head(torch.cat([out[-1], last.transpose(0, 1).flatten(1)], dim=1))

    lstm = nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2)
    return classifier(net(forward, body=nn.Linear(3, 2), lstm=lstm, head=nn.Linear(12, 2)), torch.randn(4, 4, 3), 2)


@case(kinked=True)
def rnn_relu() -> Problem:
    model = net(
        lambda m, x: m.head(m.rnn(x)[1][-1]), rnn=nn.RNN(3, 3, 2, "relu", batch_first=True), head=nn.Linear(3, 3)
    )
    return classifier(model, torch.randn(3, 4, 3), 3)


@case()
def rnn_tanh_without_bias() -> Problem:
    model = net(
        lambda m, x: m.head(m.rnn(x.transpose(0, 1))[0][-1]), rnn=nn.RNN(3, 4, bias=False), head=nn.Linear(4, 2)
    )
    return classifier(model, torch.randn(5, 2, 3), 2)


@case(kinked=True)
def transformer_encoder_norm_first() -> Problem:
    def forward(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        return m.head(m.layer(x, src_key_padding_mask=padding)[:, 0])

    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    padding = torch.tensor([[False] * 3, [False, False, True], [False, True, True]])
    batch = (torch.randn(3, 3, 4), padding, torch.randint(3, (3,)))
    return averaged_problem(net(forward, layer=layer, head=nn.Linear(4, 3)), classify, batch)


@case(kinked=True)
def transformer_decoder_layer() -> Problem:
    def forward(m: Any, target: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=target.dtype)
        return m.head(m.layer(target, memory, tgt_mask=causal, tgt_is_causal=True)).sum(1)

    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    batch = (torch.randn(3, 3, 4), torch.randn(3, 2, 4), torch.randint(3, (3,)))
    return averaged_problem(net(forward, layer=layer, head=nn.Linear(4, 3)), classify, batch)


@case(kinked=True)
def whole_transformer_time_first() -> Problem:
    def forward(m: Any, source: Tensor, target: Tensor) -> Tensor:
        return m.head(m.both(source.transpose(0, 1), target.transpose(0, 1))).mean(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors, which need batch_first
        both = nn.Transformer(4, 2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=4, dropout=0.0)
    batch = (torch.randn(4, 4, 4), torch.randn(4, 3, 4), torch.randint(3, (4,)))
    return averaged_problem(net(forward, both=both, head=nn.Linear(4, 3)), classify, batch)


@case()
def learned_queries_and_position_bias() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        keys = m.keys(x) + m.positions[:, None].transpose(0, 1)
        pooled = F.scaled_dot_product_attention(m.queries.expand(len(x), -1, -1), keys, m.values(x))
        scores = torch.softmax(pooled @ pooled.mT + m.distance, dim=-1)
        return m.head((scores @ pooled).flatten(1))

    vectors = {"queries": normal(1, 3, 2), "positions": normal(3, 2), "distance": normal(1, 3, 3)}
    parts = {"keys": nn.Linear(4, 2), "values": nn.Linear(4, 2), "head": nn.Linear(6, 3)}
    return classifier(net(forward, **vectors, **parts), torch.randn(3, 3, 4), 3)


@case(integer=True, kinked=True)
def embedding_frequent_tokens() -> Problem:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        return m.head(torch.tanh(m.embed(tokens) * 3**0.5 + m.offset).mean(1))

    model = net(forward, embed=nn.Embedding(5, 3, padding_idx=0), offset=normal(3), head=nn.Linear(3, 3))
    tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 2, 1, 1, 0], [1, 1, 3, 3, 1], [1, 1, 1, 0, 0], [1, 4, 1, 1, 1]])
    return classifier(model, tokens, 3, input_path=None, input_module="embed")


@case(integer=True, once_differentiable=True)
def embedding_bag_sum_padded() -> Problem:
    bag = nn.EmbeddingBag(6, 3, mode="sum", padding_idx=0)
    model = net(lambda m, t: m.head(torch.tanh(m.bag(t))), bag=bag, head=nn.Linear(3, 3))
    tokens = torch.tensor([[1, 1, 2, 0], [3, 0, 0, 0], [4, 5, 1, 4]])
    return classifier(model, tokens, 3, input_path=None, input_module="bag")


@case(once_differentiable=True)
def embedding_bag_weighted() -> Problem:
    def forward(m: Any, tokens: Tensor, weights: Tensor) -> Tensor:
        return m.head(torch.tanh(m.bag(tokens, per_sample_weights=weights)))

    model = net(forward, bag=nn.EmbeddingBag(6, 3, mode="sum"), head=nn.Linear(3, 3))
    batch = (torch.randint(6, (4, 4)), torch.randn(4, 4), torch.randint(3, (4,)))
    return averaged_problem(model, classify, batch, input_path=(1,))


@case()
def one_hot_times_a_table() -> Problem:
    def forward(m: Any, tokens: Tensor, x: Tensor) -> Tensor:
        rows = F.one_hot(tokens, 4).to(x.dtype) @ m.table + F.embedding(tokens, m.other)
        return m.head(torch.tanh(rows * x))

    model = net(forward, table=normal(4, 3), other=normal(4, 3), head=nn.Linear(3, 3))
    batch = (torch.randint(4, (4,)), torch.randn(4, 3), torch.randint(3, (4,)))
    return averaged_problem(model, classify, batch, input_path=(1,))


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


@case(integer=True)
def tied_output_module_with_bias() -> Problem:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        return m.head(torch.tanh(m.body(m.embed(tokens)) * m.embed.weight[0]))

    model = net(forward, embed=nn.Embedding(5, 3), body=nn.Linear(3, 3), head=nn.Linear(3, 5))
    model.head.weight = model.embed.weight
    tokens = torch.tensor([[1, 2, 3, 3, 0, 0], [4, 4, 3, 2, 1, 1], [2, 1, 3, 0, 0, 0]])
    more = {"example_loss": next_token_term, "input_path": None, "input_module": "embed"}
    return Problem(model, next_token, tokens, 3, **more)


@case()
def tied_autoencoder() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.encode(x)), m.encode.weight.t(), m.bias)

    model = net(forward, encode=nn.Linear(4, 4), bias=normal(4))
    return averaged_problem(
        model, lambda model, batch: F.mse_loss(model(batch), batch), torch.randn(4, 4), input_path=()
    )


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


# --- parameters in algebra -----------------------------------------------------------------------------------------


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


# --- parametrised weights ------------------------------------------------------------------------------------------


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


# --- parameters used again, in place, in part ----------------------------------------------------------------------


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


# --- rows that are not the batch's rows ----------------------------------------------------------------------------


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


# --- rows that are hard to follow, or that there are none of: a number must be right, or there must be none --------

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


# --- a batch of one: no disagreement to measure --------------------------------------------------------------------

single_case = functools.partial(case, into=SINGLE_CASES)


@single_case()
def single_mlp() -> Problem:
    return classifier(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(1, 4), 3)


@single_case()
def single_image_batch_norm() -> Problem:
    layers = (nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return classifier(nn.Sequential(*layers), torch.randn(1, 1, 3, 3), 3)


@single_case()
def single_sequence_of_one() -> Problem:
    model = net(lambda m, x: m.head(m.rnn(x)[0].sum(1)), rnn=nn.GRU(3, 2, batch_first=True), head=nn.Linear(2, 3))
    return classifier(model, torch.randn(1, 1, 3), 3)


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


@dropout_case()
def dropout_of_channels_in_lstm() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.lstm(m.drop(m.conv(x)).transpose(1, 2))[0].mean(1))

    parts = {"conv": nn.Conv1d(2, 3, 2), "drop": nn.Dropout1d(0.4), "head": nn.Linear(2, 3)}
    model = net(forward, lstm=nn.LSTM(3, 2, 2, dropout=0.4, batch_first=True), **parts)
    return dataclasses.replace(classifier(model, torch.randn(5, 2, 5), 3), example_loss=None)


@dropout_case()
def dropout_checkpointed() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.block, x, use_reentrant=False))

    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 4), nn.Dropout(0.2))
    model = net(forward, block=block, head=nn.Linear(4, 3))
    return dataclasses.replace(classifier(model, torch.randn(6, 4), 3), example_loss=None)


@dropout_case()
def noisy_weights() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.mean + torch.randn_like(m.spread) * F.softplus(m.spread)
        return m.head(torch.tanh(F.linear(x + 0.1 * torch.randn_like(x), weight)))

    model = net(forward, mean=normal(4, 3), spread=normal(4, 3), head=nn.Linear(4, 3))
    return dataclasses.replace(classifier(model, torch.randn(5, 3), 3), example_loss=None)


FLAGS = ("integer", "interacting", "values", "kinked", "once_differentiable")


def select(**flags: bool) -> list[Case]:
    """The cases with exactly these flags, e.g. `select(interacting=False, kinked=False)`."""
    return [each for each in CASES if all(getattr(each, flag) == wanted for flag, wanted in flags.items())]
