"""What guesses cost beside the bare kernels that they cannot do without, and how much memory they take."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _guesser_nets import Batch, each, mlp, true
from _report import table
from overhead import timed
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradmon_integrations.workloads.guessers import GUESSERS, Estimator, GuessedGradient, estimate_gradient
from gradmon_integrations.workloads.guessers.noise import Seeded
from gradmon_integrations.workloads.guessers.passes import Passes

NETS = ((6, 128), (6, 512))
COUNTED = ("directional", "activation", "weight-transpose", "downstream", "mixing")
_TOGETHER = 8
"""Tangents that share a product."""


class Idle(Optimizer):
    """Makes no step: what is left is the estimate."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(list(model.parameters()), {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do nothing."""


def cost() -> str:
    """What a guess costs in plain forward passes."""
    columns: list[dict[str, tuple[float | None, float]]] = []
    for depth, width in NETS:
        torch.manual_seed(0)
        model, batch = mlp(depth, width), (torch.randn(256, 64), torch.randint(10, (256,)))
        columns.append(_costs(model, batch))
    header = ["per guess, in forward passes"]
    header += [f"{depth} x {width}: {kind}" for depth, width in NETS for kind in ("bare kernels", "measured")]
    rows = []
    for name in columns[0]:
        cells = [f"{value:.2f}" if value is not None else "" for column in columns for value in column[name]]
        rows.append([name, *cells])
    return table(header, rows)


def _costs(model: nn.Module, batch: Batch) -> dict[str, tuple[float | None, float]]:
    """By the name of a work: the bare kernels of a guess, and the guess, in forward passes."""

    def forward() -> None:
        with torch.no_grad():
            each(model, batch)

    works: dict[str, tuple[Callable[[], object], int, str | None]] = {
        "plain forward pass": (forward, 1, None),
        "backpropagation": (lambda: true(model, batch), 1, None),
        "Jacobian-vector product, 16 at a time": (_along(model, batch, 16), 16, None),
        "Jacobian-vector product, 8 at a time": (_along(model, batch, 8), 8, None),
    }
    for name in COUNTED:
        optimizer, estimator = GuessedGradient(Idle(model), GUESSERS[name], model), {}
        for hold in (False, True):
            estimator[hold] = Estimator(model, each, GUESSERS[name], guesses=16, hold=hold)
        for count in (1, 16):
            works[f"{name} {count}"] = (_kernels(name, count, model, batch), count, None)
        works[f"{name}: a step of `GuessedGradient`"] = (
            lambda optimizer=optimizer: optimizer.step(lambda: each(model, batch)), 1, f"{name} 1",
        )  # fmt: skip
        works[f"{name}: 16 guesses"] = (lambda of=estimator[False]: of(batch), 16, f"{name} 16")
        works[f"{name}: 16 guesses, held"] = (lambda of=estimator[True]: of(batch), 16, f"{name} 16")
        single = (lambda name=name: estimate_gradient(model, each, batch, GUESSERS[name]), 1, f"{name} 1")
        works[f"{name}: `estimate_gradient`, nothing kept"] = single
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(12):
        for name, (work, _, _) in works.items():
            found = timed(work)
            if turn > 1:
                seconds[name].append(found)
    base = statistics.median(seconds["plain forward pass"])
    found = {name: statistics.median(of) / base / works[name][1] for name, of in seconds.items()}
    shown = [name for name in works if not name.endswith((" 1", " 16"))]
    return {name: (None if (bare := works[name][2]) is None else found[bare], found[name]) for name in shown}


def _along(model: nn.Module, batch: Batch, count: int) -> Callable[[], object]:
    """The derivatives along some tangents that are there, by one pass."""
    with Passes(model, each, batch) as passes:
        structure, noise = passes.record(False, False), Seeded(0)
    tangents = {s.number: noise.draw((count, *s.shape), s.like, "normal") for s in structure.sites}

    def along() -> None:
        with Passes(model, each, batch, settle=True) as passes:
            passes.tangent(structure, lambda site: tangents[site.number], {}, count, True)

    return along


def _kernels(name: str, count: int, model: nn.Module, batch: Batch) -> Callable[[], object]:
    """The forward pass, noise, products and sums of some guesses, one after the other on tensors that are there."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs: list[Tensor] = []
    x, together = batch[0], min(count, _TOGETHER)
    with torch.no_grad():
        for layer in layers:
            inputs.append(x)
            x = F.relu(layer(x))
    outputs = [*inputs[1:], x]
    examples = len(batch[0])

    def many(out: Tensor) -> Tensor:
        return out.expand(together, *out.shape).reshape(-1, out.shape[1])

    values = [many(out) for out in outputs]

    def weights() -> None:
        each(model, batch)
        for _ in range(count):
            for number, layer in enumerate(layers):
                v, b = torch.randn(layer.weight.shape), torch.randn(layer.bias.shape)
                y = F.linear(inputs[number], v, b)
                if number:
                    y = y + F.linear(inputs[number], layer.weight)
                torch.ops.aten.threshold_backward(y, outputs[number], 0)
                v.mul_(2.0)

    def activations() -> None:
        each(model, batch)
        for number, layer in enumerate(layers):
            total = torch.zeros_like(outputs[number])
            for _ in range(count // together):
                y = _guess(name, number, together, layers, outputs)
                moved = y
                if number:
                    moved = F.linear(many_inputs[number], layer.weight) + y
                torch.ops.aten.threshold_backward(moved, values[number], 0)
                for part in y.split(examples):
                    total.addcmul_(part, outputs[number][:, :1])
            torch.mm(total.T, inputs[number])
            total.sum(0)

    many_inputs = [many(x) for x in inputs]

    def work() -> None:
        with torch.no_grad():
            weights() if name == "directional" else activations()

    return work


def _guess(name: str, number: int, together: int, layers: list[nn.Linear], outputs: list[Tensor]) -> Tensor:
    """What a guess at one layer takes: (together * B, out)."""
    examples, out = outputs[number].shape
    last = number == len(layers) - 1
    if name == "mixing":
        y = torch.cat([torch.randn(examples, examples) @ outputs[number] for _ in range(together)])
        return y if last else torch.ops.aten.threshold_backward(y, y, 0)
    if name == "activation" or last:
        return torch.randn(together * examples, out)
    after = layers[number + 1].weight
    eps = torch.randn(together * examples, len(after))
    if name == "downstream" and number < len(layers) - 2:
        eps = torch.ops.aten.threshold_backward(eps, eps, 0)
    y = eps @ after
    return torch.ops.aten.threshold_backward(y, y, 0)


def alone(name: str) -> None:
    """One estimate of a deep network's gradient, in a process of its own: the growth of its peak memory in MiB."""
    torch.manual_seed(0)
    model, batch = mlp(48, 256), (torch.randn(1024, 64), torch.randint(10, (1024,)))
    small = batch[0][:8], batch[1][:8]
    run: Callable[[Batch], object] = lambda of: true(model, of)  # noqa: E731
    if name != "backpropagation":
        run = lambda of: estimate_gradient(model, each, of, GUESSERS[name])  # noqa: E731
    run(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(names: tuple[str, ...]) -> str:
    """Peak resident memory of one estimate against backpropagation's; the median of three fresh processes."""
    script, rows = str(Path(__file__).with_name("guessers.py")), list[list[str]]()
    # With a mapping of its own for each tensor what is freed goes back at once: what is measured is what is in use.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in ("backpropagation", *names):
        command, row = [sys.executable, script, "--alone", name], [name]
        for environment in (exact, dict(os.environ)):
            runs = [
                subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                for _ in range(3)
            ]
            row.append(f"{statistics.median(map(float, runs)):.0f}")
        rows.append(row)
    return table(["48 x 256, B = 1024: MiB on top of a small batch", "in use", "kept by the allocator"], rows)
