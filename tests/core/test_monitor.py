"""The monitor in a training loop: it changes no bit of it, reads what `measure` reads, and never stops it."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradmon
from gradmon import Metric, Monitor, Reading, Unavailable, every
from gradmon._evidence import BatchGradient
from gradmon.alerts import Above, NonFinite, default_rules
from gradmon.metrics import OWN
from gradmon.sinks import MemorySink
from tests import references, zoo

SIZE = 6
EXAMPLES = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence"]
EXAMPLES += ["noise_scale", "noise_ratio", "gradient_snr"]
NEXT = {"step_condition", "step_share", "batch_share"}
CLOCK = {"probe_seconds", "monitor_overhead"}


@pytest.fixture
def log():
    """The records of the monitor's logger."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    logger, handler = logging.getLogger("gradmon"), Keep()
    logger.addHandler(handler)
    logger.propagate = False
    yield records
    logger.removeHandler(handler)
    logger.propagate = True


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def data(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x = torch.randn(SIZE, 3, generator=generator)
        made.append((x.to(dtype), torch.randn(SIZE, 2, generator=generator).to(dtype)))
    return made


def train(model, optimizer, batches, monitor=None, *, after=lambda step: None):
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(batch)
        after(step)


def watched(steps=3, loss=mse, dtype=torch.float64, lr=0.05, **options):
    """A short training with a monitor on every step; everything that it wrote is in the sink."""
    model, sink = mlp(dtype), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options.setdefault("schedule", every(1))
    options.setdefault("mask", None)
    monitor = Monitor(model, optimizer, loss, sinks=[sink], **options)
    train(model, optimizer, data(steps, dtype), monitor)
    return monitor, sink, model


def by_step(sink, name):
    return {reading.step: reading for reading in sink.readings if reading.name == name and reading.layer is None}


# --- not a bit of the training changes -----------------------------------------------------------------------------


class Norms(nn.Module):
    """BatchNorm, dropout and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.second, self.frozen = nn.Linear(8, 2), nn.Linear(3, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.norm(self.first(x))))) + self.frozen(x)


def plain(model, optimizer, batch, step):
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def clipped(model, optimizer, batch, step):
    optimizer.zero_grad(set_to_none=False)
    mse(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def accumulated(model, optimizer, batch, step):
    (mse(model, batch) / 2).backward()
    if step % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()


def with_closure(model, optimizer, batch, step):
    def closure():
        optimizer.zero_grad()
        value = mse(model, batch)
        value.backward()
        return value

    optimizer.step(closure)


RECIPES = {
    "sgd_momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), plain),
    "sgd_nesterov_decay": (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1), plain),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), plain),
    "adamw_foreach": (lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True), plain),
    "adamw_fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), plain),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5), plain),
    "clipping": (lambda p: torch.optim.SGD(p, lr=0.05), clipped),
    "accumulation": (lambda p: torch.optim.Adam(p, lr=0.01), accumulated),
    "closure": (lambda p: torch.optim.SGD(p, lr=0.05), with_closure),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), with_closure),
}


def whole_training(recipe, monitored, metrics="all", gap=1):
    """Everything that a training leaves behind."""
    make, step = RECIPES[recipe]
    torch.manual_seed(3)
    model = Norms()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    monitor = None
    sink = MemorySink()
    if monitored:
        options = {"metrics": metrics, "schedule": every(gap), "layers": True, "mask": 0.3, "sinks": sink}
        monitor = Monitor(model, optimizer, mse, **options)
    rates, random = [], []
    for number, batch in enumerate(data(7, torch.float32), 1):
        step(model, optimizer, batch, number)
        if monitor is not None:
            monitor.step(batch)
        random.append(torch.rand(2))
        if recipe != "accumulation" or number % 2 == 0:
            scheduler.step()
        average.update_parameters(model)
        rates.append(scheduler.get_last_lr())
    if monitor is not None:
        assert not monitor.failures
        numbers = {reading.name for reading in sink.readings if math.isfinite(reading.value)}
        left_out = {"stability"} | {
            m.name for m in gradmon.METRICS.values() if m.on_demand or (metrics != "all" and m.costly)
        }
        assert set(gradmon.METRICS) - left_out <= numbers
        monitor.close()
    return {
        "model": dict(model.state_dict()),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "average": dict(average.state_dict()),
        "optimizer": optimizer.state_dict(),
        "rates": rates,
        "random": [*random, torch.get_rng_state()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(p._backward_hooks or {}) for p in model.parameters()],
    }


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{where}.{place}")
    else:
        assert a == b, where


@pytest.mark.parametrize(("metrics", "gap"), [("all", 1), ("default", 2)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_the_same_to_the_last_bit(recipe, metrics, gap):
    watched = whole_training(recipe, monitored=True, metrics=metrics, gap=gap)
    assert_identical(watched, whole_training(recipe, monitored=False), recipe)


def test_monitor_under_no_grad_and_autocast_changes_nothing():
    results = []
    for monitored in (False, True):
        model = mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        monitor = Monitor(model, optimizer, mse, schedule=every(1)) if monitored else None
        for batch in data(4, torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = mse(model, batch)
                value.backward()
                optimizer.step()
                with torch.no_grad():
                    if monitor is not None:
                        monitor.step(batch)
                        assert not monitor.failures
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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


# --- passive: nothing but what the training itself reveals ---------------------------------------------------------


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
    return references.shares(zoo.averaged_problem(model, mse, batch))


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
    G = references.input_gradients(zoo.averaged_problem(copy.deepcopy(model), mse, batch))
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


# --- what fails inside never stops the training --------------------------------------------------------------------


def explode(*args):
    raise RuntimeError("boom")


class BrokenSink(MemorySink):
    def write(self, readings):
        explode()

    def alert(self, alert):
        explode()

    def close(self):
        explode()


class BrokenRule:
    name = "broken"

    def __call__(self, reading):
        explode()


def broken_metric(needs=(BatchGradient,), compute=explode):
    return Metric("broken", needs, compute, "low", "a test")


def trained_alone(steps=3):
    model = mlp()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), data(steps))
    return model


def assert_same_weights(model, other):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_failing_metric(log):
    monitor, sink, model = watched(metrics=[broken_metric(), "loss"])
    assert_same_weights(model, trained_alone())
    assert monitor.failures == {"metric broken": 3}
    assert len(log) == 1
    assert "metric broken" in log[0].getMessage()
    for reading in by_step(sink, "broken").values():
        assert math.isnan(reading.value)
        assert reading.reason == "RuntimeError: boom"
    assert all(math.isfinite(reading.value) for reading in by_step(sink, "loss").values())
    assert [r.value for r in by_step(sink, "monitor_failures").values()] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, float("nan")])
def test_metric_that_is_nan_gets_a_reason(value):
    monitor, _, _ = watched(metrics=[broken_metric(compute=lambda seen: value)])
    assert math.isnan(monitor.readings["broken"].value)
    assert monitor.readings["broken"].reason == "not a number"
    assert not monitor.failures


def test_metric_that_is_unavailable_is_no_failure(log):
    def compute(seen):
        raise Unavailable("nothing to see")

    monitor, _, _ = watched(metrics=[broken_metric(compute=compute)])
    assert monitor.readings["broken"].reason == "nothing to see"
    assert not monitor.failures
    assert not log


@pytest.mark.parametrize("order", [1, -1])
def test_failing_sink(log, order):
    model, good, bad = mlp(), MemorySink(), BrokenSink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sinks = [bad, good][::order]
    with Monitor(model, optimizer, mse, metrics=["loss"], schedule=every(1), sinks=sinks, alerts=None) as monitor:
        train(model, optimizer, data(3), monitor)
    assert_same_weights(model, trained_alone())
    assert monitor.failures == {"sink BrokenSink": 4}
    assert [r.value for r in by_step(good, "sink_errors").values()] == [0, 1, 2]
    assert len(log) == 1
    assert list(by_step(good, "loss")) == [1, 2, 3]


def test_failing_schedule(log):
    def schedule(step):
        return explode() if step == 2 else True

    monitor, sink, model = watched(metrics=["loss", "update_ratio"], schedule=schedule)
    assert_same_weights(model, trained_alone())
    assert list(by_step(sink, "loss")) == [1, 3]
    assert set(monitor.failures) == {"schedule"}
    assert len(log) == 1


def test_failing_rule(log):
    monitor, sink, model = watched(metrics=["loss"], alerts=[BrokenRule(), Above("loss", 0.0)], on_alert=None)
    assert_same_weights(model, trained_alone())
    assert set(monitor.failures) == {"alert broken"}
    assert len(log) == 1
    assert [alert.rule for alert in sink.alerts] == ["loss_high"]


def test_failing_loss(log):
    monitor, sink, model = watched(loss=explode, metrics="all")
    assert_same_weights(model, trained_alone())
    names = [name for name, metric in gradmon.METRICS.items() if not metric.on_demand]
    for name in names:
        reading = by_step(sink, name)[1]
        assert math.isnan(reading.value)
        assert reading.reason == "RuntimeError: boom"
    assert sum(monitor.failures.values()) > 0
    assert len(log) == len(set(monitor.failures))


def test_one_failing_loss_is_logged_once(log):
    watched(loss=explode, metrics="all")
    assert len(log) == 1


def test_loss_that_fails_for_a_while():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return explode() if len(calls) <= 2 else mse(model, batch)

    monitor, sink, model = watched(loss=loss, metrics=["loss", "grad_norm"])
    assert_same_weights(model, trained_alone())
    values = by_step(sink, "grad_norm")
    assert math.isnan(values[1].value)
    assert math.isfinite(values[3].value)
    assert math.isfinite(monitor.readings["loss"].value)


@pytest.mark.parametrize("batch", [None, "text", {"a": 1}, torch.tensor(1.0), torch.ones(0, 3)])
def test_batch_that_cannot_be_used(log, batch):
    model, sink = mlp(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, mse, schedule=every(1), sinks=[sink])
    for good in data(2):
        optimizer.zero_grad()
        mse(model, good).backward()
        optimizer.step()
        monitor.step(batch)
    assert_same_weights(model, trained_alone(2))
    assert sum(monitor.failures.values()) >= 2
    assert len(log) == len(monitor.failures)
    assert not any(math.isfinite(r.value) for r in sink.readings if r.name in gradmon.METRICS)


def test_keyboard_interrupt_is_not_swallowed():
    def loss(model, batch):
        raise KeyboardInterrupt

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, loss, schedule=every(1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        monitor.step(data(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


# --- alerts --------------------------------------------------------------------------------------------------------


def test_alerts_fire_and_resolve():
    model, sink = mlp(), MemorySink()
    rules = [Above("loss", 10.0, name="too_high", severity="critical", remedy="Stop."), NonFinite()]
    monitor = Monitor(model, None, mse, metrics=["loss"], schedule=every(1), sinks=[sink], alerts=rules)
    x, t = data(1)[0]
    active = []
    for factor in (1, 100, 100, 1, math.nan, 1):
        monitor.step((x, t * factor))
        active.append([alert.rule for alert in monitor.alerts])
    assert active == [[], ["too_high"], ["too_high"], [], ["nonfinite"], []]
    assert [(a.rule, a.state, a.step) for a in sink.alerts] == [
        ("too_high", "firing", 2),
        ("too_high", "resolved", 4),
        ("nonfinite", "firing", 5),
        ("nonfinite", "resolved", 6),
    ]
    assert sink.alerts[0].severity == "critical"
    assert sink.alerts[0].remedy == "Stop."
    assert not monitor.failures


def test_divergence_raises_the_default_alerts():
    _, sink, model = watched(steps=14, lr=1e40, metrics="default")
    assert not all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert {"nonfinite", "step_too_long"} <= {alert.rule for alert in sink.alerts}


def test_no_alerts():
    monitor, sink, _ = watched(steps=8, lr=1e6, alerts=None)
    assert sink.alerts == monitor.alerts == []


# --- state ---------------------------------------------------------------------------------------------------------


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(is_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str)


def round_trip(state, kind, folder):
    if kind == "json":
        return json.loads(json.dumps(state, allow_nan=True))
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["json", "torch"])
def test_resumed_run_reads_what_an_uninterrupted_one_reads(kind, tmp_path):
    def start():
        model, sink = mlp(), MemorySink()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        # Another seed than the saved one: the mask must come from the state.
        clocked = {"overhead_high"}
        rules = [Above("loss", 0.0, after=4), *(rule for rule in default_rules() if rule.name not in clocked)]
        options = {"metrics": "all", "schedule": every(2), "layers": True, "alerts": rules, "sinks": [sink]}
        return model, optimizer, sink, Monitor(model, optimizer, mse, mask=0.3, **options)

    batches = data(9)
    model, optimizer, sink, monitor = start()
    train(model, optimizer, batches[:5], monitor)
    state, saved = monitor.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert is_plain(state)
    expected_readings, expected_alerts = monitor.readings, monitor.alerts
    train(model, optimizer, batches[5:], monitor)

    other, again, resumed_sink, resumed = start()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(round_trip(state, kind, tmp_path))
    assert resumed.steps == 5
    assert str(resumed.readings) == str(expected_readings)
    assert resumed.alerts == expected_alerts
    train(other, again, batches[5:], resumed)
    late = [r for r in sink.readings if r.step > 5 and r.name not in CLOCK]
    assert str([r for r in resumed_sink.readings if r.name not in CLOCK]) == str(late)
    assert resumed_sink.alerts == [alert for alert in sink.alerts if alert.step > 5]
    assert_same_weights(model, other)


def test_state_of_a_mask_is_restored():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saved = Monitor(model, optimizer, mse, mask=0.3, seed=5).state_dict()
    monitor = Monitor(model, optimizer, mse, mask=0.3, seed=6)
    assert monitor.state_dict()["mask"] != saved["mask"]
    monitor.load_state_dict(saved)
    assert monitor.state_dict()["mask"] == saved["mask"]
    unmasked = Monitor(model, optimizer, mse, mask=None).state_dict()
    monitor.load_state_dict(unmasked)
    assert monitor.state_dict() == unmasked


def test_state_that_does_not_fit():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, mse, mask=0.3)
    with pytest.raises(gradmon.ArgumentError, match=r"`state` must be of version 3\. Got 1"):
        monitor.load_state_dict({**monitor.state_dict(), "version": 1})
    wide = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 2))
    other = Monitor(wide, torch.optim.SGD(wide.parameters(), lr=0.05), mse, mask=0.3)
    with pytest.raises(gradmon.ArgumentError, match="`mask` must fit"):
        monitor.load_state_dict(other.state_dict())
    monitor.load_state_dict({})
    assert monitor.steps == 0


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


# --- beginning and end ---------------------------------------------------------------------------------------------


class Counting(MemorySink):
    closed = 0
    bound = None

    def close(self):
        self.closed += 1

    def bind(self, run, rank):
        self.bound = (run, rank)


def test_close():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with Monitor(model, optimizer, mse, schedule=every(1), sinks=sink, run="name", rank=3) as monitor:
        assert len(optimizer._optimizer_step_pre_hooks) == hooks + 1
        train(model, optimizer, data(1), monitor)
    assert sink.bound == ("name", 3)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    seen = len(sink.readings)
    monitor.close()
    train(model, optimizer, data(2), monitor)
    assert sink.closed == 1
    assert len(sink.readings) == seen
    assert monitor.readings["loss"].step == 1


def test_context_lets_errors_through_and_closes():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ZeroDivisionError), Monitor(model, optimizer, mse, sinks=[sink]):
        raise ZeroDivisionError
    assert sink.closed == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_constructor_that_fails_leaves_nothing():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(gradmon.ArgumentError, match="`sinks`"):
        Monitor(model, optimizer, mse, sinks=[sink, "no_such_sink"])
    assert sink.closed == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_disabled(monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    monitor, sink, model = watched(loss=explode, mask=99, metrics="nonsense")
    assert_same_weights(model, trained_alone())
    assert monitor.readings == {}
    assert monitor.alerts == []
    assert monitor.steps == 0
    assert sink.readings == []
    assert monitor.state_dict() == {}
    monitor.load_state_dict({"version": 1})
    with monitor:
        pass
    monitor.close()


def test_two_monitors_on_one_optimizer():
    model, sinks = mlp(), [MemorySink(), MemorySink()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitors = [Monitor(model, optimizer, mse, metrics="all", schedule=every(1), sinks=[sink]) for sink in sinks]
    for batch in data(3):
        train(model, optimizer, [batch])
        for monitor in monitors:
            monitor.step(batch)
    first, second = ([r for r in sink.readings if r.name not in CLOCK] for sink in sinks)
    assert str(first) == str(second)
    assert_same_weights(model, trained_alone())


WRONG = [
    ({"model": "text"}, "`model` must be a torch.nn.Module. Got str"),
    ({"model": nn.ReLU()}, "`model` must have at least one trainable parameter. Got none"),
    ({"optimizer": "sgd"}, "`optimizer` must be a torch.optim.Optimizer. Got str"),
    ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)}, "`optimizer` must hold parameters of `model`"),
    ({"loss": 3}, "`loss` must be callable as loss\\(model, batch\\), or None. Got int"),
    ({"metrics": "nonsense"}, "`metrics` must be Metric objects or among .*weight_condition.*. Got 'nonsense'"),
    ({"metrics": ["loss", 3]}, "`metrics` must be .*. Got 3"),
    ({"schedule": 5}, "`schedule` must be a budget, or callable as schedule\\(step\\). Got 5"),
    ({"mask": 0}, "`mask` must be in \\(0, 1\\]. Got 0"),
    ({"mask": 1.5}, "`mask` must be in \\(0, 1\\]. Got 1.5"),
    ({"mask": True}, "`mask` must be in \\(0, 1\\]. Got True"),
    ({"seed": 0.5}, "`seed` must be an integer. Got 0.5"),
    ({"run": ""}, "`run` must be a name. Got ''"),
    ({"run": 7}, "`run` must be a name. Got 7"),
    ({"rank": -1}, "`rank` must be an integer of at least 0. Got -1"),
    ({"rank": True}, "`rank` must be an integer of at least 0. Got True"),
    ({"sinks": ["nowhere:x"]}, "`sinks` must begin with the name of an installed sink"),
    ({"sinks": [object()]}, "`sinks` must be sinks"),
    ({"sinks": MemorySink}, "`sinks` must be sinks"),
    ({"alerts": [print]}, '`alerts` must be "default" or rules'),
    ({"weights": "krylov"}, "`weights` must be a sampler of gradmon.perturbations.weights. Got str"),
    ({"inputs": "ascent"}, "`inputs` must be a sampler of gradmon.perturbations.inputs. Got str"),
    ({"derivative": "both"}, '`derivative` must be "finite" or "exact". Got \'both\''),
    ({"micro_batches": 1}, "`micro_batches` must be an integer of at least 2. Got 1"),
    ({"reduction": "none"}, '`reduction` must be "mean" or "sum". Got \'none\''),
    ({"layers": 1}, "`layers` must be True or False. Got 1"),
    ({"optimizer": None, "metrics": ["step_ratio"]}, "`optimizer` must be given for `step_ratio`. Got None"),
]


@pytest.mark.parametrize(("wrong", "match"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_wrong_arguments(wrong, match):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    arguments = {"model": model, "optimizer": optimizer, "loss": mse, **wrong}
    with pytest.raises(gradmon.ArgumentError, match=match):
        Monitor(**arguments)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("wrong", [{"sinks": 3}, {"alerts": 3}, {"input_module": "nowhere"}, {"input_module": 3}])
def test_wrong_arguments_that_cannot_be_iterated_or_found(wrong):
    model = mlp()
    with pytest.raises(gradmon.ArgumentError, match=f"`{next(iter(wrong))}`"):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.05), mse, **wrong)


def test_reading_is_a_plain_tuple():
    monitor, _, _ = watched(metrics=["loss"])
    reading = monitor.readings["loss"]
    assert isinstance(reading, Reading)
    assert type(reading.value) is float
    assert reading.step == 3
