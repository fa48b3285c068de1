"""What is said of a run in words, from its readings and alerts alone."""

import math

import pytest

from gradmon import Alert, Reading
from gradmon_integrations.display.history import History
from gradmon_integrations.display.sparkline import sparkline
from gradmon_integrations.display.states import limits, metric_of, number, state_of
from gradmon_integrations.display.verdict import differences, judge
from tests.integrations.histories import HEALTHY, ILL, told


def test_a_healthy_run_is_called_healthy():
    verdict = judge("anything", told(HEALTHY))
    assert verdict.level == "good"
    assert verdict.title == "anything is in good order: its gradient can be trusted."
    assert verdict.reasons[0] == "The loss falls: 2.1 at first, 0.5 in the end."
    assert "weight_condition 20 (alert if > 1000)" in verdict.reasons[1]
    assert "the batch size is the lever" in verdict.reasons[2]
    assert verdict.change == ""


def test_a_bad_run_is_called_bad_whatever_its_name():
    history = told(ILL, losses=[2.3] * 12)
    remedies = {alert.rule: alert.remedy for alert in history.active}
    verdict = judge("healthy", history)
    assert verdict.level == "bad"
    assert verdict.title == "healthy is in trouble: its gradient cannot be trusted."
    assert verdict.reasons[0] == "The loss does not fall: 2.3 at first, 2.3 in the end."
    text = " ".join(verdict.reasons)
    assert "ill_conditioned (since step 2): weight_condition is 2000 (alert if > 1000). The relative change" in text
    assert "step_too_long (since step 2): step_ratio is 1.4 (alert if > 1)." in text
    assert "batch_too_noisy (since step 3): noise_ratio is inf (alert if > 10)." in text
    assert "the learning rate is the lever" in text
    assert remedies["ill_conditioned"] in verdict.change
    assert verdict.change.lower().count("lower the learning rate") == 1  # two rules ask for it
    assert "Raise the batch size" in verdict.change


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (4.0, "noise_ratio is 4, but only just back within limits (alert if > 10)."),
        (math.nan, "noise_ratio is nan (alert"),
    ],
)
def test_an_alert_that_is_not_over_yet_says_where_the_number_is_now(value, words):
    history = told(ILL)
    history.write([Reading("noise_ratio", value, 99)])
    assert any(words in reason for reason in judge("run", history).reasons)


def test_an_alert_of_severity_info_is_a_note():
    verdict = judge("run", told({**HEALTHY, "noise_ratio": 40.0}))
    assert verdict.level == "note"
    assert verdict.change.startswith("Raise the batch size")


def test_a_loss_that_does_not_fall_is_a_note():
    verdict = judge("run", told(HEALTHY, losses=[2.3, 2.29] * 6))
    assert verdict.level == "note"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(2.0, 1.0, "falls"), (2.0, 1.5, "falls slowly"), (2.0, 1.9, "hardly falls"), (2.0, 2.0, "does not fall"),
     (-1.0, -0.9, "does not fall"), (-1.0, -0.5, "does not fall"), (-1.0, -1.05, "hardly falls"),
     (-1.0, -1.3, "falls slowly"), (-1.0, -2.0, "falls"), (0.5, -2.0, "falls"), (0.0, 0.0, "does not fall"),
     (0.0, -1.0, "falls"), (-1.0, 0.5, "does not fall")],
)  # fmt: skip
def test_where_a_loss_goes_whatever_its_sign(before, after, words):
    verdict = judge("run", told(HEALTHY, losses=[before] * 6 + [after] * 6))
    assert verdict.reasons[0].startswith(f"The loss {words}: ")
    assert verdict.level == ("good" if words.startswith("falls") else "note")


def test_without_numbers_that_have_a_limit_there_is_no_praise():
    assert judge("run", told({"gradient_snr": 0.1})).level == "note"


def test_without_numbers_there_is_no_verdict():
    history = History()
    assert judge("run", history) is None
    history.write([Reading("loss", math.nan, 1, reason="RuntimeError: no")])
    assert judge("run", history) is None


def test_a_loss_that_is_lost():
    history = told(HEALTHY)
    history.write([Reading("loss", math.nan, 13, reason="non-finite gradient")])
    history.alert(Alert("nonfinite", "critical", "firing", math.nan, 13, None, "It is not finite.", "Clip."))
    verdict = judge("run", history)
    assert verdict.level == "bad"
    assert verdict.reasons[:2] == (
        "The loss or its gradient is no longer finite.",
        "nonfinite (since step 13): It is not finite.",
    )
    assert verdict.change == "Clip."


def test_alerts_that_came_and_went_are_told():
    history = told(HEALTHY)
    history.alert(Alert("exploding", "critical", "firing", 9.0, 5, None, "", ""))
    history.alert(Alert("exploding", "critical", "resolved", 1.0, 6, None, "", ""))
    verdict = judge("run", history)
    assert verdict.level == "good"
    assert "Came and went: exploding." in verdict.reasons


def test_differences_are_ordered_by_their_ratio():
    found = differences(told(HEALTHY), told({**ILL, "noise_ratio": 3.0}))
    assert found == [
        "weight_condition 20 against 2000 (low is good)",
        "step_ratio 0.02 against 1.4 (low is good)",
        "noise_ratio 1.5 against 3 (low is good)",
    ]


def test_states_follow_the_rules():
    assert [str(limit) for limit in limits("weight_condition")] == ["> 1000"]
    assert metric_of("step_too_long") == "step_ratio"
    assert metric_of("nonfinite") is None
    assert metric_of("unknown") is None
    firing = Alert("ill_conditioned", "warning", "firing", 2e3, 1, None, "", "")
    assert state_of("weight_condition", 20.0, []) == "fine"
    assert state_of("weight_condition", 2e3, []) == "beyond"
    assert state_of("weight_condition", 2e3, [firing]) == "firing"
    assert state_of("weight_condition", 2e3, [firing._replace(severity="info")]) == "noted"
    assert state_of("step_ratio", 0.1, [firing]) == "fine"
    assert state_of("weight_condition", math.nan, []) == "missing"
    assert state_of("weight_condition", None, []) == "missing"
    assert state_of("loss", 1.0, []) == "free"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.01234, "0.0123"), (-0.5, "-0.5"), (999.4, "999"), (999.7, "1000"),
     (1234.5, "1234"), (123456, "1.2e5"), (99999.7, "1e5"), (1e-7, "1e-7"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([1, 2, 3, 8], "__-#"), ([1, 10, 100, 1000], "_-=#"), ([5, 5], "--"), ([1, math.nan, 4], "_ #"),
     ([1, math.inf, -math.inf, 4], "_#_#"), ([math.inf], "#"), ([], ""), ([9, 9, 9, 1, 2, 3, 4], "_-=#"),
     ([0.0, 0.0], "--"), ([-1.0, 1.0], "_#")],
)  # fmt: skip
def test_sparkline(values, drawn):
    assert sparkline(values, 4, levels="_-=#") == drawn
