"""Memory that runs out, and metrics that fail: the training does not notice, and what can still be had is right."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Metric
from gradmon._evidence import BatchGradient
from gradmon.per_example import RULES
from gradmon.perturbations.weights import Krylov, Random
from tests.core.failing import MEMORY, STEPS, Loss, Run

GIVEN_UP = "out of memory, and also with half of max_memory: given up"
ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "machine": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    "python": lambda: MemoryError(),
}
EXAMPLES = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence", "noise_scale"]
EXAMPLES += ["noise_ratio", "gradient_snr", "input_gradient_rank"]
SWEEP = ["weight_condition", "weight_cosine", "weight_coherence"]
CURVATURE = ["sharpness", "stability"]
NEXT = ["step_condition", "step_share", "batch_share"]
STEP = ["update_ratio", "step_ratio"]
GRADIENT = ["loss", "grad_norm", "param_norm"]
ALL = [*EXAMPLES, *SWEEP, *CURVATURE, *NEXT, *STEP, *GRADIENT]


@pytest.fixture(params=ERRORS)
def error(request):
    return ERRORS[request.param]


@pytest.fixture(scope="module")
def alone():
    """The weights after each step of the same training without a monitor, and the readings of one that never fails."""
    return Run(Loss(), schedule=lambda step: False), Run(Loss())


def assert_untouched(run, alone):
    assert all(np.array_equal(a, b) for a, b in zip(run.weights, alone[0].weights, strict=True))
    assert torch.equal(run.random, alone[0].random)


def assert_like(run, other, names):
    """The same numbers as those of a run in which nothing failed."""
    for name in names:
        found, expected = run.readings(name), other.readings(name)
        assert list(found) == list(expected), name
        for number, reading in found.items():
            np.testing.assert_allclose(reading.value, expected[number].value, rtol=1e-9, err_msg=f"{name} {number}")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_what_never_fails_is_right(alone):
    """The harness itself: every number that the others are compared with."""
    run = alone[1]
    run.assert_right(ALL, range(1, STEPS))
    assert not run.monitor.failures
    purposes = [purpose for purpose, step, _ in run.loss.seen if step == STEPS]
    assert purposes == ["before the last", "examples", "after", "moved"]


ONCE = [
    (3, "examples"),
    (3, "moved"),
    (3, "after"),
    (1, "examples"),
    (1, "before"),
    (1, "moved"),
    (1, "after"),
    (4, "before the last"),
]


@pytest.mark.parametrize(("step", "purpose"), ONCE)
def test_memory_that_runs_out_once(step, purpose, error, alone):
    """The pass is made once more, with half of the memory, and nothing is missing."""
    failed = []

    def fails(what, number, call):
        if (number, what) == (step, purpose) and not failed:
            failed.append(call)
            return True
        return False

    run = Run(Loss(fails, error))
    assert failed
    assert_untouched(run, alone)
    assert_like(run, alone[1], ALL)
    assert run.memory == MEMORY // 2
    assert not run.monitor.failures


LOST = {
    "examples": EXAMPLES,
    "moved": [*SWEEP, *CURVATURE],
    "after": [*STEP, *NEXT],
}


@pytest.mark.parametrize("since", [1, 3])
@pytest.mark.parametrize("purpose", LOST)
def test_memory_that_runs_out_twice(purpose, since, error, alone):
    """That kind of evidence is given up, and said so; all else is right, and not one more pass is tried."""
    run = Run(Loss(lambda what, number, call: what == purpose and number >= since, error))
    assert_untouched(run, alone)
    kept = [name for name in ALL if name not in LOST[purpose]]
    assert_like(run, alone[1], kept)
    run.assert_right(kept, range(1, STEPS))
    for name in LOST[purpose]:
        for number, reading in run.readings(name).items():
            assert math.isnan(reading.value) == (number >= since), (name, number)
            assert (reading.reason == GIVEN_UP) == (number >= since), (name, number)
    tried = [number for what, number, _ in run.loss.seen if what == purpose and number >= since]
    assert set(tried) == {since}
    assert run.memory < MEMORY
    assert not run.monitor.failures


@pytest.mark.parametrize("since", [2, 4])
def test_memory_that_runs_out_twice_on_the_next_batch(since, error, alone):
    run = Run(Loss(lambda what, number, call: what == "before the last" and number >= since, error))
    assert_untouched(run, alone)
    assert_like(run, alone[1], [name for name in ALL if name not in NEXT])
    for name in NEXT:
        for number, reading in run.readings(name).items():
            assert (reading.reason == GIVEN_UP) == (number >= since - 1), (name, number)
    assert {number for what, number, _ in run.loss.seen if what == "before the last" and number >= since} == {since}
    assert not run.monitor.failures


def test_memory_that_runs_out_everywhere(error, alone, log):
    """No number, a reason for each, and one line in the log."""
    run = Run(Loss(lambda what, number, call: True, error))
    assert_untouched(run, alone)
    for name in ALL:
        found = run.readings(name)
        assert list(found) == list(range(1, STEPS + 1))
        assert all(math.isnan(reading.value) and reading.reason for reading in found.values())
    assert set(run.monitor.failures) == {"probe"}
    assert len(log) == 1
    assert run.memory >= 1


@pytest.mark.parametrize("kind", [Krylov, Random])
def test_sampler_that_runs_out_of_memory(kind, error, alone):
    class Greedy(kind):
        def draw(self, point):
            raise error()
            yield

    run = Run(Loss(), weights=Greedy(2))
    assert_untouched(run, alone)
    kept = [name for name in ALL if name not in [*SWEEP, *CURVATURE]]
    assert_like(run, alone[1], kept)
    for name in SWEEP:
        assert all(reading.reason == GIVEN_UP for reading in run.readings(name).values()), name
    for name in CURVATURE:  # other samplers than those over a span are not used for it
        given_up = [reading.reason == GIVEN_UP for reading in run.readings(name).values()]
        assert all(given_up) if kind is Krylov else not any(given_up), name
    assert not run.monitor.failures


def greedy(rule, fails, error):
    """A rule for a function which runs out of memory at some of its calls."""
    calls = []

    def looked(part):
        calls.append(1)
        if fails(len(calls)):
            raise error()
        return rule(part)

    return {**RULES, F.linear: looked}, calls


PASSIVE = [name for name in EXAMPLES if name != "input_gradient_rank"]
REVEALED = ["grad_norm", "param_norm", "update_ratio", "step_condition"]


def test_passive_rule_that_runs_out_of_memory_once(alone):
    rules, _ = greedy(RULES[F.linear], lambda call: call == 5, ERRORS["device"])
    run, other = Run(rules=rules), Run()
    assert_untouched(run, alone)
    assert_like(run, other, REVEALED)
    missing = {number for number, reading in run.readings("gradient_rank").items() if math.isnan(reading.value)}
    assert len(missing) == 1
    for name in PASSIVE:
        for number, reading in run.readings(name).items():
            if number in missing:
                assert reading.reason == "out of memory"
            else:
                assert reading.value == pytest.approx(other.readings(name)[number].value, rel=1e-9)
    assert run.memory == MEMORY // 2
    assert not run.monitor.failures


def test_passive_rule_that_always_runs_out_of_memory(alone):
    rules, calls = greedy(RULES[F.linear], lambda call: True, ERRORS["device"])
    run = Run(rules=rules)
    assert_untouched(run, alone)
    run.assert_right(REVEALED, range(1, STEPS))
    for name in PASSIVE:
        reasons = [reading.reason for reading in run.readings(name).values()]
        assert reasons == ["out of memory", *[GIVEN_UP] * (STEPS - 1)], name
    assert len(calls) == 4  # for two layers in two steps, and never again
    assert not run.monitor.failures
    assert not any(parameter._backward_hooks for parameter in run.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


@pytest.mark.parametrize("kind", ["machine", "python"])
def test_passive_rule_that_runs_out_of_the_memory_of_the_machine(kind, alone):
    """Numbers that are right, or reasons."""
    rules, _ = greedy(RULES[F.linear], lambda call: True, ERRORS[kind])
    run = Run(rules=rules)
    assert_untouched(run, alone)
    run.assert_right(REVEALED, range(1, STEPS))
    for number in range(1, STEPS):
        expected = run.expected(number)
        for name in PASSIVE:
            found = run.readings(name)[number]
            right = found.value == pytest.approx(expected[name], rel=1e-8)
            assert right or (math.isnan(found.value) and found.reason), found
    assert not run.monitor.failures


# --- metrics ---------------------------------------------------------------------------------------------------------


class Flaky:
    """A metric's function that fails at some of its calls."""

    def __init__(self, bad, error=lambda: RuntimeError("boom")):
        self.bad, self.error, self.calls = bad, error, 0

    def __call__(self, seen):
        self.calls += 1
        if self.calls in self.bad:
            raise self.error()
        return seen.loss


def flaky(compute, needs=(BatchGradient,)):
    return Metric("flaky", needs, compute, "low", "a test")


@pytest.mark.parametrize("make", [lambda: RuntimeError("boom"), *ERRORS.values()], ids=["boom", *ERRORS])
def test_metric_that_fails_three_times_in_a_row_is_given_up(make, alone, log):
    compute = Flaky({1, 2, 3}, make)
    run = Run(Loss(), metrics=["loss", flaky(compute), "step_ratio"])
    assert_untouched(run, alone)
    assert_like(run, alone[1], ["loss", "step_ratio"])
    assert compute.calls == 3
    assert run.monitor.failures == {"metric flaky": 3}
    assert len(log) == 1
    said = f"{type(make()).__name__}: {make()}"
    reasons = [reading.reason for reading in run.readings("flaky").values()]
    assert reasons == [said] * 3 + [f"given up after 3 failures in a row: {said}"] * 2
    assert all(math.isnan(reading.value) for reading in run.readings("flaky").values())
    assert [r.value for r in run.readings("monitor_failures").values()] == [1, 2, 3, 3, 3]


def test_metric_that_is_given_up_costs_nothing():
    compute = Flaky(set(range(99)))
    run = Run(Loss(), metrics=["loss", flaky(compute, (gradmon._evidence.WeightSweep,))], weights=Random(4))
    passes = {n: [what for what, number, _ in run.loss.seen if number == n] for n in range(1, STEPS + 1)}
    assert [len(passes[number]) for number in range(2, STEPS + 1)] == [5, 5, 1, 1]


def test_metric_that_fails_twice_and_then_does_not_is_kept(alone):
    compute = Flaky({1, 2, 4, 5})
    run = Run(Loss(), metrics=["loss", flaky(compute)])
    assert compute.calls == STEPS
    assert run.readings("flaky")[3].value == alone[1].readings("loss")[3].value
    assert [reading.reason for reading in run.readings("flaky").values()] == [
        None if number == 3 else "RuntimeError: boom" for number in range(1, 6)
    ]
    assert run.monitor.failures == {"metric flaky": 4}


def test_metric_onto_the_next_batch_is_given_up():
    metric = flaky(lambda pair: 1 / 0, gradmon.METRICS["step_condition"].needs)
    run = Run(Loss(), metrics=["loss", metric])
    assert run.monitor.failures == {"metric flaky": 3}
    assert all(math.isnan(reading.value) for reading in run.readings("flaky").values())
    # Its passes, the one after the step and those on the next batch, are not made any more.
    assert len([what for what, number, _ in run.loss.seen if number == STEPS]) == 1


def test_loss_that_fails_at_any_pass(alone, log):
    """Whatever fails, at whatever pass: nothing gets out, and the other steps are right."""
    passes = [(number, call) for _, number, call in alone[1].loss.seen]
    for bad in passes:
        run = Run(Loss(lambda what, number, call, bad=bad: (number, call) == bad, lambda: ValueError("boom")))
        assert_untouched(run, alone)
        reasons = [r.reason or "" for r in run.sink.readings if r.step in (bad[0], bad[0] - 1)]
        assert bad[0] == 1 or any("ValueError: boom" in reason for reason in reasons), bad
        for number in set(range(1, STEPS)) - {bad[0], bad[0] - 1}:
            for name in (*GRADIENT, *STEP, *EXAMPLES):
                found, expected = run.readings(name)[number], alone[1].readings(name)[number]
                assert found.value == pytest.approx(expected.value, rel=1e-9), (bad, name, number)
    assert all(record.getMessage().endswith("failed; training goes on") for record in log)


@pytest.mark.parametrize("purpose", ["moved", "after"])
def test_each_failure_is_logged_once(purpose, log):
    run = Run(Loss(lambda what, number, call: what == purpose, lambda: ValueError("boom")))
    assert len(log) == len(run.monitor.failures)
    assert all(count <= 3 for count in run.monitor.failures.values())  # then its metrics are given up


@pytest.mark.parametrize("purpose", ["moved", "after"])
def test_one_failing_pass_is_one_failure(purpose, log):
    run = Run(Loss(lambda what, number, call: what == purpose and number == 3, lambda: ValueError("boom")))
    assert sum(run.monitor.failures.values()) == 1
    assert len(log) == 1
