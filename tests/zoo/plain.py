"""Plain networks, convolutions and normalisation."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.problem import Problem, averaged_problem, case, classifier, classify, net, normal, regress


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


@case()
def rows_repeated_for_each_example() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        draws = torch.tanh(m.body(x)).repeat_interleave(2, dim=0) * m.scales.repeat(len(x), 1)
        return m.head(draws).view(len(x), 2, 3).mean(1)

    model = net(forward, body=nn.Linear(4, 5), scales=normal(2, 5), head=nn.Linear(5, 3))
    return classifier(model, torch.randn(4, 4), 3)
