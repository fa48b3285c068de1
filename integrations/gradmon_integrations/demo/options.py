"""The arguments of `gradmon demo`, checked one by one, so that a message names the option it is about."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from gradmon.options import known_metrics
from gradmon_integrations.demo.data import EXAMPLES

_DESCRIPTION = """\
Trains two networks on scikit-learn's digits, side by side and on the same batches: "healthy", and "ill-conditioned",
which is too deep, badly initialised and trained with too long steps. A monitor watches the gradient of each. At the end
it says which numbers tell the two apart, and what would have to be changed."""

_EPILOG = """\
The log directory holds, for each run, TensorBoard's events (DIR/healthy/) and all readings and alerts as JSON lines
(DIR/healthy.jsonl). Prometheus can scrape the demo while it runs; --steps 20000 gives it something to look at. Ctrl-C
ends it early, with the verdict so far and exit status 130. Where the output is no terminal, plain lines are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what `--help` says around them."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--steps", type=_whole(1), default=300, metavar="N", help="training steps of each run (300)")
    parser.add_argument(
        "--every", type=_whole(1), default=10, metavar="N", help="look every N steps, and at the first three (10)"
    )
    parser.add_argument(
        "--batch-size", type=_whole(2, EXAMPLES), default=64, metavar="N", help="examples of a batch (64)"
    )
    parser.add_argument(
        "--metrics",
        type=_metrics,
        metavar="NAME,...",
        help="what to measure, see `gradmon metrics`; loss always is (all)",
    )
    parser.add_argument(
        "--mask", type=_fraction, default=0.05, metavar="P", help="part of the weights to look at, in (0, 1] (0.05)"
    )
    parser.add_argument(
        "--seed", type=_whole(0, 2**31 - 1), default=0, metavar="N", help="seed of weights, batches and mask (0)"
    )
    parser.add_argument(
        "--logdir", type=Path, metavar="DIR", help="where to write; must not hold a demo yet (runs/demo-DATE-TIME)"
    )
    parser.add_argument(
        "--prometheus-port",
        type=_port,
        default=0,
        metavar="PORT",
        help="port of /metrics; 0: any free one; none: off (0)",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines on a terminal, too")


def default_logdir() -> Path:
    """A directory of its own for each demo: ``runs/demo-<date>-<time>``."""
    return Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"


def chosen_metrics(wanted: Sequence[str] | None) -> list[str]:
    """The metrics to measure, in the order of the table: those wanted, or all but those on demand; and the loss."""
    known = known_metrics()
    names = [name for name, metric in known.items() if not metric.on_demand] if wanted is None else wanted
    return list(dict.fromkeys(["loss", *names]))


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    must = f"must be a whole number from {least}" + ("" if most is None else f" to {most}")

    def convert(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{must}. Got {text!r}.")
        return int(text)

    return convert


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]. Got {text!r}.")
    return fraction


def _port(text: str) -> int | None:
    """A port; None for no server."""
    if text in ("none", "-1"):
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, or none. Got {text!r}.")
    return int(text)


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known_metrics()]
    if unknown or not names:
        wrong = ", ".join(map(repr, unknown)) or repr(text)
        raise argparse.ArgumentTypeError(f"must be names that `gradmon metrics` lists, with commas. Got {wrong}.")
    return names
