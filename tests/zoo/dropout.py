"""Dropout: no independent truth, for tests of determinism."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from tests.zoo.problem import DROPOUT_CASES, Problem, case, classifier, net, normal

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
