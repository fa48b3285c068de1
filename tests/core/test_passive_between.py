"""Passive numbers whatever happens between two steps."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from tests.core.passive import (
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


class Fragile(nn.Module):
    """Raises when told to, in the forward or in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and not self.late:
            raise self.error
        if self.error is not None:
            x = x * 1.0
            x.register_hook(self.explode)
        return x

    def explode(self, grad: Tensor) -> None:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["forward", "between", "backward"])
def test_step_after_an_exception_is_right(error, place):
    fragile, batches = Fragile(), data(6, 6, 6, 5)
    model = nn.Sequential(*mlp()[:2], fragile, mlp()[2])
    clean = attached(model)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=lambda step: step in (1, 2))
    ordinary_step(model, optimizer, monitor, batches[0])
    if place != "between":
        fragile.error, fragile.late = error, place == "backward"

    def failing_step():
        value = mse(model, batches[1])
        if place == "between":
            raise error
        value.backward()

    with pytest.raises(type(error)):
        failing_step()
    fragile.error = None
    if not (place == "forward" and isinstance(error, KeyboardInterrupt)):  # of which torch tells no hook
        assert attached(model)["functions"] == attached(model)["dispatch"] == 0
    H = shares(model, batches[2])
    optimizer.zero_grad()
    mse(model, batches[2]).backward()
    optimizer.step()
    monitor.step(batches[2])
    if place == "backward":  # nothing tells that what was seen of the first pass is not part of the step
        assert_right_or_silent(monitor.readings, H)
    else:
        assert_right(monitor.readings, H)
    assert attached(model) == clean
    assert not monitor.failures


def test_pass_whose_gradient_is_thrown_away_is_no_part_of_the_step():
    model, batches = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    mse(model, batches[0]).backward()
    optimizer.zero_grad()
    H = shares(model, batches[1])
    mse(model, batches[1]).backward()
    optimizer.step()
    monitor.step(batches[1])
    assert_right_or_silent(monitor.readings, H)
    ordinary_step(model, optimizer, monitor, batches[2])
    assert not monitor.failures


@contextlib.contextmanager
def graph_that_is_never_used():
    yield


KINDS = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "unused_graph": graph_that_is_never_used}


GAPS = ["forward", "backward", "optimizer", "monitor"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("which", ["other", "smaller", "same"])
def test_evaluation_in_between(kind, gap, which):
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    kept = []

    def evaluate(place, x):
        if place == gap:
            model.eval()
            with KINDS[kind]():
                kept.append(model(x))
            model.train()

    for batch in batches:
        other = {"other": data(6, 6)[1][0].flip(0), "smaller": data(4)[0][0], "same": batch[0]}[which]
        H = shares(model, batch)
        optimizer.zero_grad()
        evaluate("forward", other)
        value = mse(model, batch)
        evaluate("backward", other)
        value.backward()
        evaluate("optimizer", other)
        optimizer.step()
        evaluate("monitor", other)
        monitor.step(batch)
        assert_right(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_zero_grad(set_to_none, place):
    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6, 5):
        H = shares(model, batch)
        if place == "first":
            optimizer.zero_grad(set_to_none=set_to_none)
        value = mse(model, batch)
        if place == "middle":
            optimizer.zero_grad(set_to_none=set_to_none)
        value.backward()
        optimizer.step()
        if place == "last":
            optimizer.zero_grad(set_to_none=set_to_none)
        monitor.step(batch)
        assert_right(monitor.readings, H)


@pytest.mark.parametrize(
    "clip", [lambda p: nn.utils.clip_grad_norm_(p, 1e-3), lambda p: nn.utils.clip_grad_value_(p, 1e-3)]
)
def test_clipping(clip):
    model = mlp()
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    for batch in data(6, 6):
        H = shares(model, batch)
        optimizer.zero_grad()
        mse(model, batch).backward()
        clip(model.parameters())
        optimizer.step()
        monitor.step(batch)
        assert_right(monitor.readings, H)


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_closures(kind):
    results = []
    for monitored in (False, True):
        model = mlp()
        make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3)}
        optimizer = make[kind](model.parameters())
        monitor = watching(model, optimizer) if monitored else None
        for batch in data(6, 6, 6):

            def closure(batch=batch, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = mse(model, batch)
                value.backward()
                return value

            H = shares(model, batch)
            optimizer.step(closure)
            if monitor is not None:
                monitor.step(batch)
                assert_right_or_silent(monitor.readings, H)
                assert not monitor.failures
        results.append(model)
    assert same_weights(*results)


def test_skipped_step_shows_no_wrong_number():
    model, batches = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    ordinary_step(model, optimizer, monitor, batches[0])
    H = shares(model, batches[1])
    optimizer.zero_grad()
    mse(model, batches[1]).backward()
    monitor.step(batches[1])
    assert monitor.readings["noise_scale"].step == 2
    assert_right_or_silent(monitor.readings, H)
    ordinary_step(model, optimizer, monitor, batches[2])
    assert not monitor.failures


def test_step_without_a_pass_shows_no_number():
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    ordinary_step(model, optimizer, monitor, batches[0])
    optimizer.step()
    monitor.step(batches[0])
    assert_silent(monitor.readings)
    optimizer.zero_grad()
    ordinary_step(model, optimizer, monitor, batches[1])


@pytest.mark.parametrize("seen", ["nothing", "half"])
def test_forward_pass_from_before_the_monitor_gives_no_wrong_number(seen):
    model, (batch, other, last) = mlp(), data(6, 6, 6)
    optimizer = sgd(model)
    early = mse(model, batch)
    monitor = watching(model, optimizer)
    value = early if seen == "nothing" else early + mse(model, other)
    value.backward()
    optimizer.step()
    monitor.step(batch)
    assert_silent(monitor.readings)
    ordinary_step(model, optimizer, monitor, last)
    assert not monitor.failures
