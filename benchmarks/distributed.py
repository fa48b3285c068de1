"""What a monitor costs over DistributedDataParallel alone: two processes on this machine, one thread each.

In each process two equal trainings take turns, block by block, one of them with a monitor. Usage:

    python benchmarks/distributed.py [--blocks 7] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from _report import table, write_section
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gradmon import Monitor, budget, every

RANKS, BATCH, EVERY = 2, 64, 50
NEVER = 10**9
_SETTLING = 3
"""The blocks before the first that counts: the first probes take longer, and a budget pays for them."""


def loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of this process's examples."""
    return functional.cross_entropy(model(batch[0]), batch[1])


SETTINGS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Monitor | None]] = {
    "no monitor, against itself": lambda model, optimizer: None,
    "nothing is due": lambda model, optimizer: Monitor(model, optimizer, loss, schedule=every(NEVER)),
    "`every(50)`": lambda model, optimizer: Monitor(model, optimizer, loss, schedule=every(EVERY)),
    "`every(50)`, without `loss`": lambda model, optimizer: Monitor(model, optimizer, schedule=every(EVERY)),
    "`budget(0.03)`": lambda model, optimizer: Monitor(model, optimizer, loss, schedule=budget(0.03)),
    "`budget(0.03)`, without `loss`": lambda model, optimizer: Monitor(model, optimizer, schedule=budget(0.03)),
}


class Training:
    """A training of a perceptron of 0.93 million weights, with or without a monitor."""

    def __init__(self, make: Callable[[nn.Module, torch.optim.Optimizer], Monitor | None] | None) -> None:
        torch.manual_seed(0)
        widths = (784, 512, 512, 512)
        layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.model = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(512, 10)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.monitor = None if make is None else make(self.model, self.optimizer)
        torch.manual_seed(dist.get_rank())
        self.batches = [(torch.randn(BATCH, 784), torch.randint(10, (BATCH,))) for _ in range(8)]
        self.steps = 0

    def block(self) -> tuple[float, float]:
        """CPU and wall-clock seconds of a step, the mean over a block."""
        began, clock = time.process_time(), time.perf_counter()
        for _ in range(EVERY):
            batch = self.batches[self.steps % len(self.batches)]
            self.steps += 1
            self.optimizer.zero_grad()
            loss(self.model, batch).backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.step(batch)
        return (time.process_time() - began) / EVERY, (time.perf_counter() - clock) / EVERY


def work(rank: int, port: int, blocks: int, file: str) -> None:
    """What one process does; the first one writes what both have found."""
    torch.set_num_threads(1)
    logging.getLogger("gradmon").setLevel(logging.CRITICAL)  # alerts of a training that learns nothing
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, list[float]] = {}
    for name, make in SETTINGS.items():
        plain, watched = Training(None), Training(make)
        plain.block()
        for _ in range(_SETTLING):
            watched.block()
        pairs = [(plain.block(), watched.block()) for _ in range(blocks)]
        own = [statistics.median(pair[at][kind] for pair in pairs) for kind in (0, 1) for at in (0, 1)]
        ratios = [statistics.median(pair[1][kind] / pair[0][kind] for pair in pairs) for kind in (0, 1)]
        together = torch.tensor([*own, *ratios])
        dist.all_reduce(together)
        found[name] = (together / RANKS).tolist()
        if watched.monitor is not None:
            watched.monitor.close()
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


def measured(blocks: int) -> dict[str, list[float]]:
    """For each setting: CPU and wall-clock seconds of a step without and with the monitor, and their ratios."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "found.pt"
        cast("Any", torch).multiprocessing.spawn(work, (port, blocks, str(file)), nprocs=RANKS)
        return torch.load(file)


def report(found: Mapping[str, Sequence[float]], blocks: int) -> str:
    """The table, and what it is of."""
    lines = [
        "## What more than one process costs",
        "",
        "`python benchmarks/distributed.py --write`. Two processes, one thread each, gloo on the loopback interface; a",
        f"perceptron of 0.93 million weights under DistributedDataParallel, {BATCH} examples in each process. Process",
        f"CPU time of a step, the mean of both; medians over {blocks} blocks of {EVERY} steps that take turns with",
        "the same training without a monitor. The metrics are the default ones.",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}.",
        "",
    ]
    cells = [
        [name, f"{1e3 * alone:.2f}", f"{1e3 * watched:.2f}", f"{ratio:.3f}", f"{clock:.3f}"]
        for name, (alone, watched, _, _, ratio, clock) in found.items()
    ]
    heads = ["", "DDP alone, ms of CPU", "with the monitor", "ratio of CPU time", "ratio of wall-clock time"]
    return "\n".join([*lines, table(heads, cells)])


def main() -> int:
    """Print the table; with --write, also write it to docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = report(measured(options.blocks), options.blocks)
    print(text)
    if options.write:
        write_section("distributed", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
