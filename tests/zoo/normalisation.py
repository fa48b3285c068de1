"""Normalisation in all its forms."""

import torch
from torch import nn

from tests.zoo.problem import Problem, case, classifier, net


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
