"""A monitor without a loss shows what the training's own passes reveal."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradmon
from gradmon import Monitor, every
from gradmon.metrics import OWN
from gradmon.sinks import MemorySink
from tests import references
from tests.core.monitored import SIZE, by_step, data, mlp, mse, train, with_closure
from tests.zoo.problem import averaged_problem

EXAMPLES = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence"]
EXAMPLES += ["noise_scale", "noise_ratio", "gradient_snr"]


def over_examples(H, *, kept=None, sampled=None, factors=None, parts=SIZE):
    """The numbers of the shares `H`: inner products over the coordinates `kept`, ratios over `sampled`."""
    seen = H if kept is None else H[:, kept]
    return {
        "gradient_rank": references.gradient_rank(seen, H.shape[1], factors),
        "gradient_confusion": references.gradient_confusion(seen, parts, factors),
        "gradient_diversity": references.gradient_diversity(seen, parts, factors),
        "gradient_coherence": references.gradient_coherence(seen, factors),
        "noise_scale": references.noise_scale(seen, factors),
        "noise_ratio": references.noise_ratio(seen, factors),
        "gradient_snr": references.gradient_snr(H if sampled is None else H[:, sampled]),
    }


def own_shares(model, batch):
    return references.shares(averaged_problem(model, mse, batch))


def test_passive():
    model, sink, batches = mlp(), MemorySink(), data(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, schedule=every(1), mask=None, sinks=[sink], layers=True)
    models = [copy.deepcopy(model)]
    train(model, optimizer, batches, monitor, after=lambda step: models.append(copy.deepcopy(model)))
    for number in range(1, 4):
        before = models[number - 1]
        w, moved = references.flat_weights(before), references.flat_weights(models[number])
        h = references.batch_gradient(before, mse, batches[number - 1])
        h_next = references.gradient_at(before, mse, batches[number], moved)
        expected = {
            "grad_norm": np.linalg.norm(h),
            "param_norm": np.linalg.norm(w),
            "update_ratio": references.update_ratio(moved - w, w),
            "step_condition": references.step_condition(h, h_next, w, moved - w),
            **over_examples(own_shares(before, batches[number - 1])),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(by_step(sink, name)[number].value, value, rtol=1e-9, err_msg=name)
    assert {r.name for r in sink.readings} == {*expected, *OWN}
    assert not monitor.failures


def test_passive_with_all_metrics_has_the_input_gradients_too():
    model, (batch,) = mlp(), data(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    G = references.input_gradients(averaged_problem(copy.deepcopy(model), mse, batch))
    default = Monitor(model, optimizer, schedule=every(1))
    everything = Monitor(model, optimizer, metrics="all", schedule=every(1))
    named = Monitor(model, optimizer, metrics=["input_gradient_rank"], schedule=every(1))
    mse(model, batch).backward()
    optimizer.step()
    for monitor in (default, everything, named):
        monitor.step(batch)
        assert not monitor.failures
    expected = references.input_gradient_rank(G)
    for monitor in (everything, named):
        assert monitor.readings["input_gradient_rank"].value == pytest.approx(expected, rel=1e-9)
    assert set(everything.readings) == {*default.readings, "input_gradient_rank"}
    assert set(named.readings) == {"input_gradient_rank", *OWN}


MASKS = {"default": "default", "explicit": gradmon.Mask(0.05, 7), "fraction": 0.05, "none": None}


@pytest.mark.parametrize("which", MASKS)
def test_mask_of_a_passive_monitor(which):
    """By default inner products are over all coordinates and ratios over some; a given mask holds for both."""
    torch.manual_seed(1)
    model, (batch,) = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 2)).double(), data(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    H = own_shares(copy.deepcopy(model), batch)
    some = gradmon.Mask(0.05, 7).sample(model).numpy()
    factors = references.coordinate_weights(model, some)
    expected = {
        "default": over_examples(H, sampled=some),
        "explicit": over_examples(H, kept=some, sampled=some, factors=factors),
        "fraction": over_examples(H, kept=some, sampled=some, factors=factors),
        "none": over_examples(H),
    }
    values = [found["gradient_snr"] for found in expected.values()]
    assert values[0] != pytest.approx(values[-1], rel=1e-3)
    assert expected["default"]["noise_scale"] != pytest.approx(expected["explicit"]["noise_scale"], rel=1e-3)
    monitor = Monitor(model, optimizer, metrics=EXAMPLES, schedule=every(1), mask=MASKS[which], seed=7)
    mse(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    for name, value in expected[which].items():
        np.testing.assert_allclose(monitor.readings[name].value, value, rtol=1e-9, err_msg=name)
    assert not monitor.failures


def test_passive_skipped_step_and_a_gradient_that_is_not_finite():
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, schedule=every(1), sinks=[sink])
    batch = data(1)[0]
    mse(model, batch).backward()
    monitor.step(batch)
    names = ("grad_norm", "param_norm", "update_ratio", "step_condition")
    assert {monitor.readings[name].reason for name in names} == {"no optimizer step was taken"}
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    monitor.step(batch)
    assert {monitor.readings[name].reason for name in names} == {"non-finite gradient"}
    assert [alert.rule for alert in monitor.alerts] == ["nonfinite"]
    assert not monitor.failures


@pytest.mark.parametrize("n", [1, 2])
def test_passive_step_before_a_skipped_one_says_that_there_is_no_next_gradient(n):
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, schedule=every(n), sinks=[sink])
    for number, batch in enumerate(data(6), 1):
        optimizer.zero_grad()
        mse(model, batch).backward()
        if number != 5:
            optimizer.step()
        monitor.step(batch)
    found = by_step(sink, "step_condition")
    assert found[4].reason == "no optimizer step was taken on the next batch"
    assert math.isnan(found[4].value)
    assert math.isfinite(found[2].value)
    assert not monitor.failures


PASSIVE = ["grad_norm", "param_norm", "update_ratio", "step_condition", "input_gradient_rank", *EXAMPLES]


@pytest.mark.parametrize("name", sorted(set(gradmon.METRICS) - set(PASSIVE)))
def test_passive_refuses_what_needs_passes(name):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(gradmon.ArgumentError, match=f"`loss` must be given for `{name}`"):
        Monitor(model, optimizer, metrics=[name])
    with pytest.raises(gradmon.ArgumentError, match=f"`loss` must be given for `{name}`"):
        Monitor(model, optimizer, metrics=["gradient_rank", name])


@pytest.mark.parametrize("name", PASSIVE)
def test_passive_takes_what_the_training_reveals(name):
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.05), metrics=[name])
    monitor.close()


def test_passive_with_a_closure_does_not_show_an_older_gradient():
    model, sink, batches = mlp(), MemorySink(), data(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, metrics=["grad_norm"], schedule=every(1), mask=None, sinks=[sink])
    for number, batch in enumerate(batches, 1):
        h = references.batch_gradient(model, mse, batch)
        with_closure(model, optimizer, batch, number)
        monitor.step(batch)
        found = monitor.readings["grad_norm"]
        assert found.step == number
        assert found.value == pytest.approx(np.linalg.norm(h)) or (math.isnan(found.value) and found.reason)


def test_passive_with_a_scaled_gradient_does_not_show_the_scale():
    model = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = Monitor(model, optimizer, metrics=["grad_norm"], schedule=every(1), mask=None)
    for batch in data(2, torch.float32):
        h = references.batch_gradient(model, mse, batch)
        optimizer.zero_grad()
        scaler.scale(mse(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(batch)
        found = monitor.readings["grad_norm"]
        assert found.value == pytest.approx(np.linalg.norm(h), rel=1e-5) or (math.isnan(found.value) and found.reason)
