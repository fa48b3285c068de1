"""Convolutions in all their forms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.problem import Problem, averaged_problem, case, classifier, net, normal, regress


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
