"""How good gradient guesses are, what they cost, and what trains by them. Redoes figures of arXiv 2312.04709 on digits.

One thread; costs in process CPU time, interleaved in one process, medians. Usage:

    python benchmarks/guessers.py [--only cost,memory,cosine,bias,train] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _digits import digits
from _report import table, write_section
from overhead import timed
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon_integrations.workloads.guessers import (
    GUESSERS,
    CosineMatched,
    GuessedGradient,
    estimate_gradient,
)
from gradmon_integrations.workloads.guessers.bias import bias_curve, limit_cosine
from gradmon_integrations.workloads.guessers.comparing import cosines, one_step_effectiveness, true_gradient
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.structure import effective_ranks, jacobian_spectra, subspace_shares

PAGE = Path(__file__).parent.parent / "docs" / "workloads" / "guessers.md"
Batch = tuple[Tensor, Tensor]
SHOWN = ("directional", "activation", "activation-masked", "mixing", "weight-transpose", "downstream", "downstream-2")


def each(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp(depth: int, width: int, inner: int = 64) -> nn.Module:
    """`depth` linear layers with ReLU in between."""
    sizes = [inner, *[width] * (depth - 1), 10]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def data() -> Batch:
    """The digits as rows, with mean 0 and variance 1 over all pixels."""
    images, labels = digits()
    rows = images.flatten(1)
    return (rows - rows.mean()) / rows.std(), labels


def draw(whole: Batch, count: int, generator: torch.Generator) -> Batch:
    """Some examples, with replacement."""
    chosen = torch.randint(len(whole[1]), (count,), generator=generator)
    return whole[0][chosen], whole[1][chosen]


def train(
    model: nn.Module, guesser: Guesser | None, steps: int, rate: float, seed: int, **options: bool
) -> list[float]:
    """AdamW on batches of 256 by guesses, or by backpropagation; the accuracy on all digits every 100 steps."""
    whole, generator = data(), torch.Generator().manual_seed(seed)
    base = torch.optim.AdamW(model.parameters(), lr=rate)
    guesses = torch.Generator().manual_seed(seed)
    optimizer = None if guesser is None else GuessedGradient(base, guesser, model, generator=guesses, **options)
    reached: list[float] = []
    for step in range(1, steps + 1):
        batch = draw(whole, 256, generator)
        if optimizer is None:
            base.zero_grad()
            each(model, batch).mean().backward()
            base.step()
        else:
            optimizer.step(lambda batch=batch: each(model, batch))
        if step % 100 == 0:
            reached.append(accuracy(model, whole))
    return reached


def accuracy(model: nn.Module, whole: Batch) -> float:
    """The share of all examples that is told right."""
    with torch.no_grad():
        return float((model(whole[0]).argmax(1) == whole[1]).float().mean())


def cost() -> str:
    """What a guess costs in plain forward passes."""
    rows: list[list[str]] = []
    for depth, width in ((6, 128), (6, 512)):
        torch.manual_seed(0)
        model, batch = mlp(depth, width), (torch.randn(256, 64), torch.randint(10, (256,)))

        def forward(model: nn.Module = model, batch: Batch = batch) -> None:
            with torch.no_grad():
                each(model, batch)

        def jvp(model: nn.Module = model, batch: Batch = batch) -> Callable[[], object]:
            with Passes(model, each, batch) as passes:
                structure, noise = passes.record(False, False), Seeded(0)
            tangents = {s.number: noise.draw((16, *s.shape), s.like, "normal") for s in structure.sites}

            def along() -> None:
                with Passes(model, each, batch) as passes:
                    passes.tangent(structure, lambda site: tangents[site.number], {}, 16, True)

            return along

        works: dict[str, tuple[Callable[[], object], int]] = {
            "plain forward pass": (forward, 1),
            "backpropagation": (lambda model=model, batch=batch: true(model, batch), 1),
            "Jacobian-vector product, 16 at a time": (jvp(), 16),
        }
        for name in ("directional", "activation", "weight-transpose", "downstream", "mixing"):
            for count, hold in ((1, False), (16, False), (16, True)):
                label = f"{name}, {count} guess{'es' * (count > 1)}{', held' * hold}"

                def work(
                    name: str = name, count: int = count, hold: bool = hold, m: nn.Module = model, b: Batch = batch
                ) -> object:
                    return estimate_gradient(m, each, b, GUESSERS[name], guesses=count, hold=hold)

                works[label] = (work, count)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(5):
            for name, (work, _) in works.items():
                seconds[name].append(timed(work))
        base = statistics.median(seconds["plain forward pass"])
        found = {name: statistics.median(seconds[name]) / base / works[name][1] for name in works}
        rows.append([f"{depth} x {width}", *(f"{found[name]:.2f}" for name in works)])
    names = list(works)
    return table(["per guess, in forward passes", *(row[0] for row in rows)],
                 [[name, *(row[1 + place] for row in rows)] for place, name in enumerate(names)])  # fmt: skip


def true(model: nn.Module, batch: Batch) -> object:
    """Forward and backward."""
    return torch.autograd.grad(each(model, batch).mean(), list(model.parameters()))


def alone(name: str) -> None:
    """One estimate of a deep network's gradient, in a process of its own: the growth of its peak memory in MiB."""
    torch.manual_seed(0)
    model, batch = mlp(48, 256), (torch.randn(1024, 64), torch.randint(10, (1024,)))
    small = batch[0][:8], batch[1][:8]
    run: Callable[[Batch], object] = lambda of: true(model, of)  # noqa: E731
    if name != "backpropagation":
        run = lambda of: estimate_gradient(model, each, of, GUESSERS[name])  # noqa: E731
    run(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory() -> str:
    """Peak resident memory of one estimate against backpropagation's; the median of three fresh processes."""
    rows: list[list[str]] = []
    for name in ("backpropagation", *SHOWN):
        command = [sys.executable, __file__, "--alone", name]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
        rows.append([name, f"{statistics.median(map(float, runs)):.0f}"])
    return table(["48 x 256, B = 1024", "MiB on top of a small batch"], rows)


def cosine() -> str:
    """Mean cosines and one-step effectiveness along a trajectory of backpropagation."""
    rows: list[list[str]] = []
    nets = ((6, 128), (6, 256), (3, 128))
    sums: dict[str, list[list[float]]] = {}
    for depth, width in nets:
        for seed in range(1):
            torch.manual_seed(seed)
            model, whole = mlp(depth, width), data()
            generator = torch.Generator().manual_seed(seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for step in range(300):
                batch = draw(whole, 256, generator)
                if step % 30 == 0:
                    truth = true_gradient(model, each, batch)
                    for name in SHOWN:
                        normal = {} if name != "mixing" else {"normalize": "example"}
                        estimates = [
                            estimate_gradient(model, each, batch, GUESSERS[name], generator=generator, **normal)
                            for _ in range(3)
                        ]
                        layered = estimate_gradient(
                            model, each, batch, GUESSERS[name], generator=generator, per_layer=True
                        )
                        found = sums.setdefault(f"{depth} x {width} {name}", [[], [], []])
                        found[0] += [cosines(estimate, truth).whole for estimate in estimates]
                        found[1].append(cosines(layered, truth).whole)
                        found[2].append(one_step_effectiveness(model, each, batch, estimates[0], truth))
                optimizer.zero_grad()
                each(model, batch).mean().backward()
                optimizer.step()
    for name in SHOWN:
        row = [name]
        for depth, width in nets:
            row += [f"{statistics.mean(part):.4f}" for part in sums[f"{depth} x {width} {name}"]]
        rows.append(row)
    header = [""]
    for depth, width in nets:
        header += [f"{depth} x {width}: cosine", "one pass a layer", "one step"]
    return table(header, rows)


def bias() -> str:
    """The cosine of the mean of n guesses for one example, and its limit."""
    torch.manual_seed(0)
    model, whole = mlp(6, 128), data()
    train(model, None, 20, 1e-3, 0)
    one = whole[0][:1], whole[1][:1]
    rows: list[list[str]] = []
    counts = (16, 64, 256, 1024, 4096)
    for name in SHOWN[1:]:
        batch = one if name != "mixing" else (whole[0][:32], whole[1][:32])
        curve = bias_curve(model, each, batch, GUESSERS[name], counts, generator=torch.Generator().manual_seed(1))
        limit = limit_cosine(model, each, batch, GUESSERS[name])
        rows.append([name, *(f"{curve[count]:.3f}" for count in counts), f"{limit:.3f}"])
        print(rows[-1], flush=True)
    return table(["guesses", *map(str, counts), "limit"], rows)


def training(names: Sequence[str] = ()) -> str:
    """The accuracy after 600 steps by guesses."""
    runs: dict[str, Guesser | None] = {"backpropagation": None, **{name: GUESSERS[name] for name in SHOWN}}
    for power in (2, 4):
        runs[f"singular-power-{power}"] = GUESSERS[f"singular-power-{power}"]
    for value in (0.05, 0.16):
        runs[f"cosine-matched {value}"] = CosineMatched(value)
    deep = {"backpropagation", *SHOWN} - {"activation-masked"}
    rows: list[list[str]] = []
    for name, guesser in runs.items():
        row = [name]
        if names and name not in names:
            continue
        for depth in (3, 6):
            if depth == 6 and (names or name not in deep):
                row += ["", ""]
                continue
            torch.manual_seed(0)
            reached = train(mlp(depth, 128), guesser, 600, 1e-3, 0)
            row += [f"{reached[1]:.3f}", f"{reached[-1]:.3f}"]
        rows.append(row)
        print(row, flush=True)
    return table(["AdamW, 1e-3", "3 x 128: 200 steps", "600", "6 x 128: 200 steps", "600"], rows)


def sharpening() -> str:
    """Self-sharpening: downstream, uniform noise, the last layer exact, for longer."""
    torch.manual_seed(0)
    model, whole = mlp(4, 256), data()
    generator = torch.Generator().manual_seed(0)
    optimizer = GuessedGradient(
        torch.optim.AdamW(model.parameters(), lr=1e-4), GUESSERS["downstream-uniform"], model, exact_last=True,
        generator=generator,
    )  # fmt: skip
    rows: list[list[str]] = []
    for step in range(4001):
        batch = draw(whole, 128, generator)
        if step % 500 == 0:
            truth = true_gradient(model, each, batch)
            found = [
                cosines(
                    estimate_gradient(
                        model, each, batch, GUESSERS["downstream-uniform"], exact_last=True, generator=generator
                    ),
                    truth,
                ).without_last
                for _ in range(8)
            ]
            rank = statistics.mean(list(effective_ranks(model).values())[1:-1])
            rows.append([str(step), f"{statistics.mean(found):.3f}", f"{rank:.1f}", f"{accuracy(model, whole):.3f}"])
            print(rows[-1], flush=True)
        optimizer.step(lambda batch=batch: each(model, batch))
    return table(["step", "cosine without the last layer", "effective rank, hidden", "accuracy"], rows)


def structure() -> str:
    """Subspaces and spectra of a network that was trained for 300 steps."""
    torch.manual_seed(0)
    model, whole = mlp(6, 128), data()
    start = effective_ranks(model)
    train(model, None, 300, 1e-3, 0)
    batch = whole[0][:256], whole[1][:256]
    shares, ranks = subspace_shares(model, each, batch), effective_ranks(model)
    few = whole[0][:8], whole[1][:8]
    spectra = jacobian_spectra(model, each, few)
    rows: list[list[str]] = []
    for number, name in enumerate(ranks):
        seen = [spectra.get((number, count)) for count in range(1, 5)]
        decays = ["" if s is None else f"{float(s[min(9, len(s) - 1)] / s[0]):.3f}" for s in seen]
        share, random = shares[number]
        rows.append([name, f"{start[name]:.1f}", f"{ranks[name]:.1f}", f"{share:.2f}", f"{random:.2f}", *decays])
    header = ["layer", "effective rank at first", "after 300 steps", "share in the span", "at random"]
    return table([*header, *(f"s_10 / s_1, {count} layers" for count in range(1, 5))], rows)


PARTS: dict[str, Callable[[], str]] = {
    "memory": memory,
    "cost": cost,
    "cosine": cosine,
    "bias": bias,
    "train": training,
    "structure": structure,
    "sharpening": sharpening,
}


INTRODUCTIONS: dict[str, str] = {
    "memory": (
        "Peak resident memory of one estimate on top of one for 8 examples, medians of three fresh processes. "
        "It is what the allocator keeps, and varies by some tens of MiB:"
    ),
    "cost": (
        "What a guess costs, process CPU time, in plain forward passes; medians, interleaved, B = 256. With "
        "one guess the passes that find the layers, see that examples do not interact and meet the inputs "
        "again count in full; 16 share them:"
    ),
    "cosine": (
        "Mean cosine to the true gradient and one-step effectiveness (the best step along a guess over the "
        "best step along the gradient, in loss) along an AdamW trajectory of backpropagation, 300 steps of "
        "256, a look every 30, the cosine with three guesses at each:"
    ),
    "bias": (
        "The cosine of the mean of n guesses for one example (mixing: 32) to the true gradient, without the "
        "last layer, which is exact, and its limit; 6 x 128 after 20 steps:"
    ),
    "train": ("Accuracy on all digits by one guess a step, batches of 256, one seed:"),
    "structure": (
        "Effective rank of the weights, share of the gradient in the span of the batch's activations, and "
        "decay of the singular values of Jacobians over 1 to 4 layers; 6 x 128:"
    ),
    "sharpening": (
        "Self-sharpening: 4 x 256, one layer downstream, uniform noise, the last layer exact, AdamW at 1e-4, "
        "batches of 128; the mean cosine of eight guesses at each look:"
    ),
}
"""What stands above each table in the page."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with --write, also write them to docs/workloads/guessers.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--runs", nargs="+", default=[], help="of train: only these, in 3 x 128")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.alone:
        alone(options.alone)
        return
    for name in options.only.split(","):
        found = training(options.runs) if options.runs and name == "train" else PARTS[name]()
        print(f"\n{PARTS[name].__doc__}\n\n{found}", flush=True)
        if options.write:
            write_section(f"guessers-{name}", f"{INTRODUCTIONS[name]}\n\n{found}", PAGE)


if __name__ == "__main__":
    main()
