"""`gradmon workload guessers`: trains by guessed gradients, and says what the guesses are worth."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch

from gradmon._errors import ArgumentError
from gradmon.sinks import Sink
from gradmon_integrations.workloads.data import LOADERS, load
from gradmon_integrations.workloads.guessers.experiment import MODELS, Outcome, Plan, train
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.matched import CosineMatched
from gradmon_integrations.workloads.guessers.registry import GUESSERS

_DEFAULT = "directional,activation,weight-transpose"
_MATCHED = "cosine-"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Trains networks by gradients that are guessed from directional derivatives, beside one by backpropagation, on "
        'the same batches and each under the monitor (arXiv 2312.04709, "How to Guess a Gradient").'
    )
    parser.add_argument("--model", choices=MODELS, default="mlp-3x128", help="the network (mlp-3x128)")
    images = [name for name in LOADERS if name != "imdb"]
    parser.add_argument("--data", choices=images, default="digits", help="what to train on (digits)")
    parser.add_argument(
        "--guesser",
        type=_guessers,
        default=_DEFAULT,
        metavar="NAME,...",
        help=f"some of {', '.join(GUESSERS)}, or cosine-C for an unbiased guess of cosine C ({_DEFAULT})",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_whole, metavar="N", help="training steps of each run (300)")
    length.add_argument("--epochs", type=_whole, metavar="N", help="instead of --steps: passes over the data")
    parser.add_argument("--batch-size", type=_whole, default=128, metavar="N", help="examples of a batch (128)")
    parser.add_argument("--lr", type=_rate, default=1e-3, metavar="RATE", help="AdamW's learning rate (0.001)")
    parser.add_argument("--guesses", type=_whole, default=1, metavar="N", help="guesses averaged in a step (1)")
    parser.add_argument("--exact-last", action="store_true", help="give the last layer its true gradient")
    parser.add_argument("--per-layer", action="store_true", help="one derivative for each layer, in a pass of its own")
    parser.add_argument("--every", type=_whole, default=50, metavar="N", help="look every N steps (50)")
    parser.add_argument("--seeds", type=_whole, default=1, metavar="N", help="runs of each kind (1)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where downloaded data is kept")
    parser.add_argument("--logdir", type=Path, metavar="DIR", help="where to write (runs/guessers-DATE-TIME)")
    parser.add_argument("--prometheus-port", type=_port, metavar="PORT", help="port of /metrics; 0: any free one (off)")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print a table.

    Args:
        arguments: What `configure` describes.

    Returns:
        The exit status, 0.

    Raises:
        ArgumentError: The log directory holds such runs already.
    """
    data = load(arguments.data, data_root=arguments.data_root)
    steps = arguments.steps or 300
    if arguments.epochs is not None:
        steps = max(1, math.ceil(arguments.epochs * len(data.train_targets) / arguments.batch_size))
    plan = Plan(
        arguments.model,
        steps,
        arguments.lr,
        arguments.batch_size,
        min(arguments.every, steps),
        arguments.exact_last,
        arguments.per_layer,
        arguments.guesses,
    )
    chosen: dict[str, Guesser | None] = {"backpropagation": None, **arguments.guesser}
    logdir: Path = arguments.logdir or Path("runs") / f"guessers-{datetime.now():%Y%m%d-%H%M%S}"
    labels = {
        name: [name if arguments.seeds == 1 else f"{name}-{seed}" for seed in range(arguments.seeds)] for name in chosen
    }
    if taken := [logdir / label for some in labels.values() for label in some if (logdir / label).exists()]:
        raise ArgumentError("--logdir", "be a directory that holds no such runs yet", taken[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{plan.model} on {data.name}: {steps} steps of {plan.batch_size} examples, AdamW at {plan.rate:g}")
    try:
        with ExitStack() as stack:
            server = _server(arguments.prometheus_port, stack)
            print(f"{'':<20}{'loss':>10}{'accuracy':>18}{'cosine':>10}{'one step':>10}", flush=True)
            for name, guesser in chosen.items():
                found: list[Outcome] = []
                for seed, label in enumerate(labels[name]):
                    watching, telling = _sinks(logdir, label, server, stack)
                    found.append(train(data, plan, guesser, seed, watching, telling, label))
                print(_line(name, found), flush=True)
    finally:
        torch.set_num_threads(threads)
    print("accuracy: on the test examples; cosine: of a guess to the true gradient; one step: the best step along a")
    print("guess over the best step along the gradient, in loss; means over all looks.")
    if plan.exact_last:
        print("The cosine leaves out the last layer, whose gradient is exact.")
    print(f"tensorboard --logdir {logdir}")
    return 0


def _server(port: int | None, stack: ExitStack) -> object | None:
    if port is None:
        return None
    from gradmon_integrations.sinks.prometheus import PrometheusSink

    server = PrometheusSink(port)
    stack.callback(server.close)
    print(f"metrics: {server.url}")
    return server


def _sinks(logdir: Path, label: str, server: object | None, stack: ExitStack) -> tuple[list[Sink], list[Sink]]:
    """The monitor's sinks, and those for what is said about guesses."""
    from gradmon_integrations.sinks.prometheus import PrometheusSink
    from gradmon_integrations.sinks.tensorboard import TensorBoardSink

    watching: list[Sink] = [TensorBoardSink(logdir / label)]
    telling: list[Sink] = [] if label.startswith("backpropagation") else [TensorBoardSink(logdir / label / "guesses")]
    if isinstance(server, PrometheusSink):
        watching.append(server.sibling(label))
        if telling:
            telling.append(server.sibling(f"{label}-guesses"))
    for sink in (*watching, *telling):
        stack.callback(sink.close)
    return watching, telling


def _line(name: str, found: Sequence[Outcome]) -> str:
    accuracies = [of.accuracy for of in found]
    spread = f" ± {statistics.stdev(accuracies) / math.sqrt(len(found)):.3f}" if len(found) > 1 else ""
    cosines = [value for of in found for value in of.cosines if math.isfinite(value)]
    gains = [value for of in found for value in of.effectiveness if math.isfinite(value)]
    told = [f"{statistics.mean(values):.3f}" if values else "" for values in (cosines, gains)]
    right = f"{statistics.mean(accuracies):.3f}{spread}"
    return f"{name:<20}{statistics.mean(of.loss for of in found):>10.4f}{right:>18}{told[0]:>10}{told[1]:>10}"


def _guessers(text: str) -> dict[str, Guesser]:
    found: dict[str, Guesser] = {}
    for name in (part.strip() for part in text.split(",")):
        if name in GUESSERS:
            found[name] = GUESSERS[name]
            continue
        start, rest = name[: len(_MATCHED)], name[len(_MATCHED) :]
        try:
            found[name] = CosineMatched(float(rest if start == _MATCHED else "nan"))
        except (ValueError, ArgumentError):
            known = f"{', '.join(GUESSERS)}, or {_MATCHED}C with C in (0, 1]"
            raise argparse.ArgumentTypeError(f"must be among {known}. Got {name!r}.") from None
    return found


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1. Got {text!r}.")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number. Got {text!r}.")
    return rate


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535. Got {text!r}.")
    return int(text)
