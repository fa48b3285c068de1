"""Gradients at the inputs, and backward passes of other losses, beside the training's own."""

import numpy as np
import pytest
import torch
from torch import nn

import gradmon
from gradmon.per_example import Listener
from tests.core.listened import found_in


def tokens():
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2)).double(), torch.randint(7, (5, 4))


def numbers():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()


def at_inputs(model, x, loss):
    """B times the gradients of a mean over B examples with respect to their inputs."""
    found = []
    for row in x[:, None]:
        start = (row if row.is_floating_point() else model[0](row)).detach().requires_grad_()
        rest = model if row.is_floating_point() else model[1:]
        found += torch.autograd.grad(loss(rest(start)), start)
    return torch.cat(found)


def squared(out):
    return out.square().sum() / len(out)


def summed(out):
    return out.sin().sum() / len(out)


@pytest.mark.parametrize("second", [squared, summed])
@pytest.mark.parametrize("make", [numbers, tokens])
def test_gradients_at_inputs_that_had_two_backward_passes(make, second):
    torch.manual_seed(0)
    model, x = make()
    listener = Listener(model, inputs=True)
    for twice in (True, False, True):
        model.zero_grad()
        listener.arm()
        squared(model(x)).backward()
        if twice:
            second(model(x)).backward()
        assert listener.collect(x).examples == 5
        if twice:
            with pytest.raises(gradmon.Unavailable, match="several forward passes of the same examples"):
                listener.input_gradients()
        else:
            np.testing.assert_allclose(listener.input_gradients(), at_inputs(model, x, squared), rtol=1e-9)
        listener.disarm()


def test_gradients_at_inputs_of_a_step_that_had_no_number():
    """After a step on twice as many examples."""
    torch.manual_seed(0)
    model, x = numbers()
    listener = Listener(model, gram=False, inputs=True, moments=True)
    for xs in ([x, x + 1], [x, x]):
        model.zero_grad()
        listener.arm()
        for part in xs:
            squared(model(part)).backward()
        if xs[0] is not xs[1]:
            assert listener.collect(xs).examples == 10
            assert len(listener.input_gradients()) == 10
        else:
            with pytest.raises(gradmon.Unavailable, match="mean and variance"):
                listener.collect(x)
            with pytest.raises(gradmon.Unavailable):
                listener.input_gradients()
        listener.disarm()


@pytest.mark.parametrize("first", [False, True])
def test_penalty_with_a_backward_pass_of_its_own(first):
    torch.manual_seed(0)
    model, x = numbers()
    losses = [lambda: squared(model(x)), lambda: model[0].weight.square().sum()]

    def run():
        for loss in losses[::-1] if first else losses:
            loss().backward()

    with pytest.raises(gradmon.Unavailable):
        found_in(model, run, x)
