"""Files as a monitor writes them, and the page that `gradmon report` makes of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradmon import Monitor, every
from gradmon._reading import Alert, Reading
from gradmon.sinks import JsonlSink
from gradmon_integrations.report.command import COMMAND
from tests.integrations.report_pages import Page, check_accessible, check_self_contained, read_page


def report(*arguments: object) -> int:
    """`gradmon report` with these arguments."""
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args([str(argument) for argument in arguments]))


def page_of(tmp_path: Path, *files: Path) -> Page:
    """The page of some files, which has to be well formed, accessible, and on its own."""
    output = tmp_path / "page" / "report.html"
    assert report(*files, "-o", output) == 0
    page = read_page(output.read_text(encoding="utf-8"))
    check_accessible(page)
    check_self_contained(page)
    return page


def write(
    path: Path,
    readings: Sequence[Reading],
    alerts: Sequence[Alert] = (),
    *,
    run: str = "mine",
    rank: int = 0,
    info: dict[str, str | int | float | bool] | None = None,
    ended: bool | None = True,
) -> Path:
    """A file as a monitor's sink writes it."""
    sink = JsonlSink(path)
    sink.bind(run, rank)
    if info is not None:
        sink.describe(info)
    sink.write(readings)
    for alert in alerts:
        sink.alert(alert)
    if ended is not None:
        sink.finish(ended)
    sink.close()
    return path


def course(name: str, values: Sequence[float], *, layer: str | None = None, reason: str | None = None) -> list[Reading]:
    """Readings of the steps 1, 2, ..."""
    return [
        Reading(name, value, step, layer, reason=reason if math.isnan(value) else None)
        for step, value in enumerate(values, start=1)
    ]


def firing(rule: str, step: int, *, severity: str = "warning", layer: str | None = None, **more: object) -> Alert:
    fields = {"value": 2.0, "message": f"{rule} was seen.", "remedy": f"Mend {rule}.", **more}
    return Alert(rule, severity, "firing", step=step, layer=layer, **fields)  # type: ignore[arg-type]


def resolved(rule: str, step: int, *, severity: str = "warning", layer: str | None = None) -> Alert:
    return Alert(rule, severity, "resolved", 0.5, step, layer, f"{rule} is over.", "")  # type: ignore[arg-type]


def train(path: Path, run: str, gain: float, rate: float, steps: int = 60) -> None:
    """A real run on separable data."""
    generator = torch.Generator().manual_seed(0)
    widths = [8, *[16] * (2 if gain == 1 else 6)]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs), generator=generator)
        nn.init.zeros_(layer.bias)
        parts += [layer, nn.Tanh()]
    last = nn.Linear(16, 3)
    nn.init.normal_(last.weight, std=0.1, generator=generator)
    nn.init.zeros_(last.bias)
    model = nn.Sequential(*parts, last)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    inputs = torch.randn(480, 8, generator=generator)
    labels = inputs[:, :3].argmax(1)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    sink = f"jsonl:{path}"
    with Monitor(
        model, optimizer, loss, run=run, schedule=every(2), layers=True, sinks=sink, hparams={"gain": gain}
    ) as monitor:
        order = [torch.randperm(480, generator=generator)[:32] for _ in range(steps)]
        for chosen in islice(order, steps):
            batch = (inputs[chosen], labels[chosen])
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
