"""A pass that a probe saves, because the training has made it, changes no number."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Mask, Monitor, every
from gradmon.sinks import MemorySink
from tests import references
from tests.core.test_probe_cost import MODELS, data, mlp, mse

# --- what is saved is right ------------------------------------------------------------------------------------------


class Loop:
    """A training with a monitor, of which all is kept that its `step_condition` is made of."""

    def __init__(self, model, optimizer, schedule, *, mask=None, loss=mse):
        self.model, self.optimizer, self.loss, self.sink = model, optimizer, loss, MemorySink()
        self.mask, self.calls = mask, 0
        self.monitor = Monitor(model, optimizer, self._counted, schedule=schedule, mask=mask, sinks=[self.sink])
        self.before, self.after, self.given, self.random, self.passes = {}, {}, {}, {}, {}

    def _counted(self, model, batch):
        self.calls += 1
        return self.loss(model, batch)

    def run(self, batches, train, given=lambda number, batch: batch):
        for number, batch in enumerate(batches, 1):
            self.before[number] = references.flat_weights(self.model)
            train(self.model, self.optimizer, batch, number)
            self.after[number] = references.flat_weights(self.model)
            self.given[number] = given(number, batch)
            self.random[number] = torch.get_rng_state()
            self.calls = 0
            self.monitor.step(self.given[number])
            self.passes[number] = self.calls
        assert not self.monitor.failures
        return {r.step: r for r in self.sink.readings if r.name == "step_condition" and r.layer is None}

    def expected(self, number):
        """By its definition, from the plain gradients of the two batches that the monitor was given."""
        w, moved = self.before[number], self.after[number]
        gradients = []
        for flat, batch in ((w, self.given[number]), (moved, self.given[number + 1])):
            torch.set_rng_state(self.random[number])
            gradients.append(references.gradient_at(self.model, self.loss, batch, flat))
        kept, factors = slice(None), None
        if self.mask is not None:
            kept = self.mask.sample(self.model).numpy()
            factors = references.coordinate_weights(self.model, kept)
        h, h_next = gradients
        return references.step_condition(h[kept], h_next[kept], w[kept], (moved - w)[kept], factors)


def plain(model, optimizer, batch, number):
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def clipped_when(bites):
    def train(model, optimizer, batch, number):
        optimizer.zero_grad()
        mse(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1 if bites(number) else 1e3)
        optimizer.step()

    return train


def accumulated(model, optimizer, batch, number):
    optimizer.zero_grad()
    other = tuple(part.roll(1, 0) * 1.5 for part in batch)
    for micro in (other, batch):
        (mse(model, micro) / 2).backward()
    optimizer.step()


def accumulated_when_even(model, optimizer, batch, number):
    (accumulated if number % 2 == 0 else plain)(model, optimizer, batch, number)


def penalised(model, optimizer, batch, number):
    optimizer.zero_grad()
    (mse(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def penalised_a_little(model, optimizer, batch, number):
    """By so little that only a comparison with the gradient of the batch itself can tell."""
    optimizer.zero_grad()
    (mse(model, batch) + 1e-4 * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def scaled(model, optimizer, batch, number):
    optimizer.zero_grad()
    (1024 * mse(model, batch)).backward()
    for parameter in model.parameters():
        parameter.grad.div_(1024)
    optimizer.step()


def scaled_and_kept(model, optimizer, batch, number):
    """A loss that is scaled up, and a learning rate that is as much smaller."""
    optimizer.zero_grad()
    (16 * mse(model, batch)).backward()
    optimizer.step()


def hooked(model, optimizer, batch, number):
    handles = [parameter.register_hook(lambda grad: 2 * grad) for parameter in model.parameters()]
    plain(model, optimizer, batch, number)
    for handle in handles:
        handle.remove()


def kept_zeros(model, optimizer, batch, number):
    optimizer.zero_grad(set_to_none=False)
    mse(model, batch).backward()
    optimizer.step()


def overwritten(model, optimizer, batch, number):
    """Gradients that are put there by hand."""
    gradients = torch.autograd.grad(mse(model, batch), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = 3 * gradient
    optimizer.step()


def with_closure(model, optimizer, batch, number):
    def closure():
        optimizer.zero_grad()
        value = mse(model, batch)
        value.backward()
        return value

    optimizer.step(closure)


RECIPES = {
    "plain": plain,
    "always_clipped": clipped_when(lambda number: True),
    "clipped_after_the_probe": clipped_when(lambda number: number % 2 == 1),
    "clipped_at_the_probe": clipped_when(lambda number: number % 2 == 0),
    "accumulated": accumulated,
    "accumulated_when_even": accumulated_when_even,
    "penalised": penalised,
    "penalised_a_little": penalised_a_little,
    "scaled": scaled,
    "scaled_and_kept": scaled_and_kept,
    "hooked": hooked,
    "kept_zeros": kept_zeros,
    "overwritten": overwritten,
    "closure": with_closure,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def assert_right(loop, found, numbers, rtol=1e-7):
    for number in numbers:
        assert found[number].reason is None, found[number]
        np.testing.assert_allclose(found[number].value, loop.expected(number), rtol=rtol, err_msg=str(number))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_condition_is_that_of_plain_gradients(recipe, gap, optimizer):
    torch.manual_seed(1)
    model = mlp().double()
    loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), every(gap))
    found = loop.run(data(7), RECIPES[recipe])
    assert_right(loop, found, range(gap, 7, gap))


@pytest.mark.parametrize("recipe", ["plain", "clipped_after_the_probe", "accumulated"])
def test_step_condition_under_a_mask(recipe):
    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2), mask=Mask(0.4, seed=3))
    found = loop.run(data(7), RECIPES[recipe])
    assert_right(loop, found, (2, 4, 6))


@pytest.mark.parametrize("name", MODELS)
def test_step_condition_of_other_models(name):
    make, shape = MODELS[name]
    model = make().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7, shape), plain)
    assert_right(loop, found, (2, 4, 6))
    assert loop.passes[5] == 1  # else the gradient of the training was not used


def test_two_passes_where_the_gradient_of_the_training_is_another():
    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    loop.run(data(7), clipped_when(lambda number: True))
    assert loop.passes[5] == loop.passes[7] == 2


def test_dropout():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 2)).double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), plain)
    assert_right(loop, found, (2, 4, 6))


@pytest.mark.parametrize("skipped", [2, 3, 5])
def test_skipped_step(skipped):
    def train(model, optimizer, batch, number):
        optimizer.zero_grad()
        mse(model, batch).backward()
        if number != skipped:
            optimizer.step()

    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), train)
    assert_right(loop, found, {2, 4, 6} - {skipped})
    if skipped == 2:
        assert found[2].reason == "no optimizer step was taken"


def test_skipped_step_whose_gradient_stays():
    """The gradient of the step that was skipped is still there when the next one is taken."""

    def train(model, optimizer, batch, number):
        if number != 4:
            optimizer.zero_grad()
        mse(model, batch).backward()
        if number != 3:
            optimizer.step()

    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), lambda step: step in (2, 4))
    found = loop.run(data(6), train)
    assert_right(loop, found, (2, 4))


@pytest.mark.parametrize("gap", [1, 2])
def test_batch_that_is_not_the_one_trained_on(gap):
    model, others = mlp().double(), data(20)[10:]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(gap))
    found = loop.run(data(7), plain, given=lambda number, batch: others[number])
    assert_right(loop, found, range(gap, 7, gap))


def test_weights_that_are_clipped_by_the_optimizer_step():
    """What moves the weights before the monitor is told counts as part of the step."""

    def train(model, optimizer, batch, number):
        plain(model, optimizer, batch, number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.3, 0.3)

    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), train)
    assert_right(loop, found, (2, 4, 6))


# --- what changes only after the probe -------------------------------------------------------------------------------


def moved_before(model, optimizer, batch, number):
    """The weights are moved between the probe and the next step, as by an average that is loaded."""
    if number % 2 == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    plain(model, optimizer, batch, number)


def summed_before(model, optimizer, batch, number):
    """The gradient of the probed step is not cleared before the next."""
    if number % 2 == 0:
        optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def only_odd(train):
    return lambda model, optimizer, batch, number: (train if number % 2 else plain)(model, optimizer, batch, number)


def hooked_afterwards(model, optimizer, batch, number):
    """Hooks from the beginning on that shorten every gradient of some steps as soon as it is there."""

    def shorten(parameter):
        parameter.grad.mul_(0.5 if model.number % 2 else 1.0)

    if number == 1:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(shorten)
    model.number = number
    plain(model, optimizer, batch, number)


def hooked_a_little(model, optimizer, batch, number):
    """Hooks from the beginning on that hardly change what comes in some steps."""
    if number == 1:
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: grad * (0.999 if model.number % 2 else 1.0))
    model.number = number
    plain(model, optimizer, batch, number)


def clipped_a_little(model, optimizer, batch, number):
    optimizer.zero_grad()
    mse(model, batch).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.999)
    optimizer.step()


LATE = {
    "moved": moved_before,
    "summed": summed_before,
    "hooked": only_odd(hooked),
    "hooked_afterwards": hooked_afterwards,
    "hooked_a_little": hooked_a_little,
    "clipped_a_little": only_odd(clipped_a_little),
    "penalised": only_odd(penalised),
    "scaled_and_kept": only_odd(scaled_and_kept),
    "overwritten": only_odd(overwritten),
    "accumulated": only_odd(accumulated),
    "closure": only_odd(with_closure),
    "kept_zeros": only_odd(kept_zeros),
}


@pytest.mark.parametrize("recipe", LATE)
def test_what_changes_only_after_the_probe(recipe):
    model = mlp().double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), LATE[recipe])
    assert_right(loop, found, (2, 4, 6))


def test_batch_that_is_another_only_after_the_probe():
    model, others = mlp().double(), data(20)[10:]
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), plain, given=lambda number, batch: others[number] if number % 2 else batch)
    assert_right(loop, found, (2, 4, 6))


def test_dropout_that_begins_after_the_probe_does_little_harm():
    class Switched(nn.Sequential):
        rate = 0.0

        def forward(self, x):
            return super().forward(F.dropout(x, self.rate) if self.rate else x)

    def train(model, optimizer, batch, number):
        model.rate = 0.0 if number % 2 == 0 else 0.5
        plain(model, optimizer, batch, number)
        model.rate = 0.0

    model = Switched(*mlp()).double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), every(2))
    found = loop.run(data(7), train)
    for number in (2, 4, 6):
        # What is no larger than the step's own doing is not seen, and cannot do more harm than that.
        w, moved, chi, other = loop.before[number], loop.after[number], loop.given[number], loop.given[number + 1]
        h, h_step, h_next, h_both = (
            references.gradient_at(model, mse, batch, at) for batch in (chi, other) for at in (w, moved)
        )
        factor = np.linalg.norm(w) / (np.linalg.norm(moved - w) * np.linalg.norm(h))
        bound = 2.5 * np.linalg.norm(h_step - h) + np.linalg.norm(h_both - h_next)
        assert abs(found[number].value - loop.expected(number)) <= factor * bound
