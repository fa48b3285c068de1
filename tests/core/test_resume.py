"""A run that is saved and taken up again reads what an uninterrupted one reads, to the last bit."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from gradmon import Metric, Monitor, every
from gradmon._evidence import (
    BatchGradient,
    Curvature,
    GradientMoments,
    InputGradients,
    InputSweep,
    PerExampleGradients,
    ScaledSweep,
    Step,
    StepPair,
    WeightSweep,
)
from gradmon.alerts import Above, Drift
from gradmon.sinks import MemorySink

SIZE, STEPS = 6, 7
CLOCK = {"probe_seconds", "monitor_overhead"}


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def dropped(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def normed(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def conv(dtype=torch.float32):
    torch.manual_seed(1)
    body = nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(12, 2)).to(dtype)


def data(dtype, count=STEPS):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x = torch.randn(SIZE, 3, generator=generator)
        made.append((x.to(dtype), torch.randn(SIZE, 2, generator=generator).to(dtype)))
    return made


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def plain(model, optimizer, batch):
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def clipped(model, optimizer, batch):
    optimizer.zero_grad()
    mse(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


class Run:
    """A training with a monitor, which can be saved after any step."""

    def __init__(self, model, optimizer=sgd, loss=mse, train=plain, **options):
        self.make = model, optimizer, loss, train, options
        self.model, self.train, self.sink = model(), train, MemorySink()
        self.optimizer = optimizer(self.model.parameters())
        # Rules and metrics have a state: each run makes its own.
        options = {name: value() if name in ("alerts", "metrics") else value for name, value in options.items()}
        options.setdefault("schedule", every(1))
        self.monitor = Monitor(self.model, self.optimizer, loss, sinks=[self.sink], **options)

    def step(self, batch):
        self.train(self.model, self.optimizer, batch)
        self.monitor.step(batch)

    def saved(self):
        """All that a checkpoint holds; the monitor's part by way of text."""
        monitor = json.dumps(self.monitor.state_dict())
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), monitor, torch.get_rng_state()))

    def resumed(self, state):
        """A new run that goes on from what was saved."""
        model, optimizer, loss, train, options = self.make
        torch.manual_seed(99)
        run = Run(model, optimizer, loss, train, **options)
        run.model.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
        run.monitor.load_state_dict(json.loads(state[2]))
        torch.set_rng_state(state[3])
        return run


def read(sink, start=0):
    """Everything that came after so many readings, but for the times; as text, in which NaN equals NaN."""
    return [str(reading) for reading in sink.readings[start:] if reading.name not in CLOCK]


def told(alerts):
    """The alerts, but for that on the times; as text."""
    return [str(alert) for alert in alerts if alert.rule != "overhead_high"]


def assert_resumes_everywhere(*, dtype=torch.float64, **made):
    """Saved after every step, each time taken up by a new run, which goes on to the end."""
    run, batches = Run(**made), data(dtype)
    torch.manual_seed(5)
    states, seen = [run.saved()], [(0, 0)]
    for batch in batches:
        run.step(batch)
        states.append(run.saved())
        seen.append((len(run.sink.readings), len(run.sink.alerts)))
    assert not [name for name in run.monitor.failures if not name.startswith("metric")]
    for number, state in enumerate(states):
        again = run.resumed(state)
        assert again.monitor.steps == number
        assert json.dumps(again.monitor.state_dict()) == state[2], f"saved anew after step {number}"
        for batch in batches[number:]:
            again.step(batch)
        readings, alerts = seen[number]
        assert read(again.sink) == read(run.sink, readings), f"resumed after step {number}"
        assert told(again.sink.alerts) == told(run.sink.alerts[alerts:])
        assert told(again.monitor.alerts) == told(run.monitor.alerts)
        names = run.monitor.readings.keys() - CLOCK
        assert {n: str(again.monitor.readings[n]) for n in names} == {n: str(run.monitor.readings[n]) for n in names}
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    return run


def assert_some_numbers(run, names):
    """The comparison was one of numbers, and not of reasons for their absence."""
    for name in names:
        found = [r.value for r in run.sink.readings if r.name == name and r.layer is None]
        assert len(found) > 1, name
        assert all(math.isfinite(value) for value in found), name


NUMBERS = [
    "weight_condition",
    "sharpness",
    "step_condition",
    "step_share",
    "step_ratio",
    "gradient_rank",
    "gradient_snr",
]


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("make", [mlp, dropped], ids=["mlp", "dropout"])
def test_with_a_loss(make, gap):
    run = assert_resumes_everywhere(model=make, loss=mse, schedule=every(gap))
    assert_some_numbers(run, NUMBERS)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("make", [normed, conv], ids=["batch_norm", "conv"])
def test_with_a_loss_in_single_precision(make, optimizer):
    run = assert_resumes_everywhere(model=make, loss=mse, optimizer=optimizer, schedule=every(2), dtype=torch.float32)
    assert_some_numbers(run, ["weight_condition", "step_condition", "gradient_snr"])


@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("mask", [None, 0.3, "default"])
def test_masks_and_layers(mask, gap):
    run = assert_resumes_everywhere(model=mlp, loss=mse, mask=mask, layers=True, schedule=every(gap))
    assert "step_condition/0" in run.monitor.readings
    assert_some_numbers(run, NUMBERS)


def test_saved_mask_takes_the_place_of_another():
    run = Run(mlp, mask=0.3, seed=1)
    for batch in data(torch.float64)[:2]:
        run.step(batch)
    state = run.saved()
    run.make = (*run.make[:4], {"mask": 0.3, "seed": 2})
    again = run.resumed(state)
    assert again.monitor.state_dict()["mask"] == run.monitor.state_dict()["mask"]


@pytest.mark.parametrize("gap", [1, 2])
def test_where_the_gradient_of_the_training_is_another(gap):
    run = assert_resumes_everywhere(model=mlp, loss=mse, train=clipped, schedule=every(gap))
    assert_some_numbers(run, NUMBERS)


def test_everything_with_a_loss():
    run = assert_resumes_everywhere(model=mlp, loss=mse, metrics=lambda: "all", mask=None, schedule=every(3))
    assert_some_numbers(run, ["input_condition", "weight_diversity"])


PASSIVE = ["step_condition", "gradient_rank", "noise_scale", "gradient_snr", "update_ratio"]


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("make", [mlp, dropped], ids=["mlp", "dropout"])
def test_passive(make, gap):
    run = assert_resumes_everywhere(model=make, loss=None, schedule=every(gap), layers=True)
    assert_some_numbers(run, [*PASSIVE[:2], PASSIVE[3]])


@pytest.mark.parametrize("make", [normed, conv], ids=["batch_norm", "conv"])
def test_passive_in_single_precision(make):
    run = assert_resumes_everywhere(
        model=make, loss=None, optimizer=adam, mask=0.3, metrics=lambda: "all", schedule=every(2), dtype=torch.float32
    )
    assert_some_numbers(run, ["step_condition", "input_gradient_rank", "gradient_snr"])


def accumulated(model, optimizer, batch):
    optimizer.zero_grad()
    for rows in (slice(None, 3), slice(3, None)):
        (mse(model, tuple(part[rows] for part in batch)) / 2).backward()
    optimizer.step()


@pytest.mark.parametrize("gap", [1, 2])
def test_passive_with_accumulation(gap):
    run = assert_resumes_everywhere(model=mlp, loss=None, train=accumulated, example_dim=0, schedule=every(gap))
    assert_some_numbers(run, ["step_condition", "gradient_rank", "gradient_snr"])


class Sequences(nn.Module):
    """Each input as a sequence of three, through a layer that looks at sequences."""

    def __init__(self, inner):
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(1, 4), inner, nn.Linear(4, 2)

    def forward(self, x):
        found = self.inner(self.enter(x.unsqueeze(-1)))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


INNER = {
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True),
}


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
@pytest.mark.parametrize("inner", INNER)
def test_sequences_in_single_precision(inner, loss):
    def make():
        torch.manual_seed(1)
        return Sequences(INNER[inner]())

    run = assert_resumes_everywhere(model=make, loss=loss, schedule=every(2), dtype=torch.float32)
    assert_some_numbers(run, ["step_condition", "gradient_rank", "gradient_snr"])


# --- alerts and failures ---------------------------------------------------------------------------------------------


def rules():
    return [
        Above("grad_norm", 0.0, name="always", after=4, clear_after=2),
        Above("loss", 1.0, name="now_and_then", after=2, clear_after=2),
        Drift("grad_norm", 1.05, direction="up", name="drifts"),
    ]


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_alerts_in_mid_hysteresis(loss):
    run = assert_resumes_everywhere(model=mlp, loss=loss, alerts=rules)
    assert [alert.step for alert in run.sink.alerts if alert.rule == "always"] == [4]


class Flaky:
    """A metric that fails at some of its calls, whose number is that of the step and not of the process."""

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, seen):
        if self.bad(seen.loss):
            raise ValueError("boom")
        return seen.loss


def flaky(bad):
    return lambda: ["loss", "step_condition", Metric("flaky", (BatchGradient,), Flaky(bad), "low", "a test")]


def test_metric_that_was_given_up():
    """Saved after it was given up: it stays so."""
    run, batches = Run(mlp, metrics=flaky(lambda loss: True)), data(torch.float64)
    for batch in batches[:4]:
        run.step(batch)
    again = run.resumed(run.saved())
    for batch in batches[4:]:
        run.step(batch)
        again.step(batch)
        assert "given up after 3 failures in a row" in again.monitor.readings["flaky"].reason
        assert str(again.monitor.readings["flaky"]) == str(run.monitor.readings["flaky"])
    assert again.monitor.failures == run.monitor.failures == {"metric flaky": 3}


def test_metric_that_is_about_to_be_given_up():
    """Failures in a row are counted across an interruption."""
    assert_resumes_everywhere(model=mlp, metrics=flaky(lambda loss: True))


def test_number_of_failures_goes_on():
    run = assert_resumes_everywhere(model=mlp, metrics=flaky(lambda loss: loss > 0.8))
    assert 0 < sum(run.monitor.failures.values()) < STEPS


def own(needs, compute):
    return lambda: ["loss", Metric("own", needs, compute, "low", "a test")]


def test_metric_of_the_caller_that_waits_for_the_next_batch():
    make = own((StepPair,), lambda pair: float(pair.other.norm()))
    run = assert_resumes_everywhere(model=mlp, metrics=make)
    assert_some_numbers(run, ["own"])


def two_that_wait():
    other = Metric(
        "own", (StepPair, BatchGradient), lambda pair, seen: float(pair.other.norm()) * seen.loss, "low", "-"
    )
    return ["loss", "step_condition", other]


def numbers_in(value):
    """Every number in some evidence, at any depth."""
    if isinstance(value, torch.Tensor):
        return value.double().flatten().tolist()
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for inner in value for number in numbers_in(inner)]
    return [float(value)] if isinstance(value, (int, float)) else []


def waits_with(*kinds):
    """A metric into which every number of its evidence goes, each with a weight of its own."""

    def compute(*evidence):
        return sum(number / (place + 1) for place, number in enumerate(numbers_in(evidence)) if math.isfinite(number))

    return lambda: ["loss", "step_condition", Metric("own", (kinds[0], StepPair, *kinds[1:]), compute, "low", "-")]


def test_metric_that_waits_with_other_evidence():
    assert_some_numbers(assert_resumes_everywhere(model=mlp, metrics=two_that_wait), ["own"])


@pytest.mark.parametrize("mask", [None, 0.3])
@pytest.mark.parametrize(
    "kinds",
    [
        (WeightSweep, BatchGradient),
        (ScaledSweep, Curvature),
        (InputSweep, Step),
        (PerExampleGradients, GradientMoments, InputGradients),
    ],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)
def test_metric_that_waits_with_evidence_of_any_kind(kinds, mask):
    run = assert_resumes_everywhere(model=mlp, metrics=waits_with(*kinds), mask=mask, schedule=every(2))
    assert_some_numbers(run, ["own", "step_condition"])


@pytest.mark.parametrize("kinds", [(BatchGradient,), (PerExampleGradients, GradientMoments), (InputGradients, Step)])
def test_passive_metric_that_waits_with_other_evidence(kinds):
    def metrics():
        return waits_with(*kinds)()[1:]

    run = assert_resumes_everywhere(model=mlp, loss=None, metrics=metrics, schedule=every(2))
    assert_some_numbers(run, ["own", "step_condition"])


def test_metric_that_needs_something_else_now():
    """The same name, and other needs: it has no reading, and takes no other along."""
    run, batches = Run(mlp, metrics=two_that_wait), data(torch.float64)
    run.step(batches[0])
    state = run.saved()
    run.make = (*run.make[:4], {"metrics": own((StepPair, Step), lambda pair, step: step.step_norm)})
    again = run.resumed(state)
    again.step(batches[1])
    assert [reading for reading in again.sink.readings if (reading.name, reading.step) == ("own", 1)] == []
    assert not again.monitor.failures


# --- where the run is taken up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_saving_changes_nothing(loss):
    runs = [Run(mlp, loss=loss) for _ in range(2)]
    for batch in data(torch.float64):
        for run, saves in zip(runs, (False, True), strict=True):
            run.step(batch)
            if saves:
                run.saved()
    assert read(runs[0].sink) == read(runs[1].sink)


@pytest.mark.parametrize("loss", [mse, None], ids=["loss", "passive"])
def test_state_is_taken_up_by_a_monitor_in_mid_run(loss):
    """Back to an earlier state, in the same process."""
    run, batches = Run(mlp, loss=loss), data(torch.float64)
    for batch in batches[:3]:
        run.step(batch)
    model, optimizer, monitor, _ = run.saved()
    start = len(run.sink.readings)
    for batch in batches[3:]:
        run.step(batch)
    first, middle = read(run.sink, start), len(run.sink.readings)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.monitor.load_state_dict(json.loads(monitor))
    for batch in batches[3:]:
        run.step(batch)
    assert read(run.sink, middle) == first
