"""What the Gram matrix of the per-example gradients costs on top of a training step: gradmon and its peers.

G_ij = <h_i, h_j>, where h_i is B times the gradient of example i's term of the mean loss. Every engine does a whole
training step, and has G when it is done. The peers are in an environment of their own: `make benchmark`. Usage:

    python benchmarks/per_example.py [--repeats 15] [--device cuda] [--models mlp conv] [--engines Opacus] [--write]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from _engines import ENGINES, Work
from _report import table, write_section
from overhead import Batch, conv, loss, mlp, timed, transformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

PATIENCE = 30.0
"""Seconds that one engine may take on one model, warm-up apart, before it gets fewer repeats."""
PEERS = ("opacus", "backpack-for-pytorch", "torchjd")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut. GroupNorm, since BatchNorm has no per-example gradients."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.GroupNorm(8, outer))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) -> (B, outer, H / stride, W / stride)."""
        inside = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inside)) + self.shortcut(x))


def resnet(scale: int = 1) -> tuple[nn.Module, Batch]:
    """ResNet-18 at half its width, with GroupNorm, on 3 x 32 x 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU()]
    for inner, outer, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2)):
        layers += [BasicBlock(inner, outer, stride), BasicBlock(outer, outer, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return model, (torch.randn(16 * scale, 3, 32, 32), torch.randint(10, (16 * scale,)))


MODELS: dict[str, tuple[str, Callable[[int], tuple[nn.Module, Batch]]]] = {
    "mlp": ("MLP 784-512-512-512-10", mlp),
    "conv": ("Four convolutions with GroupNorm on 3 x 32 x 32", conv),
    "transformer": ("Transformer, four encoder layers of width 256, T = 128", transformer),
    "resnet": ("ResNet-18 of half its width with GroupNorm on 3 x 32 x 32", resnet),
}


def reference(model: nn.Module, batch: Batch) -> Tensor:
    """G by its definition, in float64, one backward pass an example; (B, B)."""
    precise = copy.deepcopy(model).double()
    parameters = list(precise.parameters())
    inputs = batch[0].double() if batch[0].is_floating_point() else batch[0]
    rows = inputs.new_empty((len(inputs), sum(of.numel() for of in parameters)), dtype=torch.float64)
    for row, x, y in zip(rows, inputs, batch[1], strict=True):
        gradient = torch.autograd.grad(loss(precise, (x[None], y[None])), parameters)
        torch.cat([of.flatten() for of in gradient], out=row)
    return rows @ rows.T


@dataclass
class Row:
    """What became of one engine on one model.

    Attributes:
        note: Why there is nothing else.
        error: The largest difference from the reference, relative to its largest element.
        seconds: Of every repeat.
        memory: The peak of a process of its own, in MiB.
    """

    note: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    memory: float | None = None


def make(name: str, device: torch.device) -> tuple[nn.Module, Batch]:
    """A model and its batch, the same ones in every process."""
    torch.manual_seed(0)
    model, (x, y) = MODELS[name][1](4 if device.type == "cuda" else 1)
    return model.to(device), (x.to(device), y.to(device))


def title(name: str, device: torch.device) -> str:
    """The model in words, with its size."""
    model, batch = make(name, device)
    weights = sum(of.numel() for of in model.parameters()) / 1e6
    return f"{MODELS[name][0]}: {weights:.2f} M weights, B = {len(batch[1])}"


def time_of(work: Work, device: torch.device) -> float:
    """Seconds: of the process' CPU time, or between two events on the device."""
    # The garbage of one engine, cycles of hooks and graphs, is not the next one's to collect.
    gc.collect()
    if device.type != "cuda":
        return timed(work)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def reason(error: Exception) -> str:
    """Why an engine has no numbers, in a few words."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    if isinstance(error, ImportError):
        return "not available"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    first = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", first)
    return "cannot: " + (first if len(first) <= 100 else first[:99] + "…")


def compare(name: str, engines: Sequence[str], repeats: int, device: torch.device) -> dict[str, Row]:
    """Time and accuracy of the engines on one model, interleaved."""
    model, batch = make(name, device)
    truth = reference(model, batch)
    rows = {engine: Row() for engine in engines}
    works: dict[str, tuple[Work, int]] = {}
    for engine, row in rows.items():
        try:
            work = ENGINES[engine](copy.deepcopy(model), batch)
            # The first step is made of the weights that the reference saw, and warms up.
            gram = work()
            if gram is not None:
                row.error = ((gram.double() - truth).abs().max() / truth.abs().max()).item()
            lasts = time_of(work, device)
        except Exception as error:
            # Whatever a peer raises is its result.
            row.note = reason(error)
            continue
        works[engine] = work, min(repeats, max(3, math.ceil(PATIENCE / lasts)))
    for repeat in range(repeats):
        for engine, (work, often) in works.items():
            # Spread over the whole run: what changes in the machine meanwhile meets the slow ones as well.
            if (repeat + 1) * often // repeats > repeat * often // repeats:
                rows[engine].seconds.append(time_of(work, device))
    return rows


def peak(model: str, engine: str, device: torch.device) -> float:
    """The peak memory of this process, in MiB, after three steps of one engine."""
    work = ENGINES[engine](*make(model, device))
    for _ in range(3):
        work()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # KiB on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_elsewhere(model: str, engine: str, device: torch.device) -> float | None:
    """`peak` in a fresh process; None where the engine fails."""
    command = [sys.executable, __file__, "--alone", model, engine, "--device", str(device)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(found.stdout.split()[-1]) if found.returncode == 0 else None


def cells(name: str, row: Row, base: Row | None) -> list[str]:
    """One line of the table; ratios are to the plain step."""
    if row.note:
        return [name, row.note, "", "", "", ""]
    seconds = statistics.median(row.seconds)
    ratio = f"{seconds / statistics.median(base.seconds):.2f}" if base else ""
    more = f"{row.memory / base.memory:.2f}" if base and base.memory and row.memory else ""
    memory = f"{row.memory:.0f}" if row.memory else ""
    return [name, f"{1e3 * seconds:.1f}", ratio, memory, more, "" if row.error is None else f"{row.error:.0e}"]


def versions() -> str:
    """Of everything that was compared."""
    named = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for peer in PEERS:
        try:
            named.append(f"{peer} {importlib.metadata.version(peer)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(named)


def introduction(device: torch.device) -> list[str]:
    """Heading, and how the numbers came about."""
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, one thread"
    clock = "milliseconds between CUDA events" if cuda else "milliseconds of process CPU time"
    memory = "`torch.cuda.max_memory_allocated`" if cuda else "peak resident memory, Python and torch included,"
    options = " --device cuda" if cuda else ""
    return [
        f"## Per-example gradients: {where}",
        "",
        f"`python benchmarks/per_example.py --write{options}`. Every row is a whole training step, zero_grad, forward,",
        "backward and SGD, and beside it the B x B Gram matrix G of the per-example gradients; with the mask, mean and",
        "variance of 5 % of the coordinates; unarmed, nothing.",
        f"Time: {clock}, medians, all engines interleaved in one process.",
        f"Memory: {memory} in MiB, of a fresh process that runs",
        "this engine alone. Ratios: to the plain step.",
        "Error: the largest difference of an element of G from a float64 loop of one backward pass an example,",
        f"relative to the largest element; float32 throughout{', TF32 off' if cuda else ''}. Up to 1e-3 may be",
        "activations that float32 puts on the other side of a ReLU's kink; more is a wrong G.",
        f"{versions()}.",
    ]


def main() -> None:
    """Print the tables; with --write, also write them to docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", default=[""], help="those whose names contain one of these")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and (len(options.models) < len(MODELS) or options.engines != [""]):
        parser.error("--write replaces all tables, and needs all models and engines")
    torch.set_num_threads(1)
    # Of hooks, fallbacks and missing rules: what the peers warn of is what the tables show.
    warnings.simplefilter("ignore", UserWarning)
    # TF32 has three digits, and an engine that is wrong in the fourth would not show.
    torch.backends.cudnn.allow_tf32 = False
    device: torch.device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # events are recorded on the current device
    if options.alone:
        model, engine = options.alone
        print(peak(model, engine, device))
        return
    engines = [name for name in ENGINES if any(part in name for part in ("plain", *options.engines))]
    # All memory before any time: a child begins with its parent's peak as its own, and this process is still small.
    memory = {(model, of): peak_elsewhere(model, of, device) for model in options.models for of in engines}
    lines = introduction(device)
    print("\n".join(lines), flush=True)
    header = ["", "ms", "ratio", "MiB", "ratio", "error"]
    for name in options.models:
        rows = compare(name, engines, options.repeats, device)
        for engine, row in rows.items():
            row.memory = memory[name, engine]
        section = ["", f"### {title(name, device)}", ""]
        section.append(table(header, (cells(of, row, rows["plain step"]) for of, row in rows.items())))
        print("\n".join(section), flush=True)
        lines += section
    if options.write:
        write_section(f"per-example-{device.type}", "\n".join(lines))


if __name__ == "__main__":
    main()
