"""What one probe costs, in plain training steps of the same model; writes its section of docs/benchmarks.md.

One thread, process CPU time, the plain step and the probe interleaved in one process, medians. Usage:

    python benchmarks/overhead.py [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable

import torch
from _report import table, write_section
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import METRICS, Monitor, every
from gradmon.perturbations.inputs import Ascent

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(scale: int = 1) -> tuple[nn.Module, Batch]:
    """784-512-512-512-10, 0.93 M weights, B = 128."""
    sizes = [784, 512, 512, 512, 10]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (torch.randn(128 * scale, 784), torch.randint(10, (128 * scale,)))


def conv(scale: int = 1) -> tuple[nn.Module, Batch]:
    """Five convolutions with GroupNorm on 3 x 32 x 32, 0.31 M weights, B = 64."""
    layers: list[nn.Module] = []
    for inner, outer, stride in ((3, 64, 1), (64, 64, 2), (64, 72, 1), (72, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return model, (torch.randn(64 * scale, 3, 32, 32), torch.randint(10, (64 * scale,)))


class Transformer(nn.Module):
    """Four encoder layers of width 256 over 128 tokens of 512 words, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 256)
        self.position = nn.Embedding(128, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(256, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, 512, T)."""
        # One row of positions an example, (B, T), although all are alike: without a batch dimension of its own this
        # look-up would not be one of per-example gradients to Opacus and TorchJD.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.layers(self.embedding(tokens) + self.position(places))).transpose(1, 2)


def transformer(scale: int = 1) -> tuple[nn.Module, Batch]:
    """Four encoder layers of width 256 over 128 tokens of 512 words, 3.45 M weights, B = 16."""
    shape = (16 * scale, 128)
    return Transformer(), (torch.randint(512, shape), torch.randint(512, shape))


def timed(work: Callable[[], object]) -> float:
    """Process CPU seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(model: nn.Module, batch: Batch, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each kind of work, and its ratio to a plain step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def plain() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    def probe(metrics: str | list[str], **options: object) -> Callable[[], None]:
        monitor = Monitor(model, optimizer, loss, metrics=metrics, schedule=every(1), **options)  # type: ignore[arg-type]

        def work() -> None:
            plain()
            monitor.step(batch)

        return work

    idle = Monitor(model, optimizer, loss, schedule=every(10**9))
    # On a copy, because its hooks stay on the model from step to step.
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    passive = Monitor(twin, twin_optimizer, schedule=every(1))

    def passively() -> None:
        twin_optimizer.zero_grad()
        loss(twin, batch).backward()
        twin_optimizer.step()
        passive.step(batch)

    works: dict[str, Callable[[], object]] = {
        "plain step": plain,
        "step, monitor not scheduled": lambda: (plain(), idle.step(batch)),
        "step and probe, passive": passively,
        "step and probe, step-consistency and sources": probe(
            [m.name for m in METRICS.values() if m.group in ("step-consistency", "health") and not m.on_demand]
            + ["step_ratio", "step_share", "batch_share"]
        ),
        "step and probe, default": probe("default"),
        "step and probe, input_condition of 8 examples": probe(["input_condition"], inputs=Ascent(examples=8)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(timed(work))
    base = statistics.median(seconds["plain step"])
    return {name: (statistics.median(found), statistics.median(found) / base) for name, found in seconds.items()}


def main() -> None:
    """Print the table; with --write, also write it to docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    makers = (mlp, conv, transformer)
    found = {make.__name__: (make.__doc__ or "", compare(*make(), options.repeats)) for make in makers}
    lines = [
        "## What one probe costs",
        "",
        "`python benchmarks/overhead.py --write`. Milliseconds of process CPU time, one thread,",
        "and in brackets the ratio to a plain training step; medians, interleaved in one process. `mask=0.05`,",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}.",
        "",
    ]
    header = ["", *(f"{name}: {text.rstrip('.')}" for name, (text, _) in found.items())]
    rows = [
        [work, *(f"{1e3 * of[work][0]:.1f} ({of[work][1]:.2f})" for _, of in found.values())]
        for work in next(iter(found.values()))[1]
    ]
    text = "\n".join([*lines, table(header, rows)])
    print(text)
    if options.write:
        write_section("overhead", text)


if __name__ == "__main__":
    main()
