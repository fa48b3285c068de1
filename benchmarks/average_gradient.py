"""The average gradient on scikit-learn's digits: what it gains, what it costs, and what the monitor sees of it.

One thread; times are process CPU time, interleaved in one process, medians. Usage:

    python benchmarks/average_gradient.py [--seeds 5] [--only PART] [--write]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _report import table, write_section
from torch.nn.functional import cross_entropy

from gradmon import Monitor
from gradmon_integrations.display.history import History
from gradmon_integrations.workloads.average_gradient import AverageGradient
from gradmon_integrations.workloads.average_gradient.experiment import (
    Recipe,
    loss_of,
    mean_and_sem,
    prepare,
    stream,
    trained,
)
from gradmon_integrations.workloads.data import load
from gradmon_integrations.workloads.models import INITS, mlp

PAGE = Path(__file__).parent.parent / "docs" / "workloads" / "average-gradient.md"
_STEPS = 14
"""The steps of an epoch of digits in batches of 128."""
_RATES = (2.5e-4, 7.5e-4, 1.5e-3, 3e-3)
_RATE_EPOCHS = 25
_BLOCKS = 7


def shown(values: list[float], digits: int = 3) -> str:
    """Mean and standard error."""
    mean, error = mean_and_sem(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def differences(recipe: Recipe, seeds: int) -> list[float]:
    """RD of one run per seed."""
    data = load("digits")
    return [trained(replace(recipe, measure=True), data, seed).optimizer.relative_difference for seed in range(seeds)]


def depth_part(seeds: int, draw: bool) -> str:
    """RD against depth, after 10 epochs at 7.5e-4."""
    depths = (3, 9, 18, 27)
    found = {depth: differences(Recipe(depth=depth), seeds) for depth in depths}
    rows = [[str(depth), "2", shown(values, 4)] for depth, values in found.items()]
    rows.append(["27", "5", shown(differences(Recipe(iterations=5), seeds), 4)])
    rows.append(["27, PyTorch's initialization", "2", shown(differences(Recipe(init="default"), seeds), 4)])
    text = table(["tanh layers", "iterations", "RD, mean ± SEM"], rows)
    if draw:
        from _figures import BLUE, panels

        figure, (axes,) = panels(1, 1, 4.2, 2.8)
        means, errors = zip(*(mean_and_sem(found[depth]) for depth in depths), strict=True)
        axes.errorbar(depths, means, errors, color=BLUE, marker="o", capsize=3)
        axes.set(xlabel="tanh layers", ylabel="RD", xticks=depths)
        text += "\n\n" + saved(figure, "average-gradient-depth", "RD grows with the depth of the network")
    return f"RD over {seeds} seeds x 10 epochs, learning rate 7.5e-4:\n\n{text}"


def curves(recipe: Recipe, seeds: int) -> torch.Tensor:
    """The mean loss of each epoch, (seeds, epochs), float64."""
    runs = [trained(recipe, load("digits"), seed).losses for seed in range(seeds)]
    return torch.tensor(runs, dtype=torch.float64).view(seeds, -1, _STEPS).mean(2)


def loss_part(seeds: int, draw: bool) -> str:
    """The loss after 45 epochs at 1.5e-3, and on the way."""
    rows, drawn = [], {}
    for depth in (27, 3):
        plain = Recipe(depth=depth, lr=1.5e-3, epochs=45, iterations=1)
        found = {n: curves(replace(plain, iterations=n), seeds) for n in (1, 2)}
        drawn[depth] = found
        base, average = (curve.median(0).values for curve in found.values())
        for epoch in (15, 30, 45):
            ratio = float(average[epoch - 1] / base[epoch - 1])
            rows.append([str(depth), str(epoch), f"{base[epoch - 1]:.3f}", f"{average[epoch - 1]:.3f}", f"{ratio:.2f}"])
    text = table(["tanh layers", "epochs", "RMSprop", "average gradient", "ratio"], rows)
    if draw:
        from _figures import BLUE, ORANGE, panels

        figure, axes = panels(1, 2, 7.0, 2.8, sharey=True)
        for place, passes in enumerate((False, True)):
            for n, name, colour in ((1, "RMSprop", ORANGE), (2, "average gradient", BLUE)):
                curve = drawn[27][n]
                x = [(epoch + 1) * (n if passes else 1) for epoch in range(curve.shape[1])]
                axes[place].plot(x, curve.median(0).values, color=colour, label=name)
                axes[place].fill_between(x, curve.min(0).values, curve.max(0).values, color=colour, alpha=0.15, lw=0)
            axes[place].set(xlabel="forward and backward passes over the data" if passes else "epochs")
        axes[0].set(ylabel="training loss")
        axes[0].legend()
        name = "The loss of 27 tanh layers over epochs and over passes: median and range over seeds"
        text += "\n\n" + saved(figure, "average-gradient-loss", name)
    return f"Median training loss over {seeds} seeds, learning rate 1.5e-3:\n\n{text}"


def rates_part(seeds: int, draw: bool) -> str:
    """The loss over a range of learning rates."""
    found: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    rows = []
    for rate in _RATES:
        for n, ends in found.items():
            ends.append(curves(Recipe(lr=rate, epochs=_RATE_EPOCHS, iterations=n), seeds)[:, -1])
        spans = [f"{ends[-1].median():.3f} ({ends[-1].min():.2f} to {ends[-1].max():.2f})" for ends in found.values()]
        rows.append([f"{rate:g}", *spans])
    text = table(["learning rate", "RMSprop", "average gradient"], rows)
    if draw:
        from _figures import BLUE, ORANGE, panels

        figure, (axes,) = panels(1, 1, 4.2, 2.8)
        for n, name, colour in ((1, "RMSprop", ORANGE), (2, "average gradient", BLUE)):
            ends = torch.stack(found[n])
            axes.semilogx(_RATES, ends.median(1).values, color=colour, marker="o", label=name)
            axes.fill_between(_RATES, ends.min(1).values, ends.max(1).values, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="learning rate", ylabel=f"training loss after {_RATE_EPOCHS} epochs", ylim=(0, None))
        axes.set_xticks(_RATES, [f"{rate:g}" for rate in _RATES])
        axes.minorticks_off()
        axes.legend()
        name = "The loss against the learning rate: median and range over seeds"
        text += "\n\n" + saved(figure, "average-gradient-rates", name)
    head = f"Training loss after {_RATE_EPOCHS} epochs of 27 tanh layers, median (range) over {seeds} seeds:"
    return f"{head}\n\n{text}"


def cost_part(seeds: int, draw: bool) -> str:
    """What a step costs, in steps of the base optimizer."""
    rows = []
    for depth, width in ((27, 10), (9, 256), (9, 512)):
        torch.manual_seed(0)
        model = mlp(64, 10, depth, width)
        INITS["glorot"](model)
        x, t = torch.randn(128, 64), torch.randint(10, (128,))
        works: dict[str, Callable[[], object]] = {"base": passes(copy.deepcopy(model), x, t, 1)}
        alone = dict(works)
        for n in (2, 5):
            twin = copy.deepcopy(model)
            optimizer = AverageGradient(torch.optim.RMSprop(twin.parameters(), lr=1e-4, foreach=True), iterations=n)

            def work(twin: Any = twin, optimizer: Any = optimizer, x: Any = x, t: Any = t) -> object:
                return optimizer.step(lambda: cross_entropy(twin(x), t))

            works[str(n)] = work
            alone[f"passes of {n}"] = passes(copy.deepcopy(model), x, t, n)
        ratios: dict[str, list[float]] = {name: [] for name in ("2", "passes of 2", "5", "passes of 5")}
        bases: list[float] = []
        for _ in range(_BLOCKS):
            for some in (works, alone):
                medians = interleaved(some, 40 if width == 10 else 10)
                bases.append(medians.pop("base"))
                for name, median in medians.items():
                    ratios[name].append(median / bases[-1])
        spans = [
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in ratios.values()
        ]
        rows.append([f"{depth} x {width}", f"{statistics.median(bases):.2f}", *spans])
    names = [f"{n} iterations{rest}" for n in (2, 5) for rest in ("", ", the passes alone")]
    head = (
        "A step in steps of RMSprop (`foreach`), batch 128, one thread, process CPU time, interleaved; median (range) "
        f"of {_BLOCKS} blocks, each with its own medians:"
    )
    return head + "\n\n" + table(["tanh layers", "RMSprop, ms", *names], rows)


def passes(model: Any, x: torch.Tensor, t: torch.Tensor, n: int) -> Callable[[], None]:
    """A step of RMSprop, and n - 1 more forward passes without and backward passes through its graph."""
    parameters = list(model.parameters())
    base = torch.optim.RMSprop(parameters, lr=1e-4, foreach=True)

    def work() -> None:
        base.zero_grad()
        loss = cross_entropy(model(x), t)
        loss.backward(retain_graph=n > 1)
        for left in range(n - 2, -1, -1):
            with torch.no_grad():
                cross_entropy(model(x), t)
            torch.autograd.grad(loss, parameters, retain_graph=left > 0)
        base.step()

    return work


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median process CPU time of each work, in milliseconds, over rounds of all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, each in works.items():
            start = time.process_time_ns()
            each()
            times[name].append((time.process_time_ns() - start) / 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


_PEAK = """
import resource, sys, torch
from torch.nn.functional import cross_entropy
from gradmon_integrations.workloads.average_gradient import AverageGradient
from gradmon_integrations.workloads.models import mlp
torch.set_num_threads(1)
model, x, t = mlp(64, 10, 6, 2048), torch.randn(8, 64), torch.randint(10, (8,))
kind = sys.argv[1]
make = torch.optim.Adam if kind == "Adam" else torch.optim.RMSprop
base = make(model.parameters(), lr=1e-4, foreach=True)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
average = None if kind in ("Adam", "RMSprop") else AverageGradient(base, iterations=int(kind))
for _ in range(3):
    if average is None:
        base.zero_grad()
        cross_entropy(model(x), t).backward()
        base.step()
    else:
        average.step(lambda: cross_entropy(model(x), t))
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
print(used / sum(4 * p.numel() for p in model.parameters()))
"""


def memory_part(seeds: int, draw: bool) -> str:
    """The peak of the memory, each in a process of its own."""
    names = {"RMSprop": "RMSprop", "Adam": "Adam", "2": "average gradient, 2 iterations", "5": "5 iterations"}
    rows = []
    for kind, name in names.items():
        done = subprocess.run([sys.executable, "-c", _PEAK, kind], capture_output=True, text=True, check=True)
        rows.append([name, f"{float(done.stdout):.1f}"])
    head = "The most memory of three steps, in copies of the weights (21 M, batch 8), beside the weights themselves:"
    return head + "\n\n" + table(["", "copies"], rows)


def metrics_part(seeds: int, draw: bool) -> str:
    """What the monitor reads from both optimizers over training."""
    names = ("step_ratio", "step_condition", "update_ratio", "grad_norm")
    found: dict[int, dict[str, list[list[float]]]] = {n: {name: [] for name in names} for n in (1, 2)}
    for n, seed in itertools.product(found, range(seeds)):
        history = watched(Recipe(lr=1.5e-3, epochs=45, iterations=n), names, seed)
        for name in names:
            found[n][name].append([reading.value for reading in history.series[name]])
    medians = {
        n: {name: torch.tensor(values, dtype=torch.float64).nanmedian(0).values for name, values in of.items()}
        for n, of in found.items()
    }
    rows = [
        [f"`{name}`", f"{part}", *(f"{medians[n][name][span].median():.3g}" for n in (1, 2))]
        for name in names
        for part, span in (("1 to 15", slice(0, 15)), ("31 to 45", slice(30, None)))
    ]
    text = table(["metric", "epochs", "RMSprop", "average gradient"], rows)
    if draw:
        from _figures import BLUE, ORANGE, panels

        figure, axes = panels(1, 2, 7.0, 2.8)
        for place, name in enumerate(names[:2]):
            for n, label, colour in ((1, "RMSprop", ORANGE), (2, "average gradient", BLUE)):
                curve = medians[n][name]
                axes[place].semilogy(range(1, len(curve) + 1), curve, color=colour, label=label)
            axes[place].set(xlabel="epochs", title=name)
        axes[0].legend()
        text += "\n\n" + saved(figure, "average-gradient-metrics", "step_ratio and step_condition over training")
    return f"Medians over {seeds} seeds, learning rate 1.5e-3, one look an epoch:\n\n{text}"


def consistency_part(seeds: int, draw: bool) -> str:
    """How far a step of RMSprop moves the gradient, against depth."""
    rows = []
    for depth in (3, 9, 18, 27):
        histories = [watched(Recipe(depth=depth, iterations=1), ("step_ratio",), seed) for seed in range(seeds)]
        values = [value for history in histories for value in history.values("step_ratio")]
        rows.append([str(depth), f"{statistics.median(values):.2f}"])
    head = f"Medians over {seeds} seeds x 10 epochs of RMSprop, learning rate 7.5e-4, one look an epoch:"
    return head + "\n\n" + table(["tanh layers", "`step_ratio`"], rows)


def watched(recipe: Recipe, names: Sequence[str], seed: int) -> History:
    """What the monitor reads, once an epoch."""
    data = load("digits")
    run, history = prepare(recipe, data, seed), History()
    run.monitor = Monitor(
        run.model,
        run.optimizer,
        loss_of,
        metrics=list(names),
        schedule=lambda step: step % _STEPS == 0,
        mask=None,
        alerts=None,
        sinks=[history],
    )
    with run.monitor:
        for batch in stream(recipe, data, seed):
            run.step(batch)
    return history


def saved(figure: Any, name: str, text: str) -> str:
    """Write the figure beside the page; the Markdown that shows it."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PAGE.with_name(f"{name}.svg"), metadata={"Date": None})
    return f"![{text}]({name}.svg)"


PARTS: dict[str, Callable[[int, bool], str]] = {
    "depth": depth_part,
    "loss": loss_part,
    "rates": rates_part,
    "cost": cost_part,
    "memory": memory_part,
    "consistency": consistency_part,
    "metrics": metrics_part,
}


def main() -> None:
    """Print the tables; with --write, also write them and the figures to docs/workloads/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if options.only in (None, name):
            text = part(options.seeds, options.write)
            print(f"{text}\n", flush=True)
            if options.write:
                write_section(name, text, PAGE)


if __name__ == "__main__":
    main()
