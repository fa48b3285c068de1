"""What a mask costs in accuracy, and what it saves in time; writes its section of docs/benchmarks.md.

Error: the same network, batch and perturbations with and without a mask, over the seeds of the mask. Time: one thread,
process CPU time of `gradmon.measure` with one metric, in plain training steps of the same network, interleaved with
these, medians. Needs scikit-learn, and with --write matplotlib. Usage:

    python benchmarks/masks.py [--seeds 20] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from _digits import RATE, digits, train
from _engines import optimizer_of, trained
from _report import table, write_section
from overhead import Batch, loss, timed
from torch import nn

from gradmon import Mask, measure, per_example_gradients
from gradmon.perturbations.inputs import Ascent

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
STEPS = 50
"""Of training, in the state "trained"."""
B = 128
EXAMPLES = 4
"""How many of the batch's examples `input_condition` is taken over."""
METRICS = (
    "weight_condition",
    "weight_cosine",
    "weight_diversity",
    "weight_coherence",
    "input_condition",
    "gradient_rank",
    "gradient_confusion",
    "gradient_diversity",
    "gradient_coherence",
    "noise_scale",
    "gradient_snr",
)
TURN = "1 - weight_cosine"
"""Beside the metrics, because an error relative to a number near 1 is small whatever becomes of the turn."""


def mlp() -> nn.Module:
    """MLP 64-256-256-10 with ReLU."""
    first = (nn.Flatten(), nn.Linear(64, 256), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def conv() -> nn.Module:
    """Three convolutions of 16, 32 and 32 channels with ReLU, and a linear layer."""
    layers: list[nn.Module] = []
    for inner, outer, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


NETWORKS: tuple[Callable[[], nn.Module], ...] = (mlp, conv)


class Errors(NamedTuple):
    """What masks did to the metrics of one network in one state.

    Attributes:
        network: Its name.
        state: "at initialisation" or "trained".
        whole: The value of each metric without a mask.
        relative: For each metric and fraction, the relative errors, one a seed of the mask; none where the value
            without a mask is 0 or infinite.
        bias: The last bias' part of the examples' squared gradients.
    """

    network: str
    state: str
    whole: Mapping[str, float]
    relative: Mapping[str, Mapping[float, list[float]]]
    bias: float


def values(model: nn.Module, batch: Batch, mask: Mask | None) -> dict[str, float]:
    """All metrics, and `TURN`."""
    readings = measure(model, loss, batch, metrics=METRICS, inputs=Ascent(examples=EXAMPLES), mask=mask)
    found = {name: reading.value for name, reading in readings.items()}
    return {**found, TURN: 1 - found["weight_cosine"]}


def errors(model: nn.Module, batch: Batch, seeds: int) -> tuple[dict[str, float], dict[str, dict[float, list[float]]]]:
    """The metrics without a mask, and their relative errors with masks of all sizes."""
    whole = values(model, batch, None)
    relative: dict[str, dict[float, list[float]]] = {name: {} for name in whole}
    for fraction in FRACTIONS:
        # All masks of 100 % are the same one.
        for seed in range(seeds if fraction < 1 else 1):
            for name, value in values(model, batch, Mask(fraction, seed)).items():
                if math.isfinite(whole[name]) and whole[name] != 0:
                    relative[name].setdefault(fraction, []).append(abs(value - whole[name]) / abs(whole[name]))
    return whole, relative


def bias_part(model: nn.Module, batch: Batch) -> float:
    """The part of the examples' squared gradients that is in the last tensor, a bias of 10 weights."""
    squares = per_example_gradients(model, loss, batch).square().sum(0)
    return float(squares[-10:].sum() / squares.sum())


def times(model: nn.Module, batch: Batch, repeats: int) -> tuple[float, dict[str, dict[float | None, float]]]:
    """Seconds of a plain step, and how many of these each metric takes at each fraction; None is without a mask."""
    plain = trained(model, batch, optimizer_of(model))

    def work_of(name: str, fraction: float | None) -> Callable[[], object]:
        mask = None if fraction is None else Mask(fraction)
        inputs = Ascent(examples=EXAMPLES)
        return lambda: measure(model, loss, batch, metrics=[name], inputs=inputs, mask=mask)

    works = {(name, fraction): work_of(name, fraction) for name in METRICS for fraction in (*FRACTIONS, None)}
    seconds: dict[tuple[str, float | None], list[float]] = {key: [] for key in works}
    base: list[float] = []
    for work in (plain, *works.values()):
        work()
    for _ in range(repeats):
        for key, work in works.items():
            base.append(timed(plain))
            seconds[key].append(timed(work))
    step = statistics.median(base)
    ratios: dict[str, dict[float | None, float]] = {name: {} for name in METRICS}
    for (name, fraction), found in seconds.items():
        ratios[name][fraction] = statistics.median(found) / step
    return step, ratios


def percent(fraction: float) -> str:
    """A fraction as per cent."""
    return f"{100 * fraction:g} %"


def middle(found: Sequence[float]) -> float:
    """The median; infinite where it is one of a masked metric that is not finite."""
    return statistics.median(math.inf if math.isnan(x) else x for x in found)


def high(found: Sequence[float]) -> float:
    """The 90th percentile: the smallest that at least 90 % do not exceed."""
    ordered = sorted(math.inf if math.isnan(x) else x for x in found)
    return ordered[math.ceil(0.9 * len(ordered)) - 1]


def rounded(error: float) -> str:
    """An error in per cent, with two digits at most."""
    if math.isinf(error):
        return "no number"
    return "<0.01" if 100 * error < 0.01 else f"{100 * error:.0f}" if 100 * error >= 9.95 else f"{100 * error:.2g}"


def error_table(of: Errors) -> str:
    """Metrics against fractions."""
    rows: list[list[str]] = []
    for name, whole in of.whole.items():
        row = [name, f"{whole:.3g}"]
        for fraction in FRACTIONS:
            found = of.relative[name].get(fraction)
            row.append(f"{rounded(middle(found))}, {rounded(high(found))}" if found else "")
        rows.append(row)
    return table(["", "without a mask", *(percent(fraction) for fraction in FRACTIONS)], rows)


def time_table(ratios: Mapping[str, Mapping[float | None, float]]) -> str:
    """Metrics against fractions."""
    rows = [[name, *(f"{of[fraction]:.1f}" for fraction in (*FRACTIONS, None))] for name, of in ratios.items()]
    return table(["", *(percent(fraction) for fraction in FRACTIONS), "without a mask"], rows)


def draw(found: Sequence[Errors], ratios: Mapping[str, Mapping[str, Mapping[float | None, float]]]) -> list[str]:
    """The figures, and the Markdown that shows them."""
    from _figures import BLUE, ORANGE, panels, save

    colours = {make.__name__: colour for make, colour in zip(NETWORKS, (BLUE, ORANGE), strict=True)}
    places, names = [0.005, 0.05, 0.5], ["0.5 %", "5 %", "50 %"]

    figure, axes = panels(3, 4, 9.0, 6.4, sharex=True, sharey=True)
    for axis, name in zip(axes, (*METRICS, TURN), strict=True):
        for of in found:
            cells = [(f, of.relative[name][f]) for f in FRACTIONS if f in of.relative[name] and f < 1]
            style, label = "--" if of.state == "at initialisation" else "-", f"{of.network}, {of.state}"
            middles, highs = ([take(cell) for _, cell in cells] for take in (middle, high))
            reach = [fraction for fraction, _ in cells]
            axis.plot(reach, middles, style, color=colours[of.network], label=label)
            axis.fill_between(reach, middles, highs, color=colours[of.network], alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log", title=name, ylim=(2e-5, 20), xlim=(0.005, 0.5))
        axis.set_xticks(places, names)
        axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1, 10], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %", "1000 %"])
        axis.minorticks_off()
    figure.supxlabel("size of the mask, part of each tensor's coordinates", fontsize=9)
    figure.supylabel("relative error: median, and up to the 90th percentile", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    lines = [save(figure, "masks-error", "Relative error of each metric against the size of the mask")]

    figure, axes = panels(3, 4, 9.0, 6.0, sharex=True)
    for axis, name in zip(axes, METRICS, strict=False):
        for network, of in ratios.items():
            axis.plot(
                FRACTIONS, [of[name][f] for f in FRACTIONS], "o-", markersize=3, color=colours[network], label=network
            )
            axis.axhline(of[name][None], linestyle=":", color=colours[network], label=f"{network}, without a mask")
        axis.set(xscale="log", title=name)
        axis.set_ylim(bottom=0)
        axis.set_xticks(places, names)
        axis.minorticks_off()
    axes[-1].set_visible(False)
    axes[7].tick_params(labelbottom=True)
    figure.supxlabel("size of the mask, part of each tensor's coordinates", fontsize=9)
    figure.supylabel("CPU time of one measurement, in plain training steps", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    lines.append(save(figure, "masks-time", "CPU time of measuring each metric against the size of the mask"))
    return lines


def report(
    found: Sequence[Errors],
    took: Mapping[str, tuple[float, Mapping[str, Mapping[float | None, float]]]],
    figures: Sequence[str],
    seeds: int,
) -> str:
    """The section of the page."""
    made = [(make.__name__, (make.__doc__ or "").rstrip("."), make()) for make in NETWORKS]
    nets = [f"- `{name}`: {text}, {sum(p.numel() for p in of.parameters()):,} weights" for name, text, of in made]
    version = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    starts = [of for of in found if of.state == "at initialisation"]
    parts = " and ".join(f"{100 * of.bias:.0f} % ({of.network})" for of in starts)
    error_figure, time_figure = figures or ("", "")
    error_tables = [f"#### {of.network}, {of.state}\n\n{error_table(of)}" for of in found]
    time_tables = [
        f"#### {network}: a plain step takes {1e3 * step:.1f} ms\n\n{time_table(ratios)}"
        for network, (step, ratios) in took.items()
    ]
    return f"""## What a mask costs, and what it saves

`python benchmarks/masks.py --write`. A mask looks at a fixed random part of the coordinates of every tensor of weights.
`Monitor` takes 5 % unless told otherwise, `measure` takes all.

Cross-entropy on scikit-learn's digits, B = {B}, float32; "trained" is after {STEPS} steps of Adam, learning rate
{RATE:g}. Samplers with their defaults, `input_condition` over {EXAMPLES} examples. {version}.

{chr(10).join(nets)}

### Error against the mask's size

{error_figure}

The error relative to the value without a mask, in per cent, over {seeds} seeds of the mask; same network, batch and
perturbations. Lines, and the first number of a cell, are medians; bands, and the second number, reach up to the 90th
percentile. Empty where the value without a mask is infinite.

`weight_cosine` is near 1, and so its relative error is small; `{TURN}` is what a mask does to the turn.
`gradient_confusion` hangs on the most contrary pair alone, and `noise_scale` on the little signal that is left under
the noise: these need the largest masks. Small tensors that carry much of the gradient make all errors larger: of the
last bias' 10 entries a mask of up to 10 % keeps one, and at initialisation this bias holds {parts}
of the examples' squared gradients.

{(chr(10) * 2).join(error_tables)}

### Time against the mask's size

{time_figure}

CPU time of one `gradmon.measure` with this metric only, in plain training steps of the same network, trained; one
thread, medians, interleaved. The four `weight_` metrics share their passes when they are measured together, and so do
those from `gradient_rank` to `gradient_snr`. `measure` finds out anew each time how the model treats its examples,
which a `Monitor` does once.

A mask does not make the passes through the model any shorter. Inner products of the examples' gradients need no mask:
without one they come from the layers' inputs and the gradients at their outputs, with one from the coordinates
themselves. `gradient_snr` does look at single coordinates.

{(chr(10) * 2).join(time_tables)}
"""


def main() -> None:
    """Print the tables; with --write, also write them and the figures to docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    batch = data[0][:B], data[1][:B]
    found: list[Errors] = []
    took: dict[str, tuple[float, dict[str, dict[float | None, float]]]] = {}
    for make in NETWORKS:
        torch.manual_seed(0)
        model = make()
        for state in ("at initialisation", "trained"):
            if state == "trained":
                train(model, data, STEPS)
            found.append(Errors(make.__name__, state, *errors(model, batch, options.seeds), bias_part(model, batch)))
        took[make.__name__] = times(copy.deepcopy(model), batch, options.repeats)
    figures = draw(found, {network: ratios for network, (_, ratios) in took.items()}) if options.write else []
    text = report(found, took, figures, options.seeds)
    print(text)
    if options.write:
        write_section("masks", text)


if __name__ == "__main__":
    main()
