"""What sinks cost: the thread that trains, and the threads on which they work.

A thousand readings, twenty probes of fifty; medians. A Pushgateway is asked only where the program is installed. Usage:

    python benchmarks/sinks.py [--repeats 7] [--write]
"""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from _report import table, write_section

from gradmon import METRICS, Reading
from gradmon.publishing import Failures, Publisher
from gradmon.sinks import JsonlSink, LogSink, MemorySink, Sink
from gradmon_integrations.sinks.prometheus import PrometheusSink
from gradmon_integrations.sinks.pushgateway import PushgatewaySink
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

PROBES, READINGS = 20, 50
LIMIT = 2e-3
"""Seconds that the thread that trains may spend on a thousand readings because there is a sink."""
_NAMES = list(METRICS)

_PATIENCE = 60.0

Make = Callable[[Path], Sink]


def probe(step: int) -> list[Reading]:
    """Every metric of the whole model, and one of layers for the rest."""
    whole = [Reading(name, 1.0 + 1e-3 * step, step) for name in _NAMES]
    layers = [Reading("grad_norm", 1.0 + 1e-3 * step, step, f"layers.{i}") for i in range(READINGS - len(whole))]
    return whole + layers


GIVEN = [probe(step) for step in range(PROBES + 1)]
"""The first of them is for warming up."""


@contextmanager
def pushgateway() -> Iterator[str | None]:
    """The address of a Pushgateway that runs meanwhile; None where there is no such program.

    Raises:
        RuntimeError: It does not start.
    """
    program = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")
    if program is None:
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [program, f"--web.listen-address={address}", "--persistence.file="]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        else:
            raise RuntimeError(f"{program} does not become ready")
        yield address
    finally:
        process.terminate()
        process.wait()


def silent() -> logging.Logger:
    """A logger that makes the text of every record and throws it away."""
    logger = logging.Logger("gradmon.benchmark")
    logger.addHandler(logging.StreamHandler(_Nowhere()))
    return logger


class _Nowhere:
    def write(self, text: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""


def sinks(gateway: str | None) -> dict[str, Make]:
    """The sinks by name, each made in a directory of its own."""
    found: dict[str, Make] = {
        "memory": lambda _: MemorySink(),
        "log": lambda _: LogSink(silent()),
        "jsonl": lambda folder: JsonlSink(folder / "run.jsonl"),
        "tensorboard": lambda folder: TensorBoardSink(folder),
        "prometheus": lambda _: PrometheusSink(linger=0),
    }
    if gateway is not None:
        found["pushgateway, a push each probe"] = lambda _: PushgatewaySink(gateway, interval=0)
    return found


def alone(make: Make, folder: Path) -> float:
    """Seconds that a sink takes for all readings, on the thread that calls it."""
    sink = make(folder)
    sink.write(GIVEN[0])
    began = time.perf_counter()
    for readings in GIVEN[1:]:
        sink.write(readings)
    took = time.perf_counter() - began
    sink.close()
    return took


def training(make: Make | None, folder: Path, alerts: str | None) -> float:
    """CPU seconds of the thread that hands all readings to a monitor's publisher, with or without a sink."""
    publisher = Publisher(alerts, Failures())
    publisher.open([] if make is None else [make(folder)], "benchmark", 0)
    publisher.publish(GIVEN[0])
    publisher.flush(_PATIENCE)
    took = 0.0
    for readings in GIVEN[1:]:
        began = time.thread_time()
        publisher.publish(readings)
        took += time.thread_time() - began
        # Between two probes there is training, in which a sink has time to work.
        publisher.flush(_PATIENCE)
    publisher.close()
    return took


def measured(work: Callable[[Path], float], repeats: int) -> float:
    """The median of several times."""

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return work(Path(folder))

    once()
    return statistics.median(once() for _ in range(repeats))


def rows(repeats: int) -> list[tuple[str, float, float | None]]:
    """The publisher without a sink, and with each: seconds of the thread that trains, and of the sink itself."""
    found: list[tuple[str, float, float | None]] = [
        ("no sink, no alert rules", measured(lambda folder: training(None, folder, None), repeats), None),
        ("no sink, default alert rules", measured(lambda folder: training(None, folder, "default"), repeats), None),
    ]
    with ExitStack() as stack:
        for name, make in sinks(stack.enter_context(pushgateway())).items():
            trains = measured(lambda folder, make=make: training(make, folder, None), repeats)
            found.append((name, trains, measured(lambda folder, make=make: alone(make, folder), repeats)))
    return found


def report(found: Sequence[tuple[str, float, float | None]]) -> str:
    """The table, and what it is of."""
    known = ", ".join(f"{name} {version(name)}" for name in ("torch", "tensorboard", "prometheus-client"))
    lines = [
        "## What sinks cost",
        "",
        f"`python benchmarks/sinks.py --write`. Milliseconds for {PROBES * READINGS} readings, {PROBES} probes of",
        f"{READINGS}; medians. The thread that trains: its own CPU time in `Publisher.publish`, without alert rules",
        "where there is a sink. The sink itself: all it does in `write`, which for all but `memory` and `log` happens",
        f"on a thread of its own. Python {platform.python_version()}, {known}, {platform.machine()}.",
        "",
    ]
    cells = [
        [name, f"{1e3 * trains:.2f}", "" if itself is None else f"{1e3 * itself:.2f}"] for name, trains, itself in found
    ]
    return "\n".join([*lines, table(["", "thread that trains", "sink itself"], cells)])


def main() -> int:
    """Print the table; with --write, also write it to docs/; 1 where the thread that trains pays too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = rows(options.repeats)
    text = report(found)
    print(text)
    if options.write:
        write_section("sinks", text)
    slow = [name for name, trains, itself in found if itself is not None and trains >= LIMIT]
    if slow:
        print(f"\nThe thread that trains pays {1e3 * LIMIT:g} ms or more: {'; '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
