"""Models that nobody thought of, each with a batch and a loss."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

CLASSES = 3
VOCABULARY = 7
SIDE = 3
FUNCTIONAL = st.sampled_from(["affine", "low_rank", "einsum", "gate", "self_gate"])


class Fold(nn.Module):
    """A module applied to another view of its input: `there` first, `back` afterwards."""

    def __init__(self, module, there, back):
        super().__init__()
        self.module, self.there, self.back = module, there, back

    def forward(self, x):
        out = self.module(self.there(x))
        return self.back(out[0] if isinstance(out, tuple) else out, len(x))


class Residual(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return x + torch.tanh(self.module(x))


class Twice(nn.Module):
    """The same module, and then once more."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(torch.tanh(self.module(x)))


class Tied(nn.Module):
    """A weight, and the same weight transposed, functionally."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width + 1))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weight.T)), self.weight)


class Functional(nn.Module):
    """Parameters that belong to no layer, used in one of several ways along the last dimension."""

    def __init__(self, width, kind):
        super().__init__()
        self.kind = kind
        self.scale, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.left, self.right = nn.Parameter(torch.randn(width, 2)), nn.Parameter(torch.randn(2, width))

    def forward(self, x):
        if self.kind == "affine":
            return x * self.scale + self.shift
        if self.kind == "low_rank":
            return x + F.linear(x, self.right.T @ self.left.T)
        if self.kind == "einsum":
            return torch.einsum("...i,ij,jk->...k", x, self.left, self.right)
        if self.kind == "gate":
            return torch.where(x > 0, x * self.scale.exp(), self.shift)
        return x * (x @ self.left @ self.right + self.shift).sigmoid()


class Positions(nn.Module):
    """A learned table for the steps of a sequence, with a learned step in front."""

    def __init__(self, length, width, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.table = nn.Parameter(torch.randn(length, width))
        self.embedding = nn.Embedding(length, width)

    def forward(self, x):
        if self.kind == "table":
            return x + self.table
        if self.kind == "look_up":
            return x + self.embedding(torch.arange(x.shape[1]))
        return torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)


class Attention(nn.Module):
    def __init__(self, width, time_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=not time_first)
        self.time_first = time_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_first else x
        x = self.attention(x, x, x, need_weights=False)[0]
        return x.transpose(0, 1) if self.time_first else x


class HandMade(nn.Module):
    """Attention from one matrix for queries, keys and values."""

    def __init__(self, width):
        super().__init__()
        self.all = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.all(x).chunk(3, dim=-1)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Recurrent(nn.Module):
    def __init__(self, kind, width, time_first):
        super().__init__()
        self.core = kind(width, width, batch_first=not time_first)
        self.time_first = time_first

    def forward(self, x):
        x = self.core(x.transpose(0, 1) if self.time_first else x)[0]
        return x.transpose(0, 1) if self.time_first else x


class Product(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.core = nn.Bilinear(width, width, width)

    def forward(self, x):
        return self.core(x, torch.tanh(x))


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ACTIVATIONS = (
    torch.tanh,
    F.silu,
    lambda x: F.relu(x + 0.0, inplace=True),
    lambda x: F.elu_(x * 1.0),
    lambda x: x.clone().sigmoid_(),
    F.softplus,
)


def channels_first(module):
    return Fold(module, lambda x: x.movedim(-1, 1), lambda out, size: out.movedim(1, -1))


def flat(module, length):
    """Tokens of all examples in one dimension, example by example."""
    return Fold(module, lambda x: x.reshape(-1, x.shape[-1]), lambda out, size: out.reshape(size, length, -1))


def flat_time_first(module, length):
    """Tokens of all examples in one dimension, step by step."""
    return Fold(
        module,
        lambda x: x.transpose(0, 1).reshape(-1, x.shape[-1]),
        lambda out, size: out.reshape(length, size, -1).transpose(0, 1),
    )


def vector_layer(draw, width):
    """A layer for (B, D)."""
    return {
        "linear": lambda: nn.Linear(width, width, bias=draw(st.booleans())),
        "norm": lambda: nn.LayerNorm(width),
        "group_norm": lambda: nn.GroupNorm(1, width),
        "batch_norm": lambda: nn.BatchNorm1d(width),
        "batch_norm_eval": lambda: nn.BatchNorm1d(width).eval(),
        "tied": lambda: Tied(width),
        "functional": lambda: Functional(width, draw(FUNCTIONAL)),
        "bilinear": lambda: Product(width),
        "prelu": lambda: nn.PReLU(width),
    }


def sequence_layer(draw, width, length):
    """A layer for (B, T, D)."""
    time_first = draw(st.booleans())
    return {
        "linear": lambda: nn.Linear(width, width),
        "norm": lambda: nn.LayerNorm(width),
        "norm_over_time": lambda: nn.LayerNorm([length, width]),
        "batch_norm": lambda: channels_first(nn.BatchNorm1d(width)),
        "instance_norm": lambda: channels_first(nn.InstanceNorm1d(width, affine=True)),
        "conv": lambda: channels_first(nn.Conv1d(width, width, 3, padding=1)),
        "depthwise": lambda: channels_first(nn.Conv1d(width, width, 3, padding=1, groups=width)),
        "attention": lambda: Attention(width, time_first),
        "hand_made": lambda: HandMade(width),
        "lstm": lambda: Recurrent(nn.LSTM, width, time_first),
        "gru": lambda: Recurrent(nn.GRU, width, time_first),
        "flat": lambda: flat(nn.Linear(width, width), length),
        "flat_time_first": lambda: flat_time_first(nn.Linear(width, width), length),
        "positions": lambda: Positions(length, width, draw(st.sampled_from(["table", "look_up"]))),
        "tied": lambda: Tied(width),
        "functional": lambda: Functional(width, draw(FUNCTIONAL)),
    }


def image_layer(draw, width):
    """A layer for (B, C, H, W)."""
    return {
        "conv": lambda: nn.Conv2d(width, width, 3, padding=1, bias=draw(st.booleans())),
        "one_by_one": lambda: nn.Conv2d(width, width, 1),
        "transposed": lambda: nn.ConvTranspose2d(width, width, 3, padding=1),
        "depthwise": lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
        "group_norm": lambda: nn.GroupNorm(1, width),
        "instance_norm": lambda: nn.InstanceNorm2d(width, affine=True),
        "batch_norm": lambda: nn.BatchNorm2d(width),
        # Contiguous again: torch 2.13 differentiates instance_norm wrongly where a single example is channels-last.
        "channels_last": lambda: Fold(
            nn.Linear(width, width), lambda x: x.movedim(1, -1), lambda out, size: out.movedim(-1, 1).contiguous()
        ),
    }


def make_inputs(kind, size, width, length):
    return {
        "vector": lambda: torch.randn(size, width),
        "sequence": lambda: torch.randn(size, length, width),
        "image": lambda: torch.randn(size, width, SIDE, SIDE),
        "tokens": lambda: torch.randint(VOCABULARY, (size, length)),
    }[kind]()


def make_block(draw, shape, width, length):
    """A layer, perhaps inside a residual connection, applied twice, or frozen; and its name."""
    choices = {
        "vector": lambda: vector_layer(draw, width),
        "sequence": lambda: sequence_layer(draw, width, length),
        "image": lambda: image_layer(draw, width),
    }[shape]()
    name = draw(st.sampled_from(sorted(choices)))
    block, how = choices[name](), draw(st.sampled_from(["plain", "plain", "residual", "twice", "frozen"]))
    if how == "frozen":
        block.requires_grad_(False)
    block = {"residual": Residual, "twice": Twice}.get(how, lambda block: block)(block)
    return block, f"{how} {name}"


def make_pooling(draw, shape):
    """From (B, ...) to (B, D), and its name."""
    poolings = {
        "vector": {"none": lambda x: x},
        "sequence": {"mean": lambda x: x.mean(1), "last": lambda x: x[:, -1], "flat": lambda x: x.flatten(1)},
        "image": {"mean": lambda x: x.mean((2, 3)), "flat": lambda x: x.flatten(1)},
    }[shape]
    name = draw(st.sampled_from(sorted(poolings)))
    return Activation(poolings[name]), name


def make_token_loss(size, length):
    """Cross entropy, averaged over those tokens of all examples that are not to be ignored."""
    targets = torch.randint(CLASSES, (size, length))
    targets[torch.rand(size, length) < 0.3] = -100
    targets[0, 0] = 0
    count = int((targets != -100).sum())

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def term(model, batch, i):
        logits = model(batch[0][i : i + 1])[0]
        return F.cross_entropy(logits, batch[1][i], ignore_index=-100, reduction="sum") / count

    return loss, term, targets, "mean", False


def make_loss(draw, size):
    """A loss of (B, classes), one example's term of it, the targets, and the reduction."""
    kind = draw(st.sampled_from(["mean", "sum", "values", "values_sum", "classes", "penalty"]))
    targets = torch.randint(CLASSES, (size,)) if kind == "classes" else torch.randn(size, CLASSES).double()

    def error(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    def penalty(model):
        return 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    loss = {
        "mean": lambda model, batch: error(model, batch).mean(),
        "sum": lambda model, batch: error(model, batch).sum(),
        "values": error,
        "values_sum": error,
        "classes": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1),
        "penalty": lambda model, batch: error(model, batch).mean() + penalty(model),
    }[kind]

    def term(model, batch, i):
        value = loss(model, (batch[0][i : i + 1], batch[1][i : i + 1])).sum()
        return value if kind in ("sum", "values_sum") else value / size

    return loss, term, targets, "sum" if kind == "values_sum" else "mean", kind == "penalty"


class Made(NamedTuple):
    """A model with its loss, and example i's own term: together the terms are the loss."""

    model: nn.Module
    loss: Any
    term: Any
    batch: Any
    reduction: str
    interacting: bool
    penalised: bool
    text: str


@st.composite
def problems(draw):
    """A model of one to four blocks, in float64, with a batch of one to five examples."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kind, size = draw(st.sampled_from(["vector", "sequence", "image", "tokens"])), draw(st.integers(1, 5))
    width, length = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    inputs = make_inputs(kind, size, width, length)
    names, blocks = [f"B={size} D={width} T={length} {kind}"], []
    if kind == "tokens":
        blocks.append(nn.Embedding(VOCABULARY, width, padding_idx=draw(st.sampled_from([None, 0]))))
    shape = "sequence" if kind == "tokens" else kind
    for _ in range(draw(st.integers(1, 4))):
        if shape == "sequence" and draw(st.integers(0, 7)) == 0:
            blocks.append(Positions(length, width, "first"))
            names.append("first")
            length += 1
        block, name = make_block(draw, shape, width, length)
        blocks.append(block)
        names.append(name)
        if draw(st.booleans()):
            blocks.append(Activation(draw(st.sampled_from(ACTIVATIONS))))
    if shape == "sequence" and draw(st.booleans()):
        loss, term, targets, reduction, penalised = make_token_loss(size, length)
        names.append("token mean")
    else:
        pooling, name = make_pooling(draw, shape)
        blocks.append(pooling)
        names.append(name)
        width *= {"sequence": length, "image": SIDE**2}[shape] if name == "flat" else 1
        loss, term, targets, reduction, penalised = make_loss(draw, size)
    head = nn.Linear(width, CLASSES)
    model = nn.Sequential(*blocks, head).double()
    zero = draw(st.integers(0, 7)) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for parameter in head.parameters() if zero else ():
            parameter.zero_()
    interacting = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    text = ", ".join([*names, "zero head" if zero else "head"])
    return Made(model, loss, term, batch, reduction, interacting, penalised, text)
