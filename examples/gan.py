"""Two optimizers: a generative adversarial network on a ring of points, with a monitor for each of its networks.

pip install gradmon; python examples/gan.py; tensorboard --logdir runs
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradmon import Monitor, every

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))


def ring(count: int) -> Tensor:
    """Points around a circle."""
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)


def critic_loss(critic: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Real points from made ones; one pass for both, so that each is an example."""
    points, real = batch
    return functional.binary_cross_entropy_with_logits(critic(points).squeeze(1), real)


def generator_loss(generator: nn.Module, batch: Tensor) -> Tensor:
    """How far the critic is from taking what is made for real."""
    verdict = critic(generator(batch)).squeeze(1)
    return functional.binary_cross_entropy_with_logits(verdict, torch.ones(len(batch)))


with (
    Monitor(critic, of_critic, critic_loss, schedule=every(25), run="critic", sinks="tensorboard:runs/critic") as first,
    Monitor(
        generator, of_generator, generator_loss, schedule=every(25), run="generator", sinks="tensorboard:runs/generator"
    ) as second,
):
    for _ in range(500):
        noise = torch.randn(64, 4)
        points = torch.cat([ring(64), generator(noise).detach()])
        batch = points, torch.cat([torch.ones(64), torch.zeros(64)])
        of_critic.zero_grad()
        critic_loss(critic, batch).backward()
        of_critic.step()
        first.step(batch)

        of_generator.zero_grad()
        generator_loss(generator, noise).backward()
        of_generator.step()
        second.step(noise)

for monitor in (first, second):
    for name in ("loss", "grad_norm", "step_ratio", "noise_ratio"):
        reading = monitor.readings[name]
        print(f"{monitor.run:10} {name:12} {reading.value:10.4g}  at step {reading.step}")
