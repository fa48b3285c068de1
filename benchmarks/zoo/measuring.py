"""The second stage: what is seen of each network before its first step, as it is and initialised anew."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.configurations import Configuration
from benchmarks.zoo.data import data_of, loss_of, order, probe
from benchmarks.zoo.networks import build
from gradmon.measure import measure
from gradmon.preflight.examples import PROBE
from gradmon.preflight.initialisation import reinitialize
from gradmon.preflight.look import Look, look

METRICS = ("weight_condition", "weight_cosine", "gradient_rank", "gradient_diversity", "gradient_snr")
"""What is measured beside the preflight check, to see whether it would add something."""
_BUDGET = 40


def optimizer_of(of: Configuration, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration."""
    if of.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=of.rate)
    return torch.optim.SGD(model.parameters(), lr=of.rate, momentum=0.9 if of.optimizer == "momentum" else 0)


def batches_of(of: Configuration) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first batches of a run, as many as a check takes at most."""
    inputs, targets = data_of(of)
    return [(inputs[chosen], targets[chosen]) for chosen in order(of, 9)]


def first_examples(of: Configuration) -> tuple[torch.Tensor, torch.Tensor]:
    """The first examples of a run, as many as a probe has."""
    inputs, targets = data_of(of)
    chosen = order(of, -(-PROBE // of.batch)).flatten()[:PROBE]
    return inputs[chosen], targets[chosen]


def plain(found: Look) -> dict[str, Any]:
    """The numbers of a look."""
    return {
        "passes": found.passes,
        "loss": found.loss,
        "chance": None if found.chance is None else found.chance.loss,
        "kind": None if found.chance is None else found.chance.kind,
        "out_sd": found.out_sd,
        "sig": found.sig,
        "relg": found.relg,
        "half": found.half,
        "bound": found.scan.bound,
        "noise_scale": found.noise_scale,
        "coherence": found.coherence,
        "confusion": found.confusion,
        "gradient_norm": found.gradient_norm,
        "reasons": dict(found.reasons),
    }


def anew(of: Configuration) -> nn.Module:
    """The network of a configuration, initialised anew with its first examples."""
    model = build(of)
    reinitialize(model, loss_of, first_examples(of), generator=of.number)
    return model


def measured(of: Configuration) -> dict[str, Any]:
    """What is seen of a network.

    Returns:
        ``look`` and ``anew``: the numbers of the checks; ``metrics``: further ones of gradmon's.
    """
    model, fresh = build(of), anew(of)
    checks = [plain(look(net, optimizer_of(of, net), loss_of, batches_of(of), _BUDGET)) for net in (model, fresh)]
    further = measure(model, loss_of, probe(of), metrics=METRICS)
    metrics = {name: further[name].value for name in METRICS if math.isfinite(further[name].value)}
    return {"name": of.name, "look": checks[0], "anew": checks[1], "metrics": metrics}
