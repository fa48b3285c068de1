"""What a check before the first step foresees, from the results of the zoo; writes its part of docs/preflight.md.

Figures are those of the test half, whose networks played no part in fitting anything; intervals of 95 % resample
networks. --write needs matplotlib. Usage, from the root of the repository:

    python -m benchmarks.foresight [--half test] [--write]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks._report import table, write_section
from benchmarks.zoo.candidates import added
from benchmarks.zoo.configurations import FAMILIES
from benchmarks.zoo.fit import development
from benchmarks.zoo.policies import GATED, POLICIES, STUCK, Policy, cause, flagged, risk, stuck
from benchmarks.zoo.table import Network, Run, networks
from gradmon.preflight._coefficients import LIMIT
from gradmon.preflight.causes import TITLES
from gradmon.preflight.score import early

PAGE = Path(__file__).parent.parent / "docs" / "preflight.md"
FOLDER = PAGE.parent / "preflight"
RESAMPLED = 2000
Array = NDArray[np.float64]


def auroc(scores: Array, failed: Array) -> float:
    """The probability that a failing run has the larger score than a good one; ties count half."""
    bad = failed > 0
    many, few = int(bad.sum()), int((~bad).sum())
    if many == 0 or few == 0:
        return math.nan
    return float((rankdata(scores)[bad].sum() - many * (many + 1) / 2) / (many * few))


def share(hit: Array, among: Array) -> float:
    """The share of some runs that something holds for."""
    return float(hit[among > 0].mean()) if (among > 0).any() else math.nan


def interval(figure: Callable[[Array, Array], float], one: Array, two: Array) -> str:
    """A figure with its 95 % interval, from networks drawn with replacement.

    Args:
        figure: The figure, of two numbers for each run.
        one: The first, (networks, runs of each).
        two: The second.

    Returns:
        The figure in words.
    """
    value = figure(one.ravel(), two.ravel())
    if not math.isfinite(value):
        return "-"
    draw = np.random.default_rng(0).integers(len(one), size=(RESAMPLED, len(one)))
    again = [figure(one[chosen].ravel(), two[chosen].ravel()) for chosen in draw]
    low, high = np.quantile([one for one in again if math.isfinite(one)], [0.025, 0.975])
    return f"{short(value)} [{short(low)}, {short(high)}]"


def short(value: float) -> str:
    """A share to two digits."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else f"{value:.2f}"


def values(found: Sequence[Network], of: Callable[[Run], float]) -> Array:
    """A number for each run, (networks, runs of each)."""
    return np.array([[float(of(run)) for run in network.runs] for network in found])


def own(found: Sequence[Network], of: Callable[[Run], float]) -> Array:
    """A number for each network, at its own learning rate, (networks, 1)."""
    return np.array([[float(of(Run(network, network.of.exponent)))] for network in found])


def _failed(run: Run) -> float:
    return run.failed


def detection(by_family: Mapping[str, Sequence[Network]]) -> str:
    """AUROC of each score, and precision and recall of the flags."""
    scores: dict[str, Callable[[Run], float]] = {
        "risk before the first step": risk,
        "distance of the learning rate from the default": lambda run: abs(run.exponent),
        "loss at step 20": lambda run: early(run.progress),
        "risk with the loss at step 20": lambda run: risk(run, with_loss=True),
    }
    rows = [
        [f"AUROC: {name}", *(interval(auroc, values(f, of), values(f, _failed)) for f in by_family.values())]
        for name, of in scores.items()
    ]
    for name, of in (
        ("before the first step", risk),
        ("with the loss at step 20", scores["risk with the loss at step 20"]),
    ):
        cells = [interval(auroc, own(f, of), own(f, _failed)) for f in by_family.values()]
        rows.append([f"AUROC: risk {name}, only the configurations' own rates", *cells])
    rules: dict[str, Callable[[Run], float]] = {f"flag (risk ≥ {LIMIT:g})": flagged, "stuck at step 20": stuck}
    for name, of in rules.items():
        hits = [(values(f, of), values(f, _failed)) for f in by_family.values()]
        rows.append([f"{name}: precision", *(interval(share, bad, hit) for hit, bad in hits)])
        rows.append([f"{name}: recall", *(interval(share, hit, bad) for hit, bad in hits)])
    heads = [
        f"{family} ({len(f)} networks, {100 * values(f, _failed).mean():.0f} % fail)" for family, f in by_family.items()
    ]
    return table(["", *heads], rows)


def causes(found: Sequence[Network]) -> str:
    """Precision and recall of each cause, over all families: the weightiest of every run."""
    bad = values(found, _failed)
    rows: list[list[str]] = []
    for name in (*TITLES, None):
        hit = values(found, lambda run, name=name: cause(run) == name)
        if hit.any():
            title = "nothing found" if name is None else TITLES[name]
            rows.append([title, str(int(hit.sum())), interval(share, bad, hit), interval(share, hit, bad)])
    return table(["weightiest cause", "runs", "of these fail", "of those that fail"], rows)


def calibration(found: Sequence[Network]) -> str:
    """How many fail in each band of the risk."""
    risks, bad = values(found, risk), values(found, _failed)
    rows: list[list[str]] = []
    for low, high in pairwise((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        inside = ((risks >= low) & ((risks < high) | (high == 1.0))).astype(float)
        if inside.any():
            mean = f"{risks[inside > 0].mean():.2f}"
            rows.append([f"{low:.1f} to {high:.1f}", str(int(inside.sum())), mean, interval(share, bad, inside)])
    brier = float(np.mean((risks - bad) ** 2))
    return table(["risk", "runs", "mean risk", "share that fails"], rows) + f"\n\nBrier score {brier:.3f}."


def direction(found: Sequence[Network]) -> tuple[int, int]:
    """In how many flagged runs that another learning rate of the grid mends the direction of the suggestion is right.

    Returns:
        How many are right, and how many there are.
    """
    right = count = 0
    for run in (run for network in found for run in network.runs):
        mending = [exponent for exponent, loss in run.network.grid.items() if not run.network.fails(loss)]
        offset = run.signs.offset
        if not (run.failed and flagged(run) and mending and (cause(run) or "").startswith("rate")) or offset is None:
            continue
        nearest = min(mending, key=lambda exponent: abs(exponent - run.exponent))
        count += 1
        right += (nearest < run.exponent) == (offset > 0)
    return right, count


def excessive(found: Sequence[Network]) -> tuple[int, float, float]:
    """The runs far above the default: how many there are, the share that fails, the share of these that is flagged."""
    runs = [run for network in found for run in network.excessive]
    bad = np.array([float(run.failed) for run in runs])
    return len(runs), float(bad.mean()), share(np.array([float(flagged(run)) for run in runs]), bad)


def remedies(by_family: Mapping[str, Sequence[Network]]) -> str:
    """What each policy rescues and harms."""
    rows: list[list[str]] = []
    for policy in POLICIES:
        cells: list[str] = []
        for found in by_family.values():
            fails = values(found, lambda run, policy=policy: run.network.fails(policy.final(run)))
            bad = values(found, _failed)
            say = interval if policy is GATED else _plainly
            cells.append(f"{say(share, 1 - fails, bad)} / {say(share, fails, 1 - bad)}")
        rows.append([f"**{policy.name}**" if policy is GATED else policy.name, policy.passes, *cells])
    heads = [f"{family} ({len(found)})" for family, found in by_family.items()]
    return table(["rescued / harmed", "passes", *heads], rows)


def _plainly(figure: Callable[[Array, Array], float], one: Array, two: Array) -> str:
    return short(figure(one.ravel(), two.ravel()))


def further(found: Sequence[Network]) -> str:
    """AUROC of single numbers for a failure at the configurations' own rates, the larger of both directions."""
    names = ("confusion", "coherence", "noise_scale", "gradient_norm", "sig", "relg", "out_sd", "half")
    metrics = ("weight_condition", "weight_cosine", "gradient_rank", "gradient_diversity", "gradient_snr")
    rows: list[list[str]] = []
    for name in (*names, *metrics):
        cells: list[str] = []
        for family in FAMILIES:
            part = [network for network in found if network.of.family == family]
            pairs = [((n.seen if name in names else n.metrics).get(name), n.fails(n.grid[n.of.exponent])) for n in part]
            kept = [(value, failed) for value, failed in pairs if value is not None]
            value = auroc(np.array([v for v, _ in kept], dtype=float), np.array([f for _, f in kept], dtype=float))
            cells.append(f"{short(max(value, 1 - value))}{' (low)' if value < 0.5 else ''}")
        rows.append([f"`{name}`", *cells])
    return table(["AUROC, alone", *FAMILIES], rows)


def aims(by_family: Mapping[str, Sequence[Network]], tried: Mapping[str, Sequence[Network]]) -> str:
    """What the check was meant to reach, and whether it does."""

    def risks(family: str, *, with_loss: bool) -> float:
        found = by_family[family]
        scores = values(found, lambda run: risk(run, with_loss=with_loss))
        return auroc(scores.ravel(), values(found, _failed).ravel())

    def part(family: str, policy: Policy, *, harm: bool) -> float:
        fails = values(tried[family], lambda run: run.network.fails(policy.final(run))).ravel()
        bad = values(tried[family], _failed).ravel()
        return share(fails, 1 - bad) if harm else share(1 - fails, bad)

    everything = [network for found in by_family.values() for network in found]
    right, count = direction(everything)
    precision = share(values(everything, _failed).ravel(), values(everything, flagged).ravel())
    least = [
        *(
            (f"AUROC before the first step, {name}", limit, risks(name, with_loss=False))
            for name, limit in _START.items()
        ),
        *(
            (f"AUROC with the loss at step 20, {name}", limit, risks(name, with_loss=True))
            for name, limit in _EARLY.items()
        ),
        ("precision of the flag", 0.85, precision),
        ("direction of the learning rate", 0.95, right / count if count else math.nan),
        ("rescued, mlp", 0.6, part("mlp", GATED, harm=False)),
        ("rescued, conv", 0.6, part("conv", GATED, harm=False)),
        (
            "rescued, transformer: the default's",
            part("transformer", POLICIES[0], harm=False),
            part("transformer", GATED, harm=False),
        ),
    ]
    most = [(f"harmed, {name}", limit, part(name, GATED, harm=True)) for name, limit in _HARM.items()]
    rows = [[name, f"≥ {short(limit)}", short(value), _met(value >= limit)] for name, limit, value in least]
    rows += [[name, f"≤ {short(limit)}", short(value), _met(value <= limit)] for name, limit, value in most]
    return table(["", "aim", "reached", ""], rows)


_START = {"mlp": 0.90, "conv": 0.86, "transformer": 0.87}
_EARLY = {"mlp": 0.92, "conv": 0.90, "transformer": 0.91}
_HARM = {"mlp": 0.03, "conv": 0.08, "transformer": 0.10}


def _met(holds: bool) -> str:
    return "yes" if holds else "**no**"


def draw(found: Sequence[Network]) -> str:
    """Draw the risks of failing and of good runs, and how often it is right; the Markdown that shows it."""
    from benchmarks._figures import BLUE, GREY, ORANGE, panels

    risks, bad = values(found, risk).ravel(), values(found, _failed).ravel() > 0
    figure, (left, right) = panels(1, 2, 7.0, 2.8)
    bins = np.linspace(0, 1, 11)
    left.hist([risks[~bad], risks[bad]], bins=bins, stacked=True, color=[BLUE, ORANGE], label=["trains", "fails"])
    left.axvline(LIMIT, color=GREY, linestyle=":")
    left.set(xlabel="risk before the first step", ylabel="runs")
    left.legend(loc="upper center")
    places = np.clip((risks * 10).astype(int), 0, 9)
    kept = [place for place in range(10) if (places == place).any()]
    means = [risks[places == place].mean() for place in kept]
    right.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    right.plot(means, [bad[places == place].mean() for place in kept], "o-", color=BLUE)
    right.set(xlabel="risk before the first step", ylabel="share that fails")
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / "risk.svg", metadata={"Date": None})
    return "![The risk of failing and of good runs, and the share that fails against it](preflight/risk.svg)"


def report(half: str, figure: str = "") -> str:
    """The part of the page."""
    everything = networks()
    found = [network for network in everything if network.of.half == half and network.known]
    missing = sum(network.of.half == half for network in everything) - len(found)
    by_family = {family: [n for n in found if n.of.family == family] for family in FAMILIES}
    tried = {family: [n for n in part if n.anew_best is not None] for family, part in by_family.items()}
    right, count = direction(found)
    wild = excessive(found)
    failing = [network for network in found if all(run.failed for run in network.runs)]
    passes = [network.seen["passes"] for network in everything]
    base, gains = added(development())
    dev = [network for network in everything if network.of.half == "dev" and network.known]
    return f"""### What it foresees

`python -m benchmarks.foresight --write`, on the {half} half: {len(found)} networks, {missing} more without a risk, each
at {len(found[0].runs)} learning rates. Intervals of 95 % resample networks. The check took {min(passes)} to
{max(passes)} passes.

{aims(by_family, tried)}

{detection(by_family)}

Where the learning rate was the weightiest cause of a flagged run that fails, and some other learning rate of the grid
mends it, its direction was right in {right} of {count} runs. Of the {len(found)} networks {len(failing)} fail at every
learning rate of the grid: initialisation and architecture are the lever there. At 30, 100 and 1000 times the default,
which the grid does not reach, {100 * wild[1]:.0f} % of {wild[0]} runs fail, and {100 * wild[2]:.0f} % of these are
flagged.

### Causes

All families together; the weightiest cause of each run. "Of these fail" is the precision, "of those that fail" the
recall.

{causes(found)}

### Calibration

All families together.

{figure}

{calibration(found)}

### Remedies

One round, restart from the start: the share of the failing runs that train with the policy, and of the good runs that
fail with it. "Stuck" is a loss after 20 steps above {STUCK:g} of that at chance. In parentheses the networks.

{remedies(tried)}

### What else was looked at

On the development half ({len(dev)} networks). First each number alone; "low" where a small number speaks for failure.

{further(dev)}

Then what each would add to the risk: by how much the log-loss of held-out folds falls, from {base:.3f}, with one linear
part more.

{table(["part", "fall of the log-loss"], [[f"`{name}`", f"{gain:+.3f}"] for name, gain in gains.items()])}
"""


def main() -> None:
    """Print the figures; with --write, also write them to docs/preflight.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("dev", "test"), default="test")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    kept = [network for network in networks() if network.of.half == options.half and network.known]
    text = report(options.half, draw(kept) if options.write else "")
    print(text)
    if options.write:
        write_section("foresight", text, PAGE)


if __name__ == "__main__":
    main()
