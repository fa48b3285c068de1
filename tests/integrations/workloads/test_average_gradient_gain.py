"""What the average gradient is for: on deep tanh networks it gains, and the more the deeper they are."""

from __future__ import annotations

import math

import pytest
import torch

from gradmon_integrations.workloads.average_gradient.experiment import Recipe, mean_and_sem, trained
from gradmon_integrations.workloads.data import load


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def difference(depth: int, seed: int, epochs: int = 3) -> float:
    recipe = Recipe(depth=depth, epochs=epochs, measure=True)
    return trained(recipe, load("digits"), seed).optimizer.relative_difference


def test_the_relative_difference_grows_with_depth() -> None:
    found = {depth: [difference(depth, seed) for seed in range(2)] for depth in (3, 9, 27)}
    shallow, middle, deep = (sum(values) / len(values) for values in found.values())
    assert abs(shallow) < 0.01
    assert shallow < middle < deep
    assert deep > 0.15


def test_equal_seeds_start_alike_and_train_alike() -> None:
    recipe = Recipe(depth=5, epochs=1)
    runs = [trained(recipe, load("digits"), 3) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    base = trained(Recipe(depth=5, epochs=1, iterations=1), load("digits"), 3)
    assert base.losses[0] == runs[0].losses[0]
    assert base.losses != runs[0].losses
    assert len(base.losses) == 14
    assert base.last_loss(14) == pytest.approx(sum(base.losses) / 14)


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_sem([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert math.isnan(mean_and_sem([1.0])[1])
