"""How good gradient guesses are, what they cost, and what trains by them. Redoes figures of arXiv 2312.04709 on digits.

One thread; costs in process CPU time, interleaved in one process, medians. Usage:

    python benchmarks/guessers.py [--only cost,memory,cosine,bias,train,structure,sharpening] [--write]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _guesser_costs import alone, cost, memory
from _guesser_nets import accuracy, data, draw, each, mlp, train
from _report import table, write_section

from gradmon_integrations.workloads.guessers import GUESSERS, CosineMatched, GuessedGradient, estimate_gradient
from gradmon_integrations.workloads.guessers.bias import bias_curve, limit_cosine
from gradmon_integrations.workloads.guessers.comparing import cosines, one_step_effectiveness, true_gradient
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.settings import Normalize
from gradmon_integrations.workloads.guessers.structure import effective_ranks, jacobian_spectra, subspace_shares

PAGE = Path(__file__).parent.parent / "docs" / "workloads" / "guessers.md"
SHOWN = ("directional", "activation", "activation-masked", "mixing", "weight-transpose", "downstream", "downstream-2")


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
                        normal: Normalize = "example" if name == "mixing" else "none"
                        estimates = [
                            estimate_gradient(model, each, batch, GUESSERS[name], generator=generator, normalize=normal)
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


def bias(draws: bool) -> str:
    """The cosine of the mean of n guesses for one example, and its limit."""
    torch.manual_seed(0)
    model, whole = mlp(6, 128), data()
    train(model, None, 20, 1e-3, 0)
    one = whole[0][:1], whole[1][:1]
    rows: list[list[str]] = []
    counts = (1, 4, 16, 64, 256, 1024, 4096)
    found: dict[str, tuple[list[float], float]] = {}
    for name in SHOWN[1:]:
        batch = one if name != "mixing" else (whole[0][:32], whole[1][:32])
        curve = bias_curve(model, each, batch, GUESSERS[name], counts, generator=torch.Generator().manual_seed(1))
        limit = limit_cosine(model, each, batch, GUESSERS[name])
        rows.append([name, *(f"{curve[count]:.3f}" for count in counts), f"{limit:.3f}"])
        found[name] = [curve[count] for count in counts], limit
        print(rows[-1], flush=True)
    text = table(["guesses", *map(str, counts), "limit"], rows)
    if draws:
        from _figures import BLUE, GREEN, GREY, ORANGE, PINK, panels

        figure, (axes,) = panels(1, 1, 6.4, 3.2)
        colours = (BLUE, "#56b4e9", PINK, ORANGE, GREEN, GREY)
        for (name, (values, limit)), colour in zip(found.items(), colours, strict=True):
            axes.semilogx(counts, values, color=colour, marker="o", markersize=3, label=name)
            axes.axhline(limit, color=colour, linestyle="--", linewidth=0.8)
        axes.set(xlabel="guesses", ylabel="cosine to the true gradient", ylim=(0, 1.03))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        text += "\n\n" + saved(
            figure, "guessers-bias", "Cosine of the mean of n guesses to the gradient, and the limits, dashed"
        )
    return text


def saved(figure: Any, name: str, text: str) -> str:
    """Write the figure beside the page; the Markdown that shows it."""
    figure.savefig(PAGE.with_name(f"{name}.svg"), metadata={"Date": None})
    return f"![{text}]({name}.svg)"


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


def sharpening(draws: bool) -> str:
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
        if step % 250 == 0:
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
    text = table(["step", "cosine without the last layer", "effective rank, hidden", "accuracy"], rows)
    if draws:
        from _figures import BLUE, ORANGE, panels

        figure, axes = panels(1, 2, 7.0, 2.6)
        steps, *columns = ([float(row[place]) for row in rows] for place in range(4))
        for place, (values, colour) in enumerate(zip(columns[:2], (BLUE, ORANGE), strict=True)):
            axes[place].plot(steps, values, color=colour, marker="o", markersize=3)
            axes[place].set(xlabel="step")
        axes[0].set_ylim(0, None)
        axes[0].set(ylabel="cosine, hidden layers")
        axes[1].set(ylabel="effective rank, hidden layers")
        text += "\n\n" + saved(
            figure, "guessers-sharpening", "Cosine of a guess and effective rank over training by self-sharpening"
        )
    return text


def structure(draws: bool) -> str:
    """Ranks, subspaces and spectra of a network over training."""
    runs = {name: _watched(None if name == "backpropagation" else GUESSERS[name]) for name in _WATCHED}
    looks = runs["backpropagation"]
    start, last = looks[0], looks[-1]
    spectra, rows = last.spectra, list[list[str]]()
    for number, name in enumerate(last.ranks):
        seen = [spectra.get((number, count)) for count in range(1, 5)]
        decays = ["" if s is None else f"{float(s[min(9, len(s) - 1)] / s[0]):.3f}" for s in seen]
        share, random = last.shares[number]
        rows.append([name, f"{start.ranks[name]:.1f}", f"{last.ranks[name]:.1f}", f"{share:.2f}", f"{random:.2f}"])
        rows[-1] += decays
    header = ["layer", "effective rank at first", f"after {_STEPS} steps", "share in the span", "at random"]
    text = table([*header, *(f"s_10 / s_1, {count} layers" for count in range(1, 5))], rows)
    return f"{text}\n\n{_structure_figure(runs)}" if draws else text


_WATCHED, _STEPS, _LOOK = ("backpropagation", "downstream"), 600, 50


class Look(NamedTuple):
    """What is seen at one step of training; of the spectra, at the last."""

    ranks: dict[str, float]
    shares: dict[int, tuple[float, float]]
    spectra: dict[tuple[int, int], torch.Tensor]


def _watched(guesser: Guesser | None) -> list[Look]:
    torch.manual_seed(0)
    model, whole = mlp(6, 128), data()
    batch, few, looks = (whole[0][:256], whole[1][:256]), (whole[0][:8], whole[1][:8]), list[Look]()

    def look(step: int) -> None:
        if step % _LOOK == 0:
            spectra = jacobian_spectra(model, each, few) if step == _STEPS else {}
            looks.append(Look(effective_ranks(model), subspace_shares(model, each, batch), spectra))

    train(model, guesser, _STEPS, 1e-3, 0, look=look)
    return looks


def _structure_figure(runs: dict[str, list[Look]]) -> str:
    from _figures import BLUE, GREEN, GREY, ORANGE, PINK, panels

    figure, axes = panels(1, 3, 9.6, 2.9)
    steps = range(0, _STEPS + 1, _LOOK)
    for (name, looks), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
        hidden = [statistics.mean(list(look.ranks.values())[1:-1]) for look in looks]
        axes[0].plot(steps, hidden, color=colour, label=name)
        shares = [statistics.mean(share for share, _ in list(look.shares.values())[:-1]) for look in looks]
        axes[1].plot(steps, shares, color=colour, label=name)
    random = [
        statistics.mean(chance for _, chance in list(look.shares.values())[:-1]) for look in runs["backpropagation"]
    ]
    axes[1].plot(steps, random, color=GREY, linestyle="--", label="a random subspace")
    axes[0].set(xlabel="step", ylabel="effective rank, hidden weights")
    axes[1].set(xlabel="step", ylabel="share of the gradient in the span", ylim=(0, 1.03))
    for count, colour in zip(range(1, 5), (BLUE, GREEN, ORANGE, PINK), strict=True):
        values = runs["backpropagation"][-1].spectra[0, count]
        axes[2].semilogy(range(1, 65), values[:64] / values[0], color=colour, label=f"{count} layer{'s' * (count > 1)}")
    axes[2].set(xlabel="singular value", ylabel="over the largest", ylim=(1e-4, 1.3))
    axes[0].legend()
    axes[1].legend(loc="lower right", bbox_to_anchor=(1.0, 0.16))
    axes[2].legend()
    text = "Effective rank, share of the gradient in the span of the activations, and spectra of Jacobians"
    return saved(figure, "guessers-structure", text)


PARTS: dict[str, Callable[[bool], str]] = {
    "memory": lambda draws: memory(SHOWN),
    "cost": lambda draws: cost(),
    "cosine": lambda draws: cosine(),
    "bias": bias,
    "train": lambda draws: training(),
    "structure": structure,
    "sharpening": sharpening,
}


INTRODUCTIONS: dict[str, str] = {
    "memory": (
        "Peak resident memory of one estimate on top of one for 8 examples, medians of three fresh processes: "
        "what is in use (each tensor in a mapping of its own, `MALLOC_MMAP_THRESHOLD_=65536`), and with the "
        "allocator as it is, which keeps some of what is freed and varies by some tens of MiB:"
    ),
    "cost": (
        "What a guess costs, process CPU time, in plain forward passes; medians of ten, interleaved, B = 256. "
        "*Bare kernels* are what no implementation does without, alone in the same process: one forward pass (for "
        "16 guesses, too), noise, the products with W^T (mixing: with the activations), the products that carry "
        "the tangents forward, slopes, sums and outer products. What is above that is overhead:"
    ),
    "cosine": (
        "Mean cosine to the true gradient and one-step effectiveness (the best step along a guess over the best "
        "step along the gradient, in loss) along an AdamW trajectory of backpropagation, 300 steps of 256, a look "
        "every 30, the cosine with three guesses at each:"
    ),
    "bias": (
        "The cosine of the mean of n guesses for one example (mixing: 32) to the true gradient, without the last "
        "layer, which is exact, and its limit; 6 x 128 after 20 steps:"
    ),
    "train": ("Accuracy on all digits by one guess a step, batches of 256, one seed:"),
    "structure": (
        "Effective rank of the weights, share of the gradient in the span of the batch's activations, and decay "
        "of the singular values of Jacobians over 1 to 4 layers; 6 x 128, AdamW at 1e-3, by backpropagation. In "
        "the plot: the mean rank of the hidden weights and the mean share of the hidden layers over training, by "
        "backpropagation and by one guess a step from one layer downstream; and the spectra behind the first "
        "layer after 600 steps of backpropagation, the means over eight examples:"
    ),
    "sharpening": (
        "Self-sharpening: 4 x 256, one layer downstream, uniform noise, the last layer exact, AdamW at 1e-4, "
        "batches of 128; the mean cosine of eight guesses at each look:"
    ),
}
"""What stands above each table in the page."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with --write, also write them and the figures to docs/workloads/."""
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
        found = training(options.runs) if options.runs and name == "train" else PARTS[name](options.write)
        print(f"\n{name}\n\n{found}", flush=True)
        if options.write:
            write_section(f"guessers-{name}", f"{INTRODUCTIONS[name]}\n\n{found}", PAGE)


if __name__ == "__main__":
    main()
