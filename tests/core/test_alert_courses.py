"""Rules on courses and layers, remedies with numbers, and what a monitor does about an alert."""

import json
import logging
import math
import re

import pytest
import torch

from gradmon import ArgumentError, Monitor, Reading, every
from gradmon.alerts import Above, DeadLayer, Drift, NonFinite, Outside, Rising, Stalled, default_rules
from gradmon.publishing import Failures, Publisher
from gradmon.sinks import LogSink, MemorySink


def states(rule, readings):
    """The changes of state that some readings lead to."""
    return [alert.state for reading in readings if (alert := rule(reading)) is not None]


def of(name, values, layer=None):
    return [Reading(name, value, step, layer) for step, value in enumerate(values, 1)]


def rule_named(name):
    (rule,) = [rule for rule in default_rules() if rule.name == name]
    return rule


def fired(name, *readings, times=5):
    """The alert that some readings, repeated, raise."""
    rule = rule_named(name)
    alerts = [alert for _ in range(times) for reading in readings if (alert := rule(reading)) is not None]
    assert [alert.state for alert in alerts] == ["firing"]
    return alerts[0]


def test_outside_fires_on_both_sides():
    rule = Outside("update_ratio", 1e-8, 0.1, after=2)
    assert states(rule, of("update_ratio", [1e-9, 1e-3, 1e-9, 1.0, 0.5, 1e-3])) == ["firing", "resolved"]
    assert rule.name == "update_ratio_out_of_range"
    below = Outside("m", 1.0, 2.0)(Reading("m", 0.5))
    assert below.message == "m is 0.5, below 1."
    above = Outside("m", 1.0, 2.0)(Reading("m", 2.5))
    assert above.message == "m is 2.5, above 2."
    # The limits themselves are inside, and NaN says nothing.
    assert states(Outside("m", 1.0, 2.0), of("m", [1.0, 2.0, math.nan])) == []


def test_dead_layer_fires_for_the_layer_alone():
    rule = DeadLayer(after=2)
    probe = [Reading("grad_norm", 1.0), Reading("grad_norm", 0.0, 1, "a"), Reading("grad_norm", 1e-30, 1, "b")]
    alerts = [alert for _ in range(3) for reading in probe if (alert := rule(reading)) is not None]
    assert [(alert.layer, alert.state) for alert in alerts] == [("a", "firing")]
    assert alerts[0].message == "No gradient arrives at `a`."
    back = rule(Reading("grad_norm", 0.5, 9, "a"))
    assert (back.layer, back.state) == ("a", "resolved")


def test_dead_layer_is_quiet_while_the_whole_gradient_is_zero():
    rule = DeadLayer(after=1)
    assert states(rule, [Reading("grad_norm", 0.0), Reading("grad_norm", 0.0, 1, "a")]) == []
    assert states(rule, [Reading("grad_norm", math.nan), Reading("grad_norm", math.nan, 1, "a")]) == []


def test_dead_layer_of_a_real_model():
    """A ReLU layer whose units are all off gets no gradient, and neither does what is before it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.01), MemorySink()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    options = {"metrics": ["grad_norm"], "schedule": every(1), "layers": True, "sinks": sink, "on_alert": None}
    with Monitor(model, optimizer, loss, **options) as monitor:
        for _ in range(4):
            batch = torch.randn(8, 3)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
    assert {(alert.rule, alert.layer) for alert in sink.alerts if alert.rule == "dead_layer"} == {("dead_layer", "0")}


def test_stalled_waits_for_a_full_window_and_forgives_noise():
    falling = [10 * 0.99**step + 0.01 * (-1) ** step for step in range(100)]
    assert states(Stalled("loss", window=20), of("loss", falling)) == []
    assert states(Stalled("loss", window=20), of("loss", [1.0] * 19)) == []
    assert states(Stalled("loss", window=20, after=1), of("loss", [1.0] * 20)) == ["firing"]
    # Negative losses fall, too.
    assert states(Stalled("loss", window=20), of("loss", [-10 - step for step in range(100)])) == []
    assert states(Stalled("loss", window=20), of("loss", [-10 + step / 10 for step in range(100)])) == ["firing"]


def test_stalled_resolves_when_the_loss_falls_again():
    rule = Stalled("loss", window=20, after=3, clear_after=3)
    course = [1.0] * 30 + [0.97**step for step in range(40)]
    assert states(rule, of("loss", course)) == ["firing", "resolved"]


def test_stalled_remembers():
    first = Stalled("loss", window=10)
    assert states(first, of("loss", [1.0] * 11)) == []
    second = Stalled("loss", window=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert states(second, of("loss", [1.0])) == ["firing"]


def test_rising_counts():
    rule = Rising(("sink_errors", "sink_dropped"), "Errors", name="sink_errors", clear_after=2)
    probes = [[0, 0], [0, 0], [1, 0], [1, 0], [1, 5], [1, 5], [1, 5], [1, 5]]
    found = []
    for errors, dropped in probes:
        found.append(states(rule, [Reading("sink_errors", errors), Reading("sink_dropped", dropped)]))
    assert found == [[], [], ["firing"], [], [], [], ["resolved"], []]
    again = Rising(("sink_errors", "sink_dropped"), "Errors", name="sink_errors")
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert states(again, [Reading("sink_errors", 1), Reading("sink_dropped", 5)]) == []
    assert again(Reading("sink_errors", 3)) is None
    assert again(Reading("sink_dropped", 5)).message == "Errors: 8 so far, 2 of them new."


def test_remedy_for_a_step_that_is_too_long_names_learning_rates():
    alert = fired("step_too_long", Reading("learning_rate", 0.1), Reading("step_ratio", 1.4))
    assert alert.remedy == "The step destroys 140 % of the gradient: lower the learning rate from 0.1 to about 0.03."
    without = fired("step_too_long", Reading("step_ratio", 1.4))
    assert without.remedy == "The step destroys 140 % of the gradient: lower the learning rate."


@pytest.mark.parametrize("rate", [1e-3, 0.02, 5.0])
def test_remedy_works_on_a_quadratic(rate):
    """On a quadratic `step_ratio` is proportional to the learning rate: the advice leads to less than the limit."""
    curvature = torch.tensor([30.0, 1.0], dtype=torch.float64)

    def ratio(learning_rate):
        weights = torch.ones(2, dtype=torch.float64)
        gradient = curvature * weights
        return float((curvature * learning_rate * gradient).norm() / gradient.norm())

    factor = 1.7 / ratio(rate)
    alert = fired("step_too_long", Reading("learning_rate", rate * factor), Reading("step_ratio", ratio(rate * factor)))
    advised = float(re.search(r"to about (\S+)\.$", alert.remedy).group(1))
    assert 0.25 < ratio(advised) < 0.6


def test_remedy_for_noise_names_batch_sizes():
    alert = fired("batch_too_noisy", Reading("batch_size", 64.0), Reading("noise_ratio", 12.5))
    assert alert.remedy == (
        "Raise the batch size from 64 towards 800, where signal and noise are equally strong, or accumulate gradients "
        "over 13 micro-batches."
    )
    rounded = fired("batch_too_noisy", Reading("batch_size", 32.0), Reading("noise_ratio", 47.6))
    assert "from 32 towards 1500, where" in rounded.remedy  # the noise scale is 1523
    assert "over 48 micro-batches" in rounded.remedy
    endless = fired("batch_too_noisy", Reading("batch_size", 64.0), Reading("noise_ratio", math.inf))
    assert endless.remedy == "Raise the batch size, or accumulate gradients over more micro-batches."


@pytest.mark.parametrize(("known", "remedy"), [
    (
        {"learning_rate": 0.1, "step_ratio": 2.0},
        "The step destroys 200 % of the gradient: lower the learning rate from 0.1 to about 0.02; if that does not "
        "help, change the initialisation or add normalisation.",
    ),
    (
        {"learning_rate": 0.1, "step_ratio": 0.05, "update_ratio": 1e-2},
        "Steps are short enough now: one destroys 5 % of the gradient. For longer ones, change the initialisation or "
        "add normalisation.",
    ),
    (
        {"learning_rate": 0.1, "update_ratio": 1e-2},
        "A step of this length could destroy the whole gradient, in the worst direction: lower the learning rate (it "
        "is 0.1 now); if that does not help, change the initialisation or add normalisation.",
    ),
    (
        {"update_ratio": 1e-5},
        "Lower the learning rate; if that does not help, change the initialisation or add normalisation.",
    ),
])  # fmt: skip
def test_remedy_for_conditioning_looks_at_the_step(known, remedy):
    readings = [Reading(name, value) for name, value in known.items()]
    assert fired("ill_conditioned", *readings, Reading("weight_condition", 4000.0)).remedy == remedy


def test_remedies_forget_what_is_not_known_any_more():
    known = [Reading("learning_rate", 0.1), Reading("step_ratio", 0.05)]
    lost = Reading("step_ratio", math.nan, reason="non-finite gradient after the step")
    alert = fired("ill_conditioned", *known, lost, Reading("weight_condition", 4000.0))
    assert alert.remedy.startswith("Lower the learning rate (it is 0.1 now); ")


def test_remedy_for_an_update():
    rate = Reading("learning_rate", 0.1)
    alert = fired("update_ratio_out_of_range", rate, Reading("update_ratio", 0.5))
    assert alert.remedy == "A step is 50 % of the weights' length: lower the learning rate from 0.1 to about 0.002."
    alert = fired("update_ratio_out_of_range", rate, Reading("update_ratio", 1e-9))
    assert alert.remedy.startswith("Raise the learning rate;")
    assert alert.remedy.endswith("(it is 0.1 now).")


def test_no_remedy_once_it_has_resolved():
    rule = rule_named("update_ratio_out_of_range")
    found = [rule(Reading("update_ratio", value)) for value in (0.5, 0.5, 1e-3, 1e-3)]
    assert [alert.state for alert in found if alert] == ["firing", "resolved"]
    assert found[-1].message == "update_ratio is 0.001, within 1e-08 and 0.1."
    assert found[-1].remedy == ""


@pytest.mark.parametrize("rate", [2.8e-3, 1.6e-3, 1e-3, 4.83])
@pytest.mark.parametrize("destroyed", [0.401, 0.42, 0.45, 0.5, 0.7])
def test_a_lower_learning_rate_is_lower(rate, destroyed):
    readings = [Reading("learning_rate", rate), Reading("step_ratio", destroyed)]
    remedy = fired("ill_conditioned", *readings, Reading("weight_condition", 4e3)).remedy
    advised = re.search(r"from (\S+) to about (\S+);", remedy)
    if advised is None:
        assert f"lower the learning rate a little (it is {rate:.3g} now);" in remedy
        assert destroyed < 0.45
    else:
        assert float(advised[2]) == pytest.approx(0.4 / destroyed * rate, rel=0.25)
        assert float(advised[2]) < float(advised[1])


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(1.4, "140 %"), (87.43, "8740 %"), (2345.6, "235000 %"), (1e5, "more than all"), (math.inf, "more than all")],
)
def test_percentages_have_no_exponents(ratio, words):
    assert fired("step_too_long", Reading("step_ratio", ratio)).remedy.startswith(f"The step destroys {words} of the")


def test_remedy_for_an_explosion_names_the_usual_norm():
    rule = rule_named("exploding")
    for reading in of("grad_norm", [1.0, 1.1, 0.9, 1.0] * 5):
        assert rule(reading) is None
    assert rule(Reading("grad_norm", 1e4)).remedy.startswith("Clip the gradient at about 2, twice its usual norm, or")


def test_a_remedy_of_ones_own():
    rule = Above("loss", 1.0, remedy=lambda reading, known: f"{reading.value} {sorted(known)}")
    rule(Reading("batch_size", 4.0))
    assert rule(Reading("loss", 2.0)).remedy == "2.0 ['batch_size']"


def test_remedies_speak_of_the_step_that_raised_the_alert():
    publisher = Publisher("default", Failures())
    for step, (rate, destroyed) in enumerate([(0.5, 8.0), (0.1, 2.0)], 1):
        numbers = {"learning_rate": rate, "weight_condition": 2e3, "step_ratio": destroyed}
        publisher.publish([Reading(name, value, step) for name, value in numbers.items()])
    remedies = {alert.rule: alert.remedy for alert in publisher.alerts}
    assert remedies["ill_conditioned"].startswith(
        "The step destroys 200 % of the gradient: lower the learning rate from 0.1"
    )
    assert remedies["step_too_long"].startswith(
        "The step destroys 200 % of the gradient: lower the learning rate from 0.1"
    )
    assert list(publisher.readings) == ["learning_rate", "weight_condition", "step_ratio"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Above("m", 1, remedy=3),
         "`remedy` must be words, or a function of a reading and what is known. Got 3."),
        (lambda: Outside("m", 2.0, 1.0), "`high` must be above `low`, 2.0. Got 1.0."),
        (lambda: Outside("m", math.nan, 1.0), "`low` must be a number. Got nan."),
        (lambda: Outside("", 0.0, 1.0), "`metric` must be the name of a metric. Got ''."),
        (lambda: Stalled("loss", 1.0), "`fall` must be in (0, 1). Got 1.0."),
        (lambda: Stalled("loss", "a"), "`fall` must be in (0, 1). Got a."),
        (lambda: Stalled("loss", window=3), "`window` must be an integer of at least 4. Got 3."),
        (lambda: Stalled(""), "`metric` must be the name of a metric. Got ''."),
        (lambda: DeadLayer(after=0), "`after` must be an integer of at least 1. Got 0."),
        (lambda: Rising((), "what", name="x"), "`counts` must be names of readings. Got ()."),
        (lambda: Rising("sink_errors", "what", name="x"), "`counts` must be names of readings. Got 'sink_errors'."),
        (lambda: Rising(["a"], "what", name="x", clear_after=0),
         "`clear_after` must be an integer of at least 1. Got 0."),
    ],
)  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        make()


def diverging(**options):
    """How far a training that explodes got, and its monitor."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    with Monitor(model, optimizer, loss, metrics=["loss", "grad_norm"], schedule=every(1), **options) as monitor:
        while monitor.steps < 30:
            batch = torch.randn(8, 3)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
            if monitor.should_stop:
                break
    return monitor.steps, monitor


def test_stop_asks_for_the_end_at_a_critical_alert():
    step, monitor = diverging(on_alert="stop")
    assert step < 30
    assert monitor.should_stop
    assert "nonfinite" in {alert.rule for alert in monitor.alerts}
    assert diverging(on_alert="log")[0] == 30


def test_stop_does_not_end_for_less_than_critical():
    step, monitor = diverging(on_alert="stop", alerts=[Above("loss", 0.0)])
    assert step == 30
    assert [alert.rule for alert in monitor.alerts] == ["loss_high"]


def test_a_function_hears_of_every_alert_and_may_stop():
    heard = []

    def hear(alert):
        heard.append((alert.rule, alert.state))
        raise ValueError("boom")

    step, monitor = diverging(on_alert=hear, alerts=[NonFinite()])
    assert step == 30
    assert heard == [("nonfinite", "firing")]
    assert monitor.failures == {"on_alert": 1}
    holder = []
    model = torch.nn.Linear(1, 1)
    monitor = Monitor(model, on_alert=lambda alert: holder[0].stop(), alerts=[Above("loss", 0.0)])
    holder.append(monitor)
    assert not monitor.should_stop
    monitor._publisher.publish([Reading("loss", 1.0, 1)])
    assert monitor.should_stop


def test_alerts_are_logged_once(caplog):
    with caplog.at_level(logging.INFO, "gradmon"):
        diverging(alerts=[NonFinite()], run="mine")
        assert [r.levelname for r in caplog.records if "nonfinite firing" in r.message] == ["CRITICAL"]
        assert "mine: step" in caplog.text
        caplog.clear()
        diverging(alerts=[NonFinite()], sinks=[LogSink()])
        assert len([r for r in caplog.records if "nonfinite firing" in r.message]) == 1
        caplog.clear()
        diverging(alerts=[NonFinite()], on_alert=None)
        assert not [r for r in caplog.records if "nonfinite" in r.message]


def test_on_alert_is_checked():
    with pytest.raises(
        ArgumentError, match=r'`on_alert` must be "log", "stop", callable with an alert, or None\. Got 3'
    ):
        Monitor(torch.nn.Linear(1, 1), on_alert=3)


def test_drift_knows_what_is_usual_after_a_restart():
    rule = Drift("m", least=3, remedy=lambda reading, known: f"{known['usual']:g}")
    states(rule, of("m", [1.0] * 10))
    again = Drift("m", least=3, remedy=lambda reading, known: f"{known['usual']:g}")
    again.load_state_dict(rule.state_dict())
    assert again(Reading("m", 100.0)).remedy == "1"


def test_a_lasting_change_becomes_the_new_level():
    rule = Drift("m", window=10, least=5)
    assert states(rule, of("m", [1.0] * 10 + [100.0] * 10)) == ["firing"]
    again = Drift("m", window=10, least=5)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert states(again, of("m", [100.0])) == ["resolved"]
    # Interrupted by a usual reading, it is none.
    rule = Drift("m", window=10, least=5)
    assert states(rule, of("m", [1.0] * 10 + [100.0] * 9 + [1.0] + [100.0] * 9)) == ["firing", "resolved", "firing"]


def test_drift_is_quiet_where_nothing_says_how_far_is_far():
    """A loss with a margin: most gradients are exactly zero."""
    assert states(rule_named("exploding"), of("grad_norm", [0.0, 0.0, 0.3] * 30)) == []


def test_an_alert_is_not_lost_because_its_remedy_fails():
    rule = Above("loss", 1.0, remedy=lambda reading, known: str(1 / 0))
    alert = rule(Reading("loss", 2.0))
    assert (alert.state, alert.remedy) == ("firing", "The rule's remedy failed: ZeroDivisionError: division by zero")
