"""A batch of one: no disagreement to measure."""

import functools

import torch
from torch import nn

from tests.zoo.problem import SINGLE_CASES, Problem, case, classifier, net

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
