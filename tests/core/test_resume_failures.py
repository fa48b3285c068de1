"""Alerts, failures and metrics that wait go on where the run was saved."""

import dataclasses
import math

import pytest
import torch

from gradmon import Metric, every
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
from tests.core.monitored import mlp, mse
from tests.core.resumed import STEPS, Run, assert_resumes_everywhere, assert_some_numbers, data


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
