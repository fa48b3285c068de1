"""A probe leaves everything exactly as found, also where something raises."""

import contextlib

import pytest
import torch

import gradmon
from tests.core.traces import ACTIONS, MODELS, Body, Found, make, mse, regression


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left(name, action):
    model, batch, optimizer = make(name)
    found = Found(model, batch, optimizer)
    with contextlib.suppress(gradmon.Unavailable):
        ACTIONS[action](model, mse, batch, optimizer)
    found.check()


@pytest.mark.parametrize("action", ACTIONS)
def test_gradients_that_are_none_stay_none(action):
    model, batch, optimizer = make("norm_and_dropout")
    optimizer.zero_grad(set_to_none=True)
    ACTIONS[action](model, mse, batch, optimizer)
    assert all(p.grad is None for p in model.parameters())


class Boom(Exception):
    """An error of the user's."""


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 9, 14])
@pytest.mark.parametrize("name", ["norm_and_dropout", "attributes", "max_norm"])
def test_nothing_is_left_by_a_loss_that_raises(name, call, error):
    model, batch, optimizer = make(name)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value = mse(model, batch)
        if calls == call:
            torch.rand(3)
            raise error
        return value

    found = Found(model, batch, optimizer)
    with contextlib.suppress(error):  # or the error becomes the reason why some readings are missing
        ACTIONS["measure"](model, loss, batch, optimizer)
    assert calls >= call
    found.check()


def test_nothing_is_left_by_a_layer_that_raises():
    def act(model, x):
        model.buffer.add_(1)
        torch.rand(1)
        raise Boom

    model = Body(act, buffer=torch.zeros(2))
    batch, optimizer = regression(), torch.optim.SGD(model.parameters(), lr=0.1)
    found = Found(model, batch, optimizer)
    for action in ACTIONS.values():
        with pytest.raises((Boom, gradmon.Unavailable)):
            action(model, mse, batch, optimizer)
        found.check()
