"""Other ways to train: right, or no number; and the training goes on as it would."""

import numpy as np
import pytest
import torch

from tests import references
from tests.core.passive import (
    assert_identical,
    assert_right,
    assert_right_or_silent,
    assert_silent,
    attached,
    data,
    mlp,
    mse,
    ordinary_step,
    same_weights,
    sgd,
    shares,
    watching,
)
from tests.core.passive_hard_scenes import (
    NEVER_WRONG,
    backward_in_two_parts,
    copy_of_an_armed_model,
    forward_without_hooks,
    gradients_that_are_assigned,
    penalty_of_the_gradient,
    penalty_of_the_slope,
    penalty_outside,
    reentrant_checkpoint,
)
from tests.core.passive_scenes import RIGHT, two_dtypes


def played(build, monitored):
    """Two steps of a scene; the model after them, and the readings of the first."""
    with torch.random.fork_rng(devices=[]):
        made = build()
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    watched = made.model if made.watched is None else made.watched
    clean = attached(watched)
    readings = []
    monitor = watching(watched, optimizer) if monitored else None
    for _ in range(2):
        optimizer.zero_grad()
        made.train(made.model, made.batch)
        optimizer.step()
        if monitor is not None:
            monitor.step(made.batch)
            readings.append(dict(monitor.readings))
    if monitor is not None:
        assert not monitor.failures
        monitor.close()
        assert attached(watched) == clean
    return made, readings


@pytest.mark.parametrize("build", [*RIGHT, *NEVER_WRONG], ids=lambda build: build.__name__)
def test_shares_of_a_scene_average_to_its_gradient(build):
    made = build()
    if np.isnan(made.shares).any():
        return
    made.train(made.model, made.batch)
    watched = made.model if made.watched is None else made.watched
    pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).to_dense() for p in references.trainable(watched)]
    h = np.concatenate([piece.double().numpy().ravel() for piece in pieces])
    tolerance = 1e-6 if build is two_dtypes else 1e-12
    np.testing.assert_allclose(made.shares.mean(0), h, rtol=0, atol=tolerance * np.abs(h).max())


def assert_no_trace(build):
    """The first step's readings and the truth, of a training that is as it is without a monitor."""
    (made, readings), (alone, _) = played(build, True), played(build, False)
    assert same_weights(made.model, alone.model)
    assert_identical([p.grad for p in made.model.parameters()], [p.grad for p in alone.model.parameters()])
    return readings[0], made.shares


@pytest.mark.parametrize("build", RIGHT, ids=lambda build: build.__name__)
def test_unusual_training_is_read_right(build):
    readings, H = assert_no_trace(build)
    assert_right(readings, H, rtol=1e-4 if build is two_dtypes else 1e-9)


@pytest.mark.parametrize("build", NEVER_WRONG, ids=lambda build: build.__name__)
def test_training_that_cannot_be_followed_gives_no_wrong_number(build):
    readings, H = assert_no_trace(build)
    if np.isnan(H).any():
        assert_silent(readings)
    else:
        assert_right_or_silent(readings, H, rtol=1e-9)


RECOVERED = [penalty_outside, penalty_of_the_slope, penalty_of_the_gradient, reentrant_checkpoint]
RECOVERED += [backward_in_two_parts, gradients_that_are_assigned, forward_without_hooks, copy_of_an_armed_model]


@pytest.mark.parametrize("build", RECOVERED, ids=lambda build: build.__name__)
def test_after_a_step_that_could_not_be_followed_the_next_is_read_right(build):
    made = build()
    optimizer = sgd(made.model, lr=0.1)
    monitor = watching(made.model, optimizer)
    made.train(made.model, made.batch)
    optimizer.step()
    monitor.step(made.batch)
    ordinary_step(made.model, optimizer, monitor, made.batch)


def test_layers_that_thaw_and_freeze():
    model, batches = mlp(), data(6, 6, 6, 6, 6)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watching(model, optimizer)
    changes = {1: lambda: model[0].requires_grad_(True), 3: lambda: model[2].weight.requires_grad_(False)}
    for number, batch in enumerate(batches):
        changes.get(number, int)()
        H = shares(model, batch)
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if number in changes:
            assert_right_or_silent(monitor.readings, H)
        else:
            assert_right(monitor.readings, H)
    assert not monitor.failures
