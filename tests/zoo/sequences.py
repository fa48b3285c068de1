"""Attention, recurrence, tokens."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.problem import Problem, averaged_problem, case, classifier, classify, net, normal, regress, take


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
