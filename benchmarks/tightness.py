"""How close the samplers come to the true condition numbers; writes its section of docs/benchmarks.md.

The true ones are the limits for small perturbations, from whole matrices of second derivatives in float64, of networks
that are small enough for that: ``sigma_max(H) ||w|| / ||h||`` for the weights, and for the inputs the mean over the
examples of ``sigma_max(d h_i / d x_i) ||x_i|| / ||h_i||``. Needs scikit-learn, and with --write matplotlib. Usage:

    python benchmarks/tightness.py [--seeds 5] [--write]
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from _digits import RATE, digits, train
from _report import table, write_section
from _truth import truth
from overhead import Batch, loss
from torch import nn

from gradmon import measure
from gradmon.perturbations import inputs, weights

STEPS = 300
"""Of training, in the state "trained"."""
B = 64
WIDE_B = 256
EXAMPLES = 8
"""How many of the batch's examples `input_condition` is taken over."""
SCALES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Of the default sampler; its own is 1e-3."""
STATES = ("at initialisation", "trained")
EXPECTED = ((STATES[0], 0.83, 1.01), (STATES[1], 0.95, 1.01))
"""Of `Krylov(3)` on Tanh networks in float32: the state, the least and the largest ratio."""

LANCZOS = weights.Lanczos()
"""The one sampler that takes exact products only."""
WEIGHTS: dict[str, weights.WeightSampler] = {
    "Random": weights.Random(),
    "Targeted": weights.Targeted(),
    "Limited": weights.Limited(),
    **{f"Krylov({k})": weights.Krylov(k) for k in (1, 2, 3, 4)},
    "Lanczos": LANCZOS,
}
INPUTS: dict[str, inputs.InputSampler] = {
    "Random": inputs.Random(examples=EXAMPLES),
    "Targeted": inputs.Targeted(examples=EXAMPLES),
    "Toward": inputs.Toward(examples=EXAMPLES),
    **{f"Ascent({k})": inputs.Ascent(k, examples=EXAMPLES) for k in (1, 2)},
}
ALONE = "own gradient"
"""The input sampler that `Ascent` begins with: each example's input gradient, and nothing else."""


def shallow(activation: type[nn.Module]) -> nn.Module:
    """MLP 64-24-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), activation(), nn.Linear(24, 10))


def deep(activation: type[nn.Module]) -> nn.Module:
    """MLP 16-20-20-20-20-10 on 4 x 4 pixels."""
    hidden = [module for _ in range(3) for module in (nn.Linear(20, 20), activation())]
    first = (nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 20), activation())
    return nn.Sequential(*first, *hidden, nn.Linear(20, 10))


def conv(activation: type[nn.Module]) -> nn.Module:
    """Two convolutions of 8 and 12 channels, and a linear layer."""
    first = (nn.Conv2d(1, 8, 3, 2, 1), activation(), nn.Conv2d(8, 12, 3, 2, 1), activation())
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(48, 10))


def wide(activation: type[nn.Module]) -> nn.Module:
    """MLP 64-256-256-10."""
    first = (nn.Flatten(), nn.Linear(64, 256), activation(), nn.Linear(256, 256), activation())
    return nn.Sequential(*first, nn.Linear(256, 10))


NETWORKS: tuple[Callable[[type[nn.Module]], nn.Module], ...] = (shallow, deep, conv)


class Ratio(NamedTuple):
    """One measured value over the true one.

    Attributes:
        network: Its name.
        activation: "Tanh" or "ReLU".
        state: One of `STATES`.
        seed: Of the network.
        sampler: Its name, or its scale.
        way: "float32", "float64" or "exact" for weights, "inputs float32" and "inputs float64" for inputs, "scale" for
            `Krylov(3)` at several scales, "wide" for these over its exact value, "part" for `Truth.part`.
        value: The ratio; NaN where the library gave no number.
    """

    network: str
    activation: str
    state: str
    seed: int
    sampler: str
    way: str
    value: float


def condition(
    model: nn.Module, batch: Batch, sampler: weights.WeightSampler, derivative: Literal["finite", "exact"]
) -> float:
    """`weight_condition`."""
    found = measure(model, loss, batch, metrics=["weight_condition"], weights=sampler, derivative=derivative)
    return found["weight_condition"].value


def ratios(model: nn.Module, batch: Batch, smooth: bool) -> Iterator[tuple[str, str, float]]:
    """Every sampler's value over the true one.

    Args:
        model: In float32.
        batch: In float32.
        smooth: Whether the model has no kinks, so that float64 is looked at too.

    Yields:
        The sampler's name, the way, and the ratio.
    """
    precise = copy.deepcopy(model).double(), (batch[0].double(), batch[1])
    true = truth(*precise, EXAMPLES)

    yield "", "part", true.part
    for name, sampler in WEIGHTS.items():
        if sampler != LANCZOS:
            yield name, "float32", condition(model, batch, sampler, "finite") / true.weights
            if smooth:
                yield name, "float64", condition(*precise, sampler, "finite") / true.weights
        yield name, "exact", condition(*precise, sampler, "exact") / true.weights
    for scale in SCALES:
        yield f"{scale:.0e}", "scale", condition(*precise, weights.Krylov(scale=scale), "finite") / true.weights
    radii = inputs.Ascent().scale * batch[0].flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    alone = inputs.Fixed((radii * true.directions)[None], EXAMPLES)
    for name, sampler in {**INPUTS, ALONE: alone}.items():
        for way, of, data in (("inputs float32", model, batch), ("inputs float64", *precise))[: 1 + smooth]:
            reading = measure(of, loss, data, metrics=["input_condition"], inputs=sampler)["input_condition"]
            yield name, way, reading.value / true.inputs


def gather(seeds: int) -> Iterator[Ratio]:
    """All ratios of all networks, at initialisation and trained."""
    data = digits()
    batch = data[0][:B], data[1][:B]
    for make in NETWORKS:
        for activation in (nn.Tanh, nn.ReLU):
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make(activation)
                for state in STATES:
                    if state == "trained":
                        train(model, data, STEPS)
                    for sampler, way, value in ratios(model, batch, activation is nn.Tanh):
                        yield Ratio(make.__name__, activation.__name__, state, seed, sampler, way, value)


def gather_wide(seeds: int) -> Iterator[Ratio]:
    """`Krylov(3)` over its exact value, on a network that is too large for its Hessian, and has many kinks."""
    data = digits()
    batch = data[0][:WIDE_B].double(), data[1][:WIDE_B]
    for activation in (nn.Tanh, nn.ReLU):
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = wide(activation)
            for state in STATES:
                if state == "trained":
                    train(model, data, STEPS)
                precise = copy.deepcopy(model).double()
                limit = condition(precise, batch, weights.Krylov(), "exact")
                for scale in SCALES:
                    value = condition(precise, batch, weights.Krylov(scale=scale), "finite") / limit
                    yield Ratio(wide.__name__, activation.__name__, state, seed, f"{scale:.0e}", "wide", value)


def chosen(found: Sequence[Ratio], **wanted: str) -> list[Ratio]:
    """Those with these attributes."""
    return [ratio for ratio in found if all(getattr(ratio, name) == value for name, value in wanted.items())]


def spread(found: Sequence[Ratio]) -> str:
    """Median and range."""
    values = [ratio.value for ratio in found if not math.isnan(ratio.value)]
    if not values:
        return "not available" if found else ""
    missing = f", {len(found) - len(values)} not available" if len(values) < len(found) else ""
    middle, least, most = (digits_of(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most}){missing}"


def digits_of(value: float) -> str:
    """Two decimals, or fewer where they say nothing."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def overview(found: Sequence[Ratio], columns: Sequence[tuple[str, str]], samplers: Sequence[str]) -> str:
    """Samplers against (activation, way), each at initialisation and trained."""
    kinds = [(activation, way, state) for activation, way in columns for state in STATES]
    header = ["", *(f"{activation}, {way.removeprefix('inputs ')}, {state}" for activation, way, state in kinds)]
    rows = [
        [name, *(spread(chosen(found, activation=a, way=way, state=s, sampler=name)) for a, way, s in kinds)]
        for name in samplers
    ]
    return table(header, rows)


def by_scale(found: Sequence[Ratio], way: str) -> str:
    """The default sampler's ratio against the scale of its perturbations; the last row is the limit."""
    kinds = [(activation, state) for activation in ("Tanh", "ReLU") for state in STATES]
    lines = [(f"s = {scale:.0e}", f"{scale:.0e}", way) for scale in SCALES]
    if way == "scale":
        lines.append(("exact", "Krylov(3)", "exact"))
    rows = [
        [name, *(spread(chosen(found, activation=a, state=state, way=of, sampler=key)) for a, state in kinds)]
        for name, key, of in lines
    ]
    return table(["", *(f"{activation}, {state}" for activation, state in kinds)], rows)


def expectations(found: Sequence[Ratio]) -> str:
    """What is expected of the default sampler in float32 on Tanh networks, and the worst case."""
    rows: list[list[str]] = []
    for state, least, most in EXPECTED:
        seen = chosen(found, activation="Tanh", way="float32", sampler="Krylov(3)", state=state)
        for text, worst, missed in (
            (f"at least {least}", min(seen, key=value_of), [r for r in seen if not r.value >= least]),
            (f"at most {most}", max(seen, key=value_of), [r for r in seen if not r.value <= most]),
        ):
            name = {"activation": "Tanh", "network": worst.network, "state": state}
            same = [r for r in found if r.seed == worst.seed and all(getattr(r, k) == v for k, v in name.items())]
            (exact,) = chosen(same, way="exact", sampler="Krylov(3)")
            (part,) = chosen(same, way="part")
            where = f"{worst.value:.3f} (`{worst.network}`, seed {worst.seed})"
            missing = f"{len(missed)} of {len(seen)}"
            rows.append([f"{state}, {text}", missing, where, f"{exact.value:.3f}", f"{part.value:.3f}"])
    header = [
        "expected",
        "missed by",
        "worst case",
        "exact, there",
        "cosine of h and the steepest direction, there",
    ]
    return table(header, rows)


def value_of(ratio: Ratio) -> float:
    """The ratio."""
    return ratio.value


def input_names() -> list[str]:
    """The input samplers, `ALONE` before those that go on from it."""
    names = list(INPUTS)
    return [*names[:3], ALONE, *names[3:]]


def draw_samplers(found: Sequence[Ratio]) -> str:
    """Every sampler's ratios on Tanh networks; the Markdown that shows the figure."""
    from _figures import BLUE, GREY, ORANGE, panels, save

    figure, axes = panels(1, 2, 8.4, 3.4, sharex=True)
    for axis, title, way, samplers in (
        (axes[0], "weight_condition", "float32", [name for name in WEIGHTS if name != "Lanczos"]),
        (axes[1], "input_condition", "inputs float32", input_names()),
    ):
        for place, name in enumerate(reversed(samplers)):
            for state, colour, shift in zip(STATES, (BLUE, ORANGE), (0.17, -0.17), strict=True):
                values = [r.value for r in chosen(found, activation="Tanh", way=way, sampler=name, state=state)]
                heights = [place + shift] * len(values)
                label = state if place == 0 else None
                axis.plot(values, heights, "o", color=colour, alpha=0.5, markersize=4.5, mew=0, label=label)
        axis.axvline(1, color=GREY, linewidth=1, linestyle="--", label="the true value")
        axis.set_yticks(range(len(samplers)), reversed(samplers))
        axis.grid(axis="y", visible=False)
        axis.set(xlim=(0, 1.15), title=title, xlabel="measured value / true value")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return save(figure, "tightness-samplers", "Measured over true condition number for each sampler, Tanh networks")


def draw_scales(found: Sequence[Ratio]) -> str:
    """The default sampler's ratio against its scale, a line a network; the Markdown that shows the figure."""
    from _figures import BLUE, GREEN, GREY, ORANGE, PINK, panels, save

    figure, axes = panels(1, 2, 8.4, 3.6, sharex=True, sharey=True)
    kinds = [(activation, state) for activation in ("Tanh", "ReLU") for state in STATES]
    for axis, way, title in ((axes[0], "scale", "small networks"), (axes[1], "wide", f"a wider one, B = {WIDE_B}")):
        for (activation, state), colour in zip(kinds, (BLUE, GREEN, ORANGE, PINK), strict=True):
            label: str | None = f"{activation}, {state}"
            several = chosen(found, activation=activation, state=state, way=way)
            for network, seed in sorted({(r.network, r.seed) for r in several}):
                line = {r.sampler: r.value for r in several if (r.network, r.seed) == (network, seed)}
                heights = [line[f"{scale:.0e}"] for scale in SCALES]
                axis.plot(SCALES, heights, color=colour, alpha=0.6, linewidth=1, label=label)
                label = None
        guide = (1e-3, 1e-5)
        axis.plot(guide, [0.5 * s**-0.5 for s in guide], ":", color=GREY, linewidth=2, label=r"slope of $s^{-1/2}$")
        axis.axvline(weights.Krylov().scale, color=GREY, linewidth=1, linestyle="--", label="default s")
        axis.set(xscale="log", yscale="log", title=title, xlabel="s, length of the perturbations / length of w")
    axes[0].set_ylabel("measured value / true value")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return save(figure, "tightness-scale", "weight_condition over its limit against the perturbations' length")


def report(found: Sequence[Ratio], figures: Sequence[str], seeds: int) -> str:
    """The section of the page."""
    made = [(make.__name__, (make.__doc__ or "").rstrip("."), make(nn.Tanh)) for make in (*NETWORKS, wide)]
    nets = [f"`{name}`: {text}, {sum(p.numel() for p in of.parameters()):,} weights" for name, text, of in made]
    version = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    samplers, scales = figures or ("", "")
    return f"""## How close the samplers come to the true condition numbers

`python benchmarks/tightness.py --write`. Every number is a measured value over the true one: median and range over
{len(NETWORKS)} networks x {seeds} seeds. 1 is tight. The true values are the limits for small perturbations, from whole
matrices of second derivatives in float64: `sigma_max(H) ||w|| / ||h||`, and for the inputs the mean over
{EXAMPLES} examples of `sigma_max(d h_i / d x_i) ||x_i|| / ||h_i||`.

Cross-entropy on scikit-learn's digits, B = {B}; "trained" is after {STEPS} steps of Adam, learning rate {RATE:g}. All
samplers with their defaults. {version}.

{chr(10).join(f"- {net}" for net in nets[:-1])}

### Weights: `weight_condition`

{samplers}

Tanh networks; one dot a network, finite differences in float32. The same as numbers, and beside them float64 and
`derivative="exact"`, which is the only way for `Lanczos`:

{overview(found, [("Tanh", "float32"), ("Tanh", "float64"), ("Tanh", "exact")], list(WEIGHTS))}

Exact products never exceed the true value. A finite difference can: where the value times s is not small against 1, the
perturbation changes much of the gradient, and the curvature is no longer that at w. Rounding has no part in it: float32
and float64 agree.

`Krylov(3)` is the default of `measure`. What is expected of it on Tanh networks in float32, and what was found:

{expectations(found)}

A Krylov span starts from the gradient h, and finds the steepest direction by the part that h has along it: the cosine
in the last column. Where this is small, three products fall short, with exact ones as well, and more are needed.

### ReLU, and the length of the perturbations

The gradient of a ReLU network jumps at kinks, which second derivatives do not see; what is called true here is the
value on the smooth piece around w. Exact products are below it, finite differences often far above.

{overview(found, [("ReLU", "float32"), ("ReLU", "exact")], list(WEIGHTS))}

A perturbation of length s crosses a number of kinks that is proportional to s, the jumps add up like a random walk, to
the square root of s, and so the quotient grows like s^(-1/2) as s falls, from where it exceeds the smooth part until no
kink is left within s. With one kink left it grows like 1/s. A value of `weight_condition` in a ReLU network is one at a
scale, and `scale_ratio` tells whether that matters.

{scales}

`Krylov(3)` at perturbations of several lengths s, relative to w (1e-3 is the default), in float64. The small networks,
over the true value:

{by_scale(found, "scale")}

A network with more kinks, too large for its Hessian; over the exact value of `Krylov(3)`, B = {WIDE_B}.

- {nets[-1]}

{by_scale(found, "wide")}

### Inputs: `input_condition`

The right half of the first figure. "{ALONE}" is what `Ascent` begins with, each example's own input gradient,
without a step of `J^T J`; `Ascent(1)` is the default. `Random`, `Targeted` and `Toward` use the same perturbations for
all examples. On ReLU networks kinks show here too.

{overview(found, [("Tanh", "inputs float32"), ("Tanh", "inputs float64"), ("ReLU", "inputs float32")], input_names())}
"""


def main() -> None:
    """Print the tables; with --write, also write them and the figures to docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [*gather(options.seeds), *gather_wide(options.seeds)]
    text = report(found, [draw_samplers(found), draw_scales(found)] if options.write else [], options.seeds)
    print(text)
    if options.write:
        write_section("tightness", text)


if __name__ == "__main__":
    main()
