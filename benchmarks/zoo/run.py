"""Runs the zoo: trains, measures, tries the remedies. What is there already is not done again.

Usage, from the root of the repository:

    python -m benchmarks.zoo.run [--stage trained] [--only mlp] [--minutes 60]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.zoo.configurations import FAMILIES, SIZES, Configuration, configuration
from benchmarks.zoo.measuring import measured
from benchmarks.zoo.records import append, read
from benchmarks.zoo.remedies import remedied
from benchmarks.zoo.training import excessive, trained

STAGES: dict[str, Callable[[Configuration], dict[str, Any]]] = {
    "trained": trained,
    "excessive": excessive,
    "measured": measured,
    "remedied": remedied,
}


def mixed(families: list[str]) -> list[Configuration]:
    """All configurations, the families in turn in proportion to their sizes."""
    places = [
        ((number + 0.5) / SIZES[family], family, number) for family in families for number in range(SIZES[family])
    ]
    return [configuration(family, number) for _, family, number in sorted(places)]


def main() -> None:
    """Run the stages until all is done or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(STAGES), action="append", help="all by default")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="all by default")
    parser.add_argument("--minutes", type=float, default=1e9, help="when to stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    stages = options.stage or list(STAGES)
    done = {stage: read(stage) for stage in stages}
    for of in mixed(options.only or list(FAMILIES)):
        for stage in stages:
            if of.name in done[stage]:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                return
            append(stage, STAGES[stage](of))


if __name__ == "__main__":
    main()
