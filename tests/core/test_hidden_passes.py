"""Backward passes inside of the backward pass: what they add to the gradients is not seen, and must not be left out."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradmon
from gradmon import Monitor, every

REENTRANT = "reentrant checkpointing knows no torch.autograd.grad: set use_reentrant=False"
OWN = "a function of the model adds to the gradients in a backward pass of its own"
NAMES = ["grad_norm", "weight_condition", "noise_scale", "input_condition"]


class Reversible(torch.autograd.Function):
    """A block that is computed once more in a backward pass of its own, as those of reversible networks are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), gradient)
        return x.grad, None


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3))


def checkpointed_first(model, batch):
    """As under adapters: what a checkpointed part is given requires a gradient, but depends on no parameter."""
    hidden = checkpoint(model[:2], batch[0].clone().requires_grad_(), use_reentrant=True)
    return F.cross_entropy(model[2](hidden), batch[1])


def checkpointed_whole(model, batch):
    return F.cross_entropy(checkpoint(model, batch[0].clone().requires_grad_(), use_reentrant=True), batch[1])


def reversible(model, batch):
    return F.cross_entropy(model[2](Reversible.apply(model[0](batch[0]), model[1])), batch[1])


def batch():
    return torch.randn(6, 4), torch.randint(3, (6,))


@pytest.mark.parametrize(
    ("loss", "reason"), [(checkpointed_first, REENTRANT), (checkpointed_whole, REENTRANT), (reversible, OWN)]
)
@pytest.mark.parametrize("names", [NAMES, NAMES[:2]])
def test_a_gradient_of_which_a_part_is_hidden_is_no_number(loss, reason, names):
    net, data = model(), batch()
    found = gradmon.measure(net, loss, data, metrics=names)
    assert {reading.reason for reading in found.values()} == {reason}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, loss, metrics=names, schedule=every(1)) as monitor:
        loss(net, data).backward()
        before = [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        monitor.step(data)
        assert {monitor.readings[name].reason for name in names} == {reason}
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("loss", [checkpointed_first, reversible])
def test_functions_that_return_gradients_raise_instead(loss):
    net, data = model(), batch()
    for function in (gradmon.batch_gradient, gradmon.per_example_gradients, gradmon.per_example_gram):
        with pytest.raises(gradmon.Unavailable):
            function(net, loss, data)


def test_a_frozen_part_may_be_checkpointed_reentrantly():
    net, data = model(), batch()
    net[:2].requires_grad_(False)
    found = gradmon.measure(net, checkpointed_first, data, metrics=["grad_norm"])["grad_norm"]
    gradients = torch.autograd.grad(F.cross_entropy(net(data[0]), data[1]), list(net[2].parameters()))
    assert math.isclose(found.value, float(torch.cat([g.flatten() for g in gradients]).norm()), rel_tol=1e-5)


def test_gradients_that_the_loss_itself_leaves_behind_are_nothing_hidden():
    def against_the_worst(model, batch):
        shift = torch.zeros_like(batch[0]).requires_grad_()
        F.cross_entropy(model(batch[0] + shift), batch[1]).backward()
        return F.cross_entropy(model(batch[0] + 0.1 * shift.grad.sign()), batch[1])

    found = gradmon.measure(model(), against_the_worst, batch(), metrics=["grad_norm"])["grad_norm"]
    assert found.reason is None


class Shared(nn.Module):
    """One layer inside of a part that is checkpointed behind no parameter, and outside of it."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call

    def forward(self, x):
        return self.layer(torch.tanh(checkpoint(self.call(self.layer), x.clone().requires_grad_(), use_reentrant=True)))


CALLS = {
    "module": lambda layer: layer,
    "method": lambda layer: layer.forward,
    "closure": lambda layer: lambda x: layer(x),
    "partial": lambda layer: partial(F.linear, weight=layer.weight, bias=layer.bias),
    "nested": lambda layer: lambda x: checkpoint_sequential([layer, nn.Identity()], 1, x, use_reentrant=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_layer_that_is_hidden_and_seen_has_no_gradient_of_its_visible_part_alone(call):
    net, data = Shared(call), batch()
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    assert gradmon.measure(net, loss, data, metrics=["grad_norm"])["grad_norm"].reason == REENTRANT
    for function in (gradmon.batch_gradient, gradmon.per_example_gradients):
        with pytest.raises(gradmon.Unavailable):
            function(net, loss, data)
