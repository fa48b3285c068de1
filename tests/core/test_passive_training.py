"""Ordinary ways to train, after each of which the passive numbers are right."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gradmon import Unavailable, every
from gradmon.per_example import Listener
from gradmon.sinks import MemorySink
from tests import references
from tests.core.passive import (
    NAMES,
    accumulated_shares,
    assert_gram,
    assert_moments,
    assert_right,
    assert_silent,
    data,
    listened,
    mlp,
    mse,
    ordinary_step,
    sgd,
    shares,
    watching,
)
from tests.zoo.problem import classify, net

# --- ways to train, after each of which the numbers are right ------------------------------------------------------


def test_a_training_with_a_smaller_last_batch():
    model, sink, batches = mlp(), MemorySink(), data(6, 6, 6, 4, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    monitor = watching(model, optimizer, sinks=[sink])
    for batch in batches:
        ordinary_step(model, optimizer, monitor, batch)
    assert [reading.step for reading in sink.readings if reading.name == "noise_scale"] == [1, 2, 3, 4, 5]
    assert not monitor.failures


def test_lengths_that_change_from_batch_to_batch():
    torch.manual_seed(1)
    parts = {"embed": nn.Embedding(7, 3), "rnn": nn.GRU(3, 3, batch_first=True), "head": nn.Linear(3, 3)}
    model = net(lambda m, t: m.head(m.rnn(m.embed(t))[0].mean(1)), **parts).double()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for length in (4, 7, 5, 1, 2):  # 5: as many as examples
        batch = (torch.randint(7, (5, length)), torch.randint(3, (5,)))
        ordinary_step(model, optimizer, monitor, batch, classify)
    assert not monitor.failures


def test_one_listener_listens_again_and_again():
    model = mlp()
    listener = Listener(model, gram=True, moments=True, mask=None)
    for batch in data(6, 4, 6):
        model.zero_grad()
        listener.arm()
        mse(model, batch).backward()
        found = listener.collect(batch)
        listener.disarm()
        H = shares(model, batch)
        assert_gram(found, H)
        assert_moments(found, H)
        mse(model, batch).backward()  # not listened to


def test_batch_that_is_not_told():
    model, (batch,) = mlp(), data(6)
    assert_gram(listened(model, None, lambda: mse(model, batch).backward()), shares(model, batch))
    model.zero_grad()
    listener = Listener(model, gram=True, moments=False, mask=None)
    listener.arm()
    mse(model, batch).backward()
    found = listener.collect()
    listener.disarm()
    assert_gram(found, shares(model, batch))


@pytest.mark.parametrize("forward", [False, True])
def test_without_a_backward_pass_there_is_nothing_to_collect(forward):
    model, (batch,) = mlp(), data(6)
    with pytest.raises(Unavailable, match=r"."):
        listened(model, batch, lambda: mse(model, batch) if forward else None)


GIVEN = {
    "last": lambda batches: batches[-1],
    "list": list,
    "tuple": tuple,
    "whole": lambda batches: tuple(torch.cat(parts) for parts in zip(*batches, strict=True)),
}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (2, 2, 2), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("given", GIVEN)
def test_accumulated_micro_batches_are_one_batch(sizes, divided, given):
    model, batches = mlp(), data(*sizes)
    factor = 1 / len(sizes) if divided else 1.0
    H = accumulated_shares(model, batches, factor)

    def run():
        for batch in batches:
            (mse(model, batch) * factor).backward()

    found = listened(model, GIVEN[given](batches), run)
    assert_gram(found, H)
    assert_moments(found, H)
    model.zero_grad()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    run()
    optimizer.step()
    monitor.step(GIVEN[given](batches))
    assert_right(monitor.readings, H)
    assert monitor.readings["noise_ratio"].value == pytest.approx(monitor.readings["noise_scale"].value / len(H))
    assert not monitor.failures


def test_accumulation_under_a_sparse_schedule():
    model, sink = mlp(), MemorySink()
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(2), sinks=[sink])
    for number in range(1, 5):
        batches = data(4, 4)
        H = accumulated_shares(model, batches, 0.5)
        optimizer.zero_grad()
        for batch in batches:
            (mse(model, batch) * 0.5).backward()
        optimizer.step()
        monitor.step(batches[-1])
        if number % 2 == 0:
            assert_right(monitor.readings, H)
    assert [reading.step for reading in sink.readings if reading.name == "gradient_rank"] == [2, 4]


def siamese(model, batch):
    left, right, distance = batch
    return ((model(left) - model(right)).square().sum(1) - distance).square().mean()


def pairs(*sizes):
    return [(a[0], b[0], a[1][:, 0]) for a, b in zip(data(*sizes), data(*sizes)[::-1], strict=True)]


@pytest.mark.parametrize("given", GIVEN)
def test_accumulation_of_passes_with_two_calls_each(given):
    model, batches = mlp(), pairs(4, 4)
    batches = [(left, right + number, gap) for number, (left, right, gap) in enumerate(batches, 1)]
    H = accumulated_shares(model, batches, 1.0, siamese)

    def run():
        for batch in batches:
            siamese(model, batch).backward()

    if given != "whole":
        assert_gram(listened(model, GIVEN[given](batches), run), H)
        return
    with contextlib.suppress(Unavailable):  # the two calls of one pass hold as many rows as this batch has examples
        assert_gram(listened(model, GIVEN[given](batches), run), H)


@pytest.mark.parametrize("first", [4, 6])
def test_calls_that_hold_different_examples(first):
    def loss(model, batch):
        x, y = batch
        return F.mse_loss(torch.cat([model(x[:first]), model(x[first:])]), y)

    model, (batch,) = mlp(), data(8)
    found = listened(model, batch, lambda: loss(model, batch).backward())
    assert_gram(found, shares(model, batch))


def test_calls_that_hold_the_same_examples():
    model, (x, y) = mlp(), data(4)[0]
    batch = (x, x.flip(1).clone(), y[:, 0])
    found = listened(model, batch, lambda: siamese(model, batch).backward())
    assert_gram(found, shares(model, batch, siamese))


def test_two_backward_passes_of_the_same_examples_leave_all_but_the_moments():
    """Each pass gathers moments of its own part of an example's gradient; inner products add up over the parts."""
    model, (batch,) = mlp(), data(4)
    parts = (mse, lambda model, batch: model(batch[0]).square().mean())

    def both():
        for part in parts:
            part(model, batch).backward()

    H = shares(model, batch, lambda model, batch: sum(part(model, batch) for part in parts))
    found = listened(model, batch, both)
    assert_gram(found, H)
    assert (found.means, found.variances, found.seen) == (None, None, None)
    assert "several backward passes of the same examples" in found.missing
    optimizer = sgd(model)
    optimizer.zero_grad()
    with watching(model, optimizer) as monitor:
        both()
        optimizer.step()
        monitor.step(batch)
    assert monitor.readings["noise_scale"].value == pytest.approx(references.noise_scale(H), rel=1e-9)
    assert_silent(monitor.readings, "several backward passes of the same examples", ["gradient_snr"])


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_calls_that_do_not_fit_the_batch(size):
    model, (x, y) = mlp(), data(8)[0]

    def run():
        F.mse_loss(torch.cat([model(x[:4]), model(x[4:])]), y).backward()

    with pytest.raises(Unavailable, match=r"."):
        listened(model, data(size)[0], run)


def test_examples_left_out_of_the_loss_have_no_share():
    model, (x, y) = mlp(), data(6)[0]
    kept = torch.tensor([0, 2, 5])
    H = np.zeros((6, 26))
    H[kept] = 2 * shares(model, (x[kept], y[kept]))
    found = listened(model, (x, y), lambda: F.mse_loss(model(x)[kept], y[kept]).backward())
    assert_gram(found, H)


# --- mixed precision -----------------------------------------------------------------------------------------------


def mixed(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch[0])
    return F.mse_loss(out.float(), batch[1])


@pytest.mark.parametrize("scale", [None, 1.0, 2.0**16])
@pytest.mark.parametrize("unscaled", [False, True])
def test_mixed_precision(scale, unscaled):
    model, batches = mlp(torch.float32), data(8, 8, 8, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if scale is None else scale, enabled=scale is not None)
    monitor = watching(model, optimizer)
    for batch in batches:
        H = shares(model, batch, mixed)
        optimizer.zero_grad()
        scaler.scale(mixed(model, batch)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        monitor.step(batch)
        assert_right(monitor.readings, H, rtol=0.02)
    assert not monitor.failures


def test_scale_of_the_loss_cancels():
    found = []
    for scale in (2.0**-100, 1.0, 2.0**100):
        model, (batch,) = mlp(), data(6)
        optimizer = sgd(model, lr=0.1 / scale)
        monitor = watching(model, optimizer)
        (mse(model, batch) * scale).backward()
        optimizer.step()
        monitor.step(batch)
        found.append([monitor.readings[name].value for name in NAMES])
    assert not np.isnan(found).any()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-12)


def test_step_that_the_scaler_skips():
    model, batches = mlp(torch.float32), data(6, 6, 6, dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = watching(model, optimizer)
    for number, batch in enumerate(batches):
        H = shares(model, batch)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(mse(model, batch) * (math.inf if number == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(batch)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) == (number == 1)
        if number == 1:
            assert_silent(monitor.readings)
        else:
            assert_right(monitor.readings, H, rtol=1e-4)
    assert not monitor.failures


def test_gradient_that_is_not_finite():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model, lr=0.0)
    monitor = watching(model, optimizer)
    (mse(model, batches[0]) * math.nan).backward()
    optimizer.step()
    monitor.step(batches[0])
    assert_silent(monitor.readings, "non-finite gradient")
    fresh = mlp()
    model.load_state_dict(fresh.state_dict())
    ordinary_step(model, optimizer, monitor, batches[1])
    assert not monitor.failures


def test_gradient_that_is_zero():
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    (mse(model, batch) * 0.0).backward()
    optimizer.step()
    monitor.step(batch)
    assert_silent(monitor.readings, "zero gradient", ["noise_scale", "noise_ratio", "gradient_rank"])
    ordinary_step(model, optimizer, monitor, batch)
    assert not monitor.failures


# --- checkpointing -------------------------------------------------------------------------------------------------


def outside(model, x):
    return checkpoint(model, x, use_reentrant=False)


def in_segments(model, x):
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


def nested(model, x):
    def inner(x):
        return model[1](model[0](x))

    def outer(x):
        return model[2](checkpoint(inner, x, use_reentrant=False))

    return checkpoint(outer, x, use_reentrant=False)


def to_the_end(model, x):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def each_layer(model, x):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("call", [outside, in_segments, nested, to_the_end, each_layer])
def test_checkpointing(call):
    def loss(model, batch):
        return F.mse_loss(call(model, batch[0]), batch[1])

    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 5):
        ordinary_step(model, optimizer, monitor, batch, loss)
    batches = data(3, 3)
    H = accumulated_shares(model, batches, 1.0)
    optimizer.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    optimizer.step()
    monitor.step(batches)
    assert_right(monitor.readings, H)
    assert not monitor.failures
