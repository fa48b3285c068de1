"""Deliberately awkward small models, each with a loss, a batch and the truth about each example's own term.

Examples lie along axis 0 of every tensor in a batch (a model may transpose inside). Everything is drawn in float32 and
then converted, so that a case is the same problem in every dtype. Example counts often equal another dimension, so that
confusing the axes shows.
"""

from tests.zoo import (
    again,
    convolutions,
    dropout,
    hard,
    interacting,
    losses,
    normalisation,
    parameters,
    plain,
    sequences,
    single,
)
from tests.zoo.problem import CASES, DROPOUT_CASES, HARD_CASES, SINGLE_CASES, Case

__all__ = [
    "CASES",
    "DROPOUT_CASES",
    "FLAGS",
    "HARD_CASES",
    "SINGLE_CASES",
    "Case",
    "again",
    "convolutions",
    "dropout",
    "hard",
    "interacting",
    "losses",
    "named",
    "normalisation",
    "parameters",
    "plain",
    "select",
    "sequences",
    "single",
]

FLAGS = ("integer", "interacting", "values", "kinked", "once_differentiable")


def select(**flags: bool) -> list[Case]:
    """The cases with exactly these flags, e.g. `select(interacting=False, kinked=False)`."""
    return [each for each in CASES if all(getattr(each, flag) == wanted for flag, wanted in flags.items())]


def named(name: str) -> Case:
    """The case of a name."""
    return next(each for each in CASES if each.name == name)
