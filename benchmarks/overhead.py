"""What the monitor costs: a probe in plain training steps, and whole runs under a budget.

One thread, process CPU time, everything interleaved in one process; medians for single steps, sums for runs. Usage:

    python benchmarks/overhead.py [--repeats 5] [--steps 4000] [--only probes|runs] [--write]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _report import table, write_section
from scipy.stats import trim_mean
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import METRICS, Alert, Monitor, Reading, budget, every
from gradmon.perturbations.inputs import Ascent

Batch = tuple[Tensor, Tensor]
_BLOCK = 500
"""How many steps of one run follow one another: the pause between two blocks counts as ten steps of training."""
_TRIMMED = 0.1
_NAMES = {"small": "MLP", "small_conv": "conv net"}
_OF_GROUPS = ("grad_norm", "noise_scale", "weight_condition", "step_ratio")
"""One metric of each group of metrics that share their passes."""


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


def small() -> tuple[nn.Module, Batch]:
    """64-256-256-10, 0.09 M weights, B = 64: about a millisecond a step."""
    sizes = [64, 256, 256, 10]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (torch.randn(64, 64), torch.randint(10, (64,)))


def small_conv() -> tuple[nn.Module, Batch]:
    """Three convolutions with GroupNorm on 1 x 8 x 8, 0.03 M weights, B = 64: some milliseconds a step."""
    layers: list[nn.Module] = []
    for inner, outer, stride in ((1, 32, 1), (32, 48, 2), (48, 48, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    return model, (torch.randn(64, 1, 8, 8), torch.randint(10, (64,)))


@dataclass
class Run:
    """A training run under a budget, beside its twin without a monitor.

    Attributes:
        overhead: The time of the steps with the monitor over that of the twin's, minus 1.
        probes: How many readings there were of a metric of each group of metrics.
    """

    overhead: float
    probes: dict[str, int]


class Counter:
    """A sink that counts readings by name, on the spot: the step that made them is the one that is told by them."""

    immediate = True

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def write(self, readings: Sequence[Reading]) -> None:
        """Count."""
        for reading in readings:
            self.counts[reading.name] = self.counts.get(reading.name, 0) + 1

    def alert(self, alert: Alert) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def whole_run(make: Callable[[], tuple[nn.Module, Batch]], fraction: float, passive: bool, steps: int) -> Run:
    """Train a model under a budget and its twin without a monitor, some hundred steps of the one and of the other."""
    torch.manual_seed(0)
    model, batch = make()
    twin, counter = copy.deepcopy(model), Counter()
    optimizers = [torch.optim.SGD(of.parameters(), lr=1e-3) for of in (model, twin)]
    monitor = Monitor(model, optimizers[0], None if passive else loss, schedule=budget(fraction), sinks=[counter])
    # Probes as long as they take, all other steps by their trimmed means: the machine's moods come on top.
    plain, idle, probed = list[float](), list[float](), 0.0
    block = max(1, min(_BLOCK, steps // 4))
    for start in range(0, steps, block):
        for which, (of, optimizer) in enumerate(zip((model, twin), optimizers, strict=True)):
            for _ in range(start, min(start + block, steps)):
                before, began = sum(counter.counts.values()), time.process_time()
                optimizer.zero_grad()
                loss(of, batch).backward()
                optimizer.step()
                if which == 0:
                    monitor.step(batch)
                took = time.process_time() - began
                if which == 1:
                    plain.append(took)
                elif sum(counter.counts.values()) == before:
                    idle.append(took)
                else:
                    probed += took
    monitor.close()
    overhead = (probed + len(idle) * trim_mean(idle, _TRIMMED)) / (steps * trim_mean(plain, _TRIMMED)) - 1
    return Run(overhead, {name: counter.counts.get(name, 0) for name in _OF_GROUPS})


def probes_table(repeats: int) -> str:
    """What one probe costs."""
    makers = (mlp, conv, transformer)
    found = {make.__name__: (make.__doc__ or "", compare(*make(), repeats)) for make in makers}
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
    return "\n".join([*lines, table(header, rows)])


def runs_table(steps: int) -> str:
    """What whole runs cost under a budget."""
    lines = [
        "## Whole runs under a budget",
        "",
        f"`python benchmarks/overhead.py --write`. {steps} steps of small networks: an MLP (64-256-256-10,",
        "0.09 M weights, B = 64) and three convolutions with GroupNorm (1 x 8 x 8, 0.03 M weights, B = 64), with all",
        "default metrics under `schedule=budget(fraction)`, beside a twin without a monitor,",
        f"{_BLOCK} steps of the one after as many of the other.",
        "Overhead: the CPU time of all steps over that of the twin's, minus 1; steps with a probe as long as they",
        f"take, all others by their means without the {100 * _TRIMMED:.0f} % at either end. The steps of the MLP take",
        "less than a millisecond. On a machine shared with others a figure differs by three points from one run to the",
        "next. The other columns say how often one metric of each group was read.",
        "",
    ]
    rows: list[list[str]] = []
    for make in (small, small_conv):
        for passive, fraction in itertools.product((False, True), (0.01, 0.03, 0.1)):
            run = whole_run(make, fraction, passive, steps)
            kind = "passive" if passive else "with a loss"
            overhead = f"{100 * run.overhead:.1f} %"
            times = [str(run.probes[name]) for name in _OF_GROUPS]
            rows.append([_NAMES[make.__name__], kind, f"{100 * fraction:.0f} %", overhead, *times])
            print(*rows[-1], flush=True)
    header = ["model", "monitor", "budget", "overhead", *(f"`{name}`" for name in _OF_GROUPS)]
    return "\n".join([*lines, table(header, rows)])


def main() -> None:
    """Print the tables; with --write, also write them to docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--only", choices=("probes", "runs"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made: dict[str, str] = {}
    if options.only != "runs":
        made["overhead"] = probes_table(options.repeats)
        print(made["overhead"])
    if options.only != "probes":
        made["runs"] = runs_table(options.steps)
        print(made["runs"])
    if options.write:
        for name, text in made.items():
            write_section(name, text)


if __name__ == "__main__":
    main()
