"""Alert rules: when they fire, when they resolve, and what they remember."""

import json
import math
import re

import pytest
import torch
from torch import nn

from gradmon import METRICS, ArgumentError, Reading, measure
from gradmon.alerts import Above, Below, Drift, NonFinite, Rule, default_rules
from gradmon.metrics import OWN


def states(rule, values, name="m", layer=None):
    """The state that each value leads to, None where nothing changes."""
    alerts = [rule(Reading(name, value, step, layer)) for step, value in enumerate(values, 1)]
    return [None if alert is None else alert.state for alert in alerts]


FIRING, RESOLVED = "firing", "resolved"


# --- limits --------------------------------------------------------------------------------------------------------


def test_above_fires_once_and_resolves_once():
    found = states(Above("m", 2.0), [1, 2, 2.5, 3, math.inf, 2, 1, 5])
    assert found == [None, None, FIRING, None, None, RESOLVED, None, FIRING]


def test_below_fires_once_and_resolves_once():
    found = states(Below("m", 2.0), [3, 2, 1.5, 0, -math.inf, 2, 3, 1])
    assert found == [None, None, FIRING, None, None, RESOLVED, None, FIRING]


def test_alert_says_what_was_seen():
    rule = Above("step_ratio", 1.0, name="too_long", severity="critical", remedy="Lower the learning rate.")
    alert = rule(Reading("step_ratio", 1.4, step=10))
    assert alert == (
        "too_long", "critical", "firing", 1.4, 10, None, "step_ratio is 1.4, above 1.", "Lower the learning rate.", ()
    )  # fmt: skip
    alert = rule(Reading("step_ratio", 0.4, step=20))
    assert (alert.state, alert.message, alert.step) == ("resolved", "step_ratio is 0.4, not above 1.", 20)
    assert Below("m", 1.0)(Reading("m", 0.5)).message == "m is 0.5, below 1."


def test_number_and_limit_are_told_apart():
    assert Above("m", 1)(Reading("m", 1.00001)).message == "m is 1.00001, above 1."
    assert Above("m", 1e3)(Reading("m", 1000.04)).message == "m is 1000.04, above 1000."
    assert Above("m", 0.25)(Reading("m", math.nextafter(0.25, 1))).message == "m is 0.2500000000000001, above 0.25."
    assert Below("m", 1e-7)(Reading("m", 9.99999e-8)).message == "m is 9.99999e-08, below 1e-07."


def test_drift_says_on_which_side():
    rule = Drift("m", 3.0, direction="up")
    found = [rule(Reading("m", value)) for value in [*STEADY, 50.0, 1e-9]]
    assert found[-2].message == "m is 50, far above its median 1."
    assert found[-1].message == "m is 1e-09, not far above its median 1."


def test_names_come_from_the_metric():
    assert Above("m", 1).name == "m_high"
    assert Below("m", 1).name == "m_low"
    assert Drift("m").name == "m_drift"
    assert NonFinite().name == "nonfinite"


@pytest.mark.parametrize("kind", [Above, Below])
def test_hysteresis_counts_in_a_row(kind):
    rule = kind("m", 0.0, after=3, clear_after=2)
    bad, good = (1, -1) if kind is Above else (-1, 1)
    found = states(rule, [bad, bad, good, bad, bad, bad, bad, good, bad, good, good, good, bad, bad, bad])
    assert found == [None] * 5 + [FIRING] + [None] * 4 + [RESOLVED] + [None] * 3 + [FIRING]


@pytest.mark.parametrize("rule", [Above("m", 0.0, after=2), Below("m", 9.0, after=2)])
def test_nan_neither_fires_nor_resolves_nor_interrupts(rule):
    assert states(rule, [math.nan] * 5) == [None] * 5
    assert states(rule, [1, math.nan, 1, math.nan]) == [None, None, FIRING, None]


@pytest.mark.parametrize("rule", [Above("m", 0.0), Below("m", 9.0)])
def test_other_metrics_and_layers_are_none_of_its_business(rule):
    assert states(rule, [1, 1], name="other") == [None, None]
    assert states(rule, [1, 1], layer="0") == [None, None]
    assert states(rule, [1]) == [FIRING]


# --- what is not finite --------------------------------------------------------------------------------------------


def test_nonfinite_fires_on_the_reason():
    rule = NonFinite()
    assert rule(Reading("loss", 1.0, 1)) is None
    alert = rule(Reading("weight_cosine", math.nan, 2, reason="non-finite gradient"))
    assert (alert.rule, alert.severity, alert.state, alert.step) == ("nonfinite", "critical", "firing", 2)
    assert alert.message == "The loss or the gradient is not finite."
    assert rule(Reading("loss", math.nan, 2, reason="non-finite gradient")) is None
    assert rule(Reading("gradient_rank", 0.5, 3)) is None
    assert rule(Reading("loss", 0.5, 3)).state == "resolved"


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_nonfinite_fires_on_an_infinite_loss_or_norm(name):
    assert states(NonFinite(), [1.0, math.inf, math.inf, 1.0], name=name) == [None, FIRING, None, RESOLVED]
    assert states(NonFinite(), [math.inf], name=name, layer="0") == [None]


def test_nonfinite_leaves_other_missing_numbers_alone():
    rule = NonFinite()
    for reason in ("zero gradient", "batch of one", "rounding: relative error about 0.7 at scale 1e-07", None):
        assert rule(Reading("loss", math.nan, 1, reason=reason)) is None
    assert rule(Reading("noise_scale", math.inf, 1, reason="no signal above the noise")) is None


def test_nonfinite_leaves_alone_what_is_not_finite_at_the_inputs_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(4, 3).double().relu(), torch.randn(4, 2).double()  # a root is steep without end at 0
    loss = lambda model, batch: (model(batch[0].sqrt()) - batch[1]).square().mean()  # noqa: E731
    found = measure(model, loss, (x, y), metrics=["loss", "grad_norm", "input_gradient_rank", "input_condition"])
    assert math.isfinite(found["grad_norm"].value)
    assert found["input_gradient_rank"].reason == "non-finite gradient with respect to the inputs"
    assert found["input_condition"].reason == "non-finite gradient at perturbed inputs"
    rule = NonFinite()
    assert [alert for reading in found.values() if (alert := rule(reading))] == []


# --- drift ---------------------------------------------------------------------------------------------------------

STEADY = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0]  # median 1, robust deviation 0.148


@pytest.mark.parametrize(
    ("direction", "far_up", "far_down"), [("both", True, True), ("up", True, False), ("down", False, True)]
)
def test_drift_fires_far_from_the_median(direction, far_up, far_down):
    def far(value):
        return states(Drift("m", 3.0, direction=direction), [*STEADY, value])[-1] == FIRING

    assert not far(1 + 2.9 * 0.14826)
    assert not far(1 - 2.9 * 0.14826)
    assert far(1 + 3.1 * 0.14826) is far_up
    assert far(1 - 3.1 * 0.14826) is far_down


def test_drift_waits_for_enough_readings():
    assert states(Drift("m", 3.0, least=5), [1, 1, 1, 1, 100, 1, 100])[:6] == [None] * 6
    assert states(Drift("m", 3.0, least=4), [1, 1, 1, 1, 100]) == [None] * 4 + [FIRING]


def test_drift_does_not_learn_what_is_off():
    found = states(Drift("m", 3.0), [*STEADY, *[5.0] * 49, 1.0])
    assert found == [None] * 10 + [FIRING] + [None] * 48 + [RESOLVED]


def test_drift_follows_slow_change():
    values = [1.01**step for step in range(400)]
    assert states(Drift("m", 10.0, window=20), values) == [None] * 400


def test_drift_forgets_what_has_left_the_window():
    values = [1.0, 1.4, 1.8, 1.4, 1.0] * 2 + [1.4] * 20
    short = Drift("m", 10.0, window=10)
    states(short, values)
    assert states(short, [3.0]) == [FIRING]
    long = Drift("m", 10.0, window=50, floor=0)
    states(long, [1.0, 1.4, 1.8, 1.4, 1.0] * 4)
    assert states(long, [3.0]) == [None]


def test_floor_keeps_small_moves_of_a_still_metric_quiet():
    still = [1.0] * 10
    assert states(Drift("m", 10.0, floor=0.1), [*still, 1.9, -0.9, 2.1]) == [None] * 11 + [FIRING, None]
    assert states(Drift("m", 10.0, floor=0), [*still, 1.0, 1.0001])[-1] == FIRING


def test_drift_keeps_what_is_not_finite_out_of_the_window():
    assert states(Drift("m", least=3), [1.0, math.nan, math.inf, 1.0, 1.0, math.inf]) == [None] * 5 + [FIRING]
    assert states(Drift("m", least=3), [1.0, 1.0, 1.0, math.nan]) == [None] * 4


def test_drift_counts_in_a_row():
    found = states(Drift("m", 3.0, after=2, clear_after=2), [*STEADY, 9, 1, 9, 9, 1, 9, 1, 1])
    assert found[10:] == [None, None, None, FIRING, None, None, None, RESOLVED]


# --- what rules remember -------------------------------------------------------------------------------------------


class PerLayer(Above):
    """A rule that looks at every layer."""

    def judge(self, reading):
        return super().judge(reading._replace(layer=None))


def test_every_layer_has_a_state_of_its_own():
    rule = PerLayer("m", 0.0, after=2)
    assert states(rule, [1], layer="a") == states(rule, [1], layer="b") == [None]
    assert states(rule, [1], layer="a") == [FIRING]
    assert states(rule, [-1, 1], layer="b") == [None, None]
    assert states(rule, [-1], layer="a") == [RESOLVED]
    assert rule(Reading("m", 1, 1, "b")).layer == "b"


def readings():
    values = [
        1.0,
        1.1,
        0.9,
        1.0,
        30,
        30,
        1.0,
        1.0,
        math.nan,
        30,
        -5,
        -5,
        -5,
        1.0,
        1.0,
        30,
        math.inf,
        1.0,
        -5,
        30,
        30,
        1,
    ]
    return [Reading("m", value, step, layer) for step, value in enumerate(values, 1) for layer in (None, "a")]


@pytest.mark.parametrize("cut", [1, 9, 11, 20, 25, 32, 40])
@pytest.mark.parametrize(
    "make",
    [
        lambda: PerLayer("m", 5.0, after=2, clear_after=2),
        lambda: Above("m", 5.0, after=2, clear_after=3),
        lambda: Below("m", 0.0, after=2),
        lambda: Drift("m", 3.0, window=5, least=3, after=2, clear_after=2),
    ],
)
def test_a_restored_rule_goes_on_as_if_nothing_had_happened(make, cut):
    whole = make()
    expected = [whole(reading) for reading in readings()]
    assert any(expected)
    first, second = make(), make()
    before = [first(reading) for reading in readings()[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert before + [second(reading) for reading in readings()[cut:]] == expected


# --- arguments, and the rules that come with the package -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Above("", 1.0), "`metric` must be the name of a metric. Got ''."),
        (lambda: Below(3, 1.0), "`metric` must be the name of a metric. Got 3."),
        (lambda: Above("m", math.nan), "`limit` must be a number. Got nan."),
        (lambda: Below("m", "1"), "`limit` must be a number. Got 1."),
        (lambda: Above("m", True), "`limit` must be a number. Got True."),
        (lambda: Above("m", 1, name="Too High"), "`name` must be lower-case words joined by underscores. Got"),
        (lambda: Above("m", 1, name="too high"), "`name` must be lower-case words joined by underscores. Got"),
        (lambda: NonFinite(name=""), "`name` must be lower-case words joined by underscores. Got ''."),
        (lambda: Above("m", 1, severity="bad"), '`severity` must be "info", "warning" or "critical". Got \'bad\'.'),
        (lambda: NonFinite(severity=None), '`severity` must be "info", "warning" or "critical". Got None.'),
        (lambda: Above("m", 1, after=0), "`after` must be an integer of at least 1. Got 0."),
        (lambda: Above("m", 1, after=1.5), "`after` must be an integer of at least 1. Got 1.5."),
        (lambda: Below("m", 1, clear_after=True), "`clear_after` must be an integer of at least 1. Got True."),
        (lambda: Drift(""), "`metric` must be the name of a metric. Got ''."),
        (lambda: Drift("m", 0), "`deviations` must be a positive number. Got 0."),
        (lambda: Drift("m", -1.0), "`deviations` must be a positive number. Got -1.0."),
        (lambda: Drift("m", math.nan), "`deviations` must be a number. Got nan."),
        (lambda: Drift("m", floor=-0.1), "`floor` must be at least 0. Got -0.1."),
        (lambda: Drift("m", floor="0"), "`floor` must be a number. Got 0."),
        (lambda: Drift("m", window=2), "`window` must be an integer of at least 3. Got 2."),
        (lambda: Drift("m", least=2), "`least` must be an integer of at least 3. Got 2."),
        (lambda: Drift("m", window=5, least=6), "`least` must be at most `window`, 5. Got 6."),
        (lambda: Drift("m", direction="sideways"), '`direction` must be "up", "down" or "both". Got \'sideways\'.'),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        make()


def test_default_rules():
    rules = default_rules()
    names = [rule.name for rule in rules]
    assert "nonfinite" in names
    assert len(names) == len(set(names))
    for rule in rules:
        assert isinstance(rule, Rule)
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", rule.name)
        assert getattr(rule, "metric", "loss") in {**METRICS, **OWN}
        assert callable(rule.remedy) or rule.remedy.endswith(".")
    assert all(a is not b for a, b in zip(rules, default_rules(), strict=True))


def test_default_rules_are_quiet_in_a_healthy_run():
    healthy = {
        "loss": 1.0, "grad_norm": 0.3, "weight_condition": 30.0, "step_ratio": 0.2, "noise_ratio": 2.0,
        "gradient_confusion": 0.3, "update_ratio": 1e-3, "gradient_rank": 0.5,
    }  # fmt: skip
    wobble = [1, 1.2, 0.8, 1.1, 0.9] * 10
    for rule in default_rules():
        for step, factor in enumerate(wobble, 1):
            assert all(rule(Reading(name, value * factor, step)) is None for name, value in healthy.items())


@pytest.mark.parametrize(
    ("name", "metric", "bad"),
    [
        ("exploding", "grad_norm", 1e4),
        ("vanishing", "grad_norm", 1e-9),
        ("ill_conditioned", "weight_condition", 1e4),
        ("step_too_long", "step_ratio", 1.5),
        ("batch_too_noisy", "noise_ratio", math.inf),
        ("confused", "gradient_confusion", 0.99),
        ("update_ratio_out_of_range", "update_ratio", 0.5),
        ("update_ratio_out_of_range", "update_ratio", 1e-10),
    ],
)
def test_default_rules_fire_for_what_they_are_named_after(name, metric, bad):
    (rule,) = [rule for rule in default_rules() if rule.name == name]
    good = {"grad_norm": 1.0, "update_ratio": 1e-3}.get(metric, 0.1)
    found = states(rule, [good] * 20 + [bad] * 5 + [good] * 5, name=metric)
    assert [state for state in found if state] == [FIRING, RESOLVED]
    assert FIRING in found[20:25]
    assert RESOLVED in found[25:]


def test_alert_names_the_layers_to_blame():
    rule = Above("step_ratio", 1.0)
    alert = rule(Reading("step_ratio", 1.4, step=10, blame=("head", "body.0", "body.2")))
    assert alert.message == "step_ratio is 1.4, above 1. Mostly in `head`, `body.0`, `body.2`."
    assert alert.blame == ("head", "body.0", "body.2")
    resolved = rule(Reading("step_ratio", 0.4, step=20, blame=("head",)))
    assert (resolved.message, resolved.blame) == ("step_ratio is 0.4, not above 1.", ())
