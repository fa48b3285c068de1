"""What a monitor reads: at the weights before the step, in any loop, and what it does not show."""

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
from tests.core.monitored import CLOCK, by_step, data, mlp, mse, train, watched

NEXT = {"step_condition", "step_share", "batch_share"}

# --- the readings are those of `measure`, at the weights before the step -------------------------------------------


def test_readings_are_those_of_measure():
    names = [n for n, m in gradmon.METRICS.items() if not {"Step", "StepPair"} & {kind.__name__ for kind in m.needs}]
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mask = gradmon.Mask(0.5, seed=4)
    options = {"metrics": names, "layers": True, "micro_batches": 3}
    monitor = Monitor(model, optimizer, mse, schedule=every(1), mask=mask, seed=7, sinks=[sink], **options)
    for number, batch in enumerate(data(3), 1):
        before = copy.deepcopy(model)
        train(model, optimizer, [batch], monitor)
        alone = torch.optim.SGD(before.parameters(), lr=0.05)
        expected = gradmon.measure(before, mse, batch, optimizer=alone, mask=mask, seed=7 + number, **options)
        found = {k: r for k, r in monitor.readings.items() if k not in set(OWN)}
        assert found == {key: reading._replace(step=number) for key, reading in expected.items()}
        assert not any(math.isnan(reading.value) for reading in found.values())
    assert not monitor.failures


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_step_evidence_comes_from_the_real_step(optimizer_class, fraction):
    model, sink, batches = mlp(), MemorySink(), data(4)
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    mask = None if fraction is None else gradmon.Mask(fraction, seed=1)
    names = ["step_ratio", "update_ratio", "grad_norm", "param_norm", "loss", *NEXT]
    monitor = Monitor(model, optimizer, mse, metrics=names, schedule=every(1), mask=mask, sinks=[sink])
    models = [copy.deepcopy(model)]

    def after(step):
        models.append(copy.deepcopy(model))
        arrived = {reading.name for reading in sink.readings if reading.step == step}
        assert not arrived & NEXT
        assert {r.name for r in sink.readings if r.step == step - 1} >= (NEXT if step > 1 else set())

    train(model, optimizer, batches, monitor, after=after)
    kept, factors = slice(None), None
    if mask is not None:
        kept = mask.sample(model).numpy()
        factors = references.coordinate_weights(model, kept)
    for number in range(1, 4):
        before, chi, other = models[number - 1], batches[number - 1], batches[number]
        w, moved = references.flat_weights(before), references.flat_weights(models[number])
        h = references.batch_gradient(before, mse, chi)
        h_step = references.gradient_at(before, mse, chi, moved)
        h_next = references.batch_gradient(before, mse, other)
        h_both = references.gradient_at(before, mse, other, moved)
        expected = {
            "loss": float(mse(before, chi).detach()),
            "grad_norm": np.linalg.norm(h),
            "param_norm": np.linalg.norm(w),
            "update_ratio": references.update_ratio(moved - w, w),
            "step_ratio": references.step_ratio(h[kept], h_step[kept], factors),
            "step_share": references.step_share(h[kept], h_step[kept], h_next[kept], factors),
            "batch_share": references.batch_share(h[kept], h_step[kept], h_next[kept], factors),
            "step_condition": references.step_condition(h[kept], h_both[kept], w[kept], (moved - w)[kept], factors),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(by_step(sink, name)[number].value, value, rtol=1e-8, err_msg=name)
    assert not monitor.failures


def test_next_batch_numbers_of_a_sparse_schedule_come_with_the_next_call():
    _, sink, _ = watched(steps=8, metrics=["step_share", "loss"], schedule=every(3))
    assert list(by_step(sink, "loss")) == [3, 6]
    assert list(by_step(sink, "step_share")) == [3, 6]
    order = [(reading.name, reading.step) for reading in sink.readings if reading.name not in CLOCK]
    assert order.index(("step_share", 3)) < order.index(("loss", 6))


def test_layers():
    monitor, sink, _ = watched(steps=3, layers=True, metrics=["grad_norm", "step_share", "update_ratio"])
    for step in (1, 2):
        parts = {r.layer: r.value for r in sink.readings if (r.name, r.step) == ("grad_norm", step)}
        assert set(parts) == {None, "0", "2"}
        assert parts[None] == pytest.approx(math.hypot(parts["0"], parts["2"]))
        shares = {r.layer: r.value for r in sink.readings if (r.name, r.step) == ("step_share", step) and r.layer}
        assert sum(shares.values()) == pytest.approx(1)
    assert "grad_norm/0" in monitor.readings


def test_only_scheduled_steps_are_looked_at():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return mse(model, batch)

    monitor, sink, _ = watched(steps=5, loss=loss, metrics=["loss"], schedule=lambda step: step in (2, 5))
    assert list(by_step(sink, "loss")) == [2, 5]
    assert len(calls) == 2
    assert monitor.steps == 5


def test_default_leaves_out_what_takes_many_passes():
    monitor, _, _ = watched()
    all_of_them, _, _ = watched(metrics="all")
    costly = {name for name, metric in gradmon.METRICS.items() if metric.costly}
    on_demand = {name for name, metric in gradmon.METRICS.items() if metric.on_demand}
    extra = set(OWN)
    assert set(monitor.readings) == set(gradmon.METRICS) - costly - on_demand | extra
    assert set(all_of_them.readings) == set(gradmon.METRICS) - on_demand | extra
    assert all_of_them.readings["probe_seconds"].value > 0


# --- steps that were not taken, several steps, other loops ---------------------------------------------------------


def test_skipped_step():
    model, sink, batches = mlp(), MemorySink(), data(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, mse, schedule=every(1), mask=None, sinks=[sink])
    before = None
    for number, batch in enumerate(batches, 1):
        before = copy.deepcopy(model) if number == 3 else before
        optimizer.zero_grad()
        mse(model, batch).backward()
        if number != 3:
            optimizer.step()
        monitor.step(batch)
    for name in ("update_ratio", "step_ratio", *NEXT):
        skipped = by_step(sink, name)[3]
        assert math.isnan(skipped.value)
        assert skipped.reason == "no optimizer step was taken"
        assert by_step(sink, name)[2].value > 0
    h = references.batch_gradient(before, mse, batches[2])
    assert by_step(sink, "grad_norm")[3].value == pytest.approx(np.linalg.norm(h))
    assert not monitor.failures


def test_accumulation_belongs_to_the_last_micro_batch():
    model, sink, batches = mlp(), MemorySink(), data(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names = ["update_ratio", "grad_norm", "step_share"]
    monitor = Monitor(model, optimizer, mse, metrics=names, schedule=every(1), sinks=[sink])
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        w = references.flat_weights(model)
        h = references.batch_gradient(model, mse, second)
        (mse(model, first) / 2).backward()
        (mse(model, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(second)
        omega = references.flat_weights(model) - w
        assert monitor.readings["update_ratio"].value == pytest.approx(references.update_ratio(omega, w))
        assert monitor.readings["grad_norm"].value == pytest.approx(np.linalg.norm(h))
    assert monitor.steps == 2
    assert not monitor.failures


def test_without_an_optimizer():
    model = mlp()
    monitor = Monitor(model, None, mse, schedule=every(1))
    batch = data(1)[0]
    monitor.step(batch)
    steps = {"update_ratio", "step_ratio", "stability", *NEXT}
    assert not steps & set(monitor.readings)
    h = references.batch_gradient(model, mse, batch)
    assert monitor.readings["grad_norm"].value == pytest.approx(np.linalg.norm(h))


# --- numbers that must not be shown --------------------------------------------------------------------------------


DIFFERENCES = ["weight_condition", "step_ratio", "step_share", "sharpness", "input_condition"]


def test_loss_with_its_own_autocast():
    model, batches = mlp(torch.float32), data(2, torch.float32)
    options = {
        "metrics": DIFFERENCES,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "next_batch": batches[1],
    }

    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return mse(model, batch)

    exact = gradmon.measure(model, mse, batches[0], **options)
    found = gradmon.measure(model, mixed, batches[0], **options)
    for name in DIFFERENCES:
        assert math.isnan(found[name].value) or found[name].value == pytest.approx(exact[name].value, rel=0.5), name


def test_model_that_does_not_repeat_itself():
    source = np.random.default_rng(0)

    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 0.05 * torch.from_numpy(source.normal(size=x.shape)))

    model, batches = Noisy(*mlp()), data(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"metrics": DIFFERENCES, "optimizer": optimizer, "next_batch": batches[1]}
    found = gradmon.measure(model, mse, batches[0], **options)
    assert all(math.isnan(found[name].value) and found[name].reason for name in DIFFERENCES)
