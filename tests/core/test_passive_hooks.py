"""Where a listener has hooks: at first everywhere, then at the modules that the training calls from outside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from gradmon import Monitor, Unavailable, every
from gradmon.per_example import Listener
from tests.core.passive import assert_gram, data, mse, shares
from tests.core.passive_scenes import plain


class Parts(nn.Module):
    """A model whose parts may be called by themselves; one of them never is by the model."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.alone = nn.Linear(3, 2)
        self.checkpointed = False

    def forward(self, x):
        h = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(h.tanh())


def hooked(model):
    """The names of the modules that have hooks."""
    return [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def by_parts(model, batch):
    return F.mse_loss(model.head(model.body(batch[0]).tanh()), batch[1])


def of_body(model, batch):
    return model.body(batch[0]).square().sum(1).mean()


def of_both(model, batch):
    return mse(model, batch) + of_body(model, batch)


def of_all(model, batch):
    return mse(model, batch) + model.alone(batch[0]).square().sum(1).mean()


def one_after_the_other(*losses):
    def train(model, batch):
        for loss in losses:
            loss(model, batch).backward()

    return train


def recomputed(model, batch):
    model.checkpointed = True
    mse(model, batch).backward()


class Training:
    """Steps of a listener, each with its own gradients and inner products."""

    def __init__(self):
        self.model = Parts().double()
        self.listener = Listener(self.model)

    def step(self, batch, train, loss):
        """The names of the modules that had hooks, and whether there was a number, which must be right."""
        H = shares(self.model, batch, loss)
        self.model.zero_grad()
        self.listener.arm()
        names = hooked(self.model)
        train(self.model, batch)
        try:
            assert_gram(self.listener.collect(batch), H)
        except Unavailable:
            return names, False
        finally:
            self.listener.disarm()
        return names, True


CALLS = {
    "the whole": (plain(mse), mse, [""]),
    "its parts": (plain(by_parts), by_parts, ["body", "head"]),
    "the whole and a part": (plain(of_both), of_both, ["", "body"]),
    "a part again in the backward pass": (recomputed, mse, ["", "body"]),
}


@pytest.mark.parametrize("which", CALLS)
def test_hooks_are_where_calls_come_from_outside(which):
    train, loss, outside = CALLS[which]
    training = Training()
    for number, batch in enumerate(data(6, 6, 5)):
        names, found = training.step(batch, train, loss)
        assert found
        assert names == (outside if number else ["", "body", "head", "alone"])
        assert hooked(training.model) == []


LATER = {
    "its parts": (plain(by_parts), by_parts),
    "only a part": (plain(of_body), of_body),
    "a part as well": (plain(of_both), of_both),
    "a part that the whole does not call": (plain(of_all), of_all),
    "a part as well, in a backward pass afterwards": (one_after_the_other(mse, of_body), of_both),
    "a part as well, in a backward pass before": (one_after_the_other(of_body, mse), of_both),
    "a part again in the backward pass": (recomputed, mse),
}


@pytest.mark.parametrize("which", LATER)
def test_part_that_is_called_from_outside_from_some_step_on(which):
    """The first time without hooks: the number is right, or there is none; the next time it has hooks."""
    train, loss = LATER[which]
    training = Training()
    for number, batch in enumerate(data(6, 6, 6, 6, 5)):
        if number < 2:
            _, found = training.step(batch, plain(mse), mse)
            assert found
            continue
        names, found = training.step(batch, train, loss)
        if number == 2:
            assert names == [""]
        else:
            assert found
            assert names != [""]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_torchscript_has_no_hooks(whole):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    model = torch.jit.script(model) if whole else nn.Sequential(model[0], torch.jit.script(nn.Linear(4, 4).double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, schedule=every(1)) as monitor:
        model(x).square().mean().backward()
        optimizer.step()
        monitor.step(x)
        assert monitor.failures == {}
        assert monitor.readings["noise_scale"].reason.startswith("no ")
