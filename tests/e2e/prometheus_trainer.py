"""A training of its own process, for the tests with a real Prometheus: ``RUN PORT FOLDER [ill]``.

It trains until ``FOLDER/stop`` is there, and then comes to its end. ``ill``: too deep, badly initialised and trained
with too long steps; when ``FOLDER/recover`` is there it does what the runbook says: back to a better start, and a lower
learning rate.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import torch
from torch import nn

from gradmon import METRICS, Monitor, every
from gradmon_integrations.sinks.prometheus import PrometheusSink

INPUTS, HIDDEN, CLASSES = 8, 32, 3
PAUSE = 0.1
"""Stands for the work of a larger model, beside which looking at it is cheap."""


def network(depth: int, gain: float) -> nn.Sequential:
    widths = [INPUTS, *[HIDDEN] * (depth - 1), CLASSES]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main(run: str, port: int, folder: Path, ill: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    depth = 10 if ill else 2
    model, better = network(depth, 30.0 if ill else 1.0), network(depth, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0 if ill else 0.01)
    truth, size = torch.randn(INPUTS, CLASSES), 32 if ill else 256
    with Monitor(
        model,
        optimizer,
        loss,
        metrics=[*METRICS] if ill else "default",
        layers=True,
        schedule=every(4 if ill else 40),
        run=run,
        hparams={"flavour": "ill" if ill else "healthy"},
        sinks=PrometheusSink(port),
    ) as monitor:
        while not (folder / "stop").exists():
            if ill and (folder / "recover").exists():
                model.load_state_dict(better.state_dict())
                optimizer.param_groups[0]["lr"] = 0.01
                ill = False
            x = torch.randn(size, INPUTS)
            batch = x, (x @ truth).argmax(1)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
            time.sleep(PAUSE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), "ill" in sys.argv[4:])
