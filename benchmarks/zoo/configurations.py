"""What the networks of the zoo are, drawn at random, and to which half of it each belongs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random

FAMILIES = ("mlp", "conv", "transformer", "regression")
SIZES = {"mlp": 220, "conv": 80, "transformer": 80, "regression": 50}
"""How many networks of each family there are."""
INITIALISATIONS = ("torch", "he", "xavier", "small", "large")
"""torch: the layers' own; he, xavier: as published, biases 0; small: a deviation of 0.02; large: twice he."""
DEFAULTS = {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3}
"""The default learning rates; momentum is SGD with 0.9, ten steps of which add up."""
OWN_EXPONENTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0)
"""What a configuration may have as log10 of its learning rate over the default."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One network and how it is trained.

    Attributes:
        family: One of `FAMILIES`.
        number: Its number within the family, which seeds everything that is random about it.
        depth: Hidden layers, convolutions, or blocks.
        width: Units, channels, or the dimension of a token.
        activation: relu, tanh or gelu.
        norm: none, layer, group, batch; for transformers none, pre or post.
        residual: Whether layers add to what they get; transformers always do.
        initialisation: One of `INITIALISATIONS`.
        optimizer: One of `DEFAULTS`.
        exponent: log10 of the learning rate over the default.
        batch: The examples of a batch.
        scale: The standard deviation of a regression's targets; 1 elsewhere.
        steps: How long it is trained.
    """

    family: str
    number: int
    depth: int
    width: int
    activation: str
    norm: str
    residual: bool
    initialisation: str
    optimizer: str
    exponent: float
    batch: int
    scale: float
    steps: int

    @property
    def name(self) -> str:
        """The family and the number."""
        return f"{self.family}-{self.number}"

    @property
    def rate(self) -> float:
        """The learning rate."""
        return DEFAULTS[self.optimizer] * 10**self.exponent

    @property
    def half(self) -> str:
        """``dev`` or ``test``, by a hash of all that the configuration says."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return "dev" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def configuration(family: str, number: int) -> Configuration:
    """The configuration of this number, always the same."""
    draw = random.Random(f"{family}/{number}")
    if family == "conv":
        shape = draw.choice((2, 3, 4, 6, 8, 10, 14)), draw.choice((6, 8, 12))
        norm = draw.choices(("none", "group", "batch"), (6, 2, 2))[0]
        batch = draw.choice((8, 16, 32, 64))
    elif family == "transformer":
        shape = draw.choice((1, 2, 3, 4, 6)), draw.choice((16, 24, 32))
        norm = draw.choices(("none", "pre", "post"), (4, 3, 3))[0]
        batch = draw.choice((8, 16, 32))
    else:
        shape = draw.choice((2, 3, 4, 6, 8, 12, 16, 20, 25, 30)), draw.choice((16, 32, 64))
        norm = draw.choices(("none", "layer"), (7, 3))[0]
        batch = draw.choice((8, 16, 32, 64, 128))
    return Configuration(
        family=family,
        number=number,
        depth=shape[0],
        width=shape[1],
        activation=draw.choice(("relu", "tanh", "gelu")),
        norm=norm,
        residual=family == "transformer" or draw.random() < 0.3,
        initialisation=draw.choice(INITIALISATIONS),
        optimizer=draw.choices(tuple(DEFAULTS), (4, 2, 4))[0],
        exponent=draw.choice(OWN_EXPONENTS),
        batch=batch,
        scale=draw.choice((0.1, 1.0, 1.0, 10.0)) if family == "regression" else 1.0,
        steps=300 if family == "transformer" else 400,
    )
