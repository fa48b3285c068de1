"""The rule on a loss that is still that of a guess."""

import math

import pytest

from gradmon import ArgumentError, Monitor, Reading
from gradmon.alerts.stuck import CHANCE, Stuck


def told(rule, losses, first=1):
    alerts = [rule(Reading("loss", loss, step)) for step, loss in enumerate(losses, first)]
    return [(alert.state, alert.step) for alert in alerts if alert is not None]


def test_it_fires_at_its_step_and_resolves_when_something_is_learned():
    rule = Stuck(math.log(10), at=20)
    assert told(rule, [2.3] * 19) == []
    assert told(rule, [2.3, 2.3, 2.3], 20) == [("firing", 20)]
    assert told(rule, [1.0, 1.0, 1.0], 23) == [("resolved", 24)]
    # It has learned something: what comes now is the matter of other rules.
    assert told(rule, [1.0, 9.0, 9.0], 26) == []


def test_it_is_silent_where_something_was_learned_in_time():
    rule = Stuck(2.0, at=5)
    assert told(rule, [2.0, 2.0, 2.0, 2.0, 1.7, 2.0, 2.0]) == []


def test_the_limit_is_a_part_of_chance():
    assert told(Stuck(2.0, at=1), [0.89 * 2.0]) == []
    assert told(Stuck(2.0, at=1), [0.89 * 2.0 + 1e-9]) == [("firing", 1)]
    assert told(Stuck(2.0, at=1, part=0.5), [1.1]) == [("firing", 1)]
    alert = Stuck(2.0, at=1)(Reading("loss", 1.9, 3))
    assert alert.message == "The loss is 1.9 at step 3, still above 1.78: a guess has 2."
    assert "Restart rather than change something in mid-run" in alert.remedy


def test_chance_comes_with_a_reading():
    rule = Stuck(at=2)
    assert told(rule, [5.0, 5.0, 5.0]) == []
    assert rule(Reading(CHANCE, math.nan, 0)) is None
    assert told(rule, [5.0], 4) == []
    assert rule(Reading(CHANCE, 3.0, 0)) is None
    assert told(rule, [2.9], 5) == [("firing", 5)]
    # What it was told itself counts for more.
    rule = Stuck(2.0, at=2)
    rule(Reading(CHANCE, 100.0, 0))
    assert told(rule, [1.9], 2) == [("firing", 2)]


def test_what_it_does_not_look_at():
    rule = Stuck(2.0, at=1)
    assert rule(Reading("loss", 9.0, 3, "layer")) is None
    assert rule(Reading("loss", math.nan, 3)) is None
    assert rule(Reading("loss", 9.0, None)) is None
    assert rule(Reading("grad_norm", 9.0, 3)) is None
    assert told(rule, [math.inf], 3) == [("firing", 3)]


def test_it_remembers():
    one, two = Stuck(at=2), Stuck(at=2)
    one(Reading(CHANCE, 2.0))
    told(one, [2.0, 2.0])
    two.load_state_dict(one.state_dict())
    assert told(two, [2.0, 1.0, 1.0], 3) == [("resolved", 5)]
    three = Stuck(at=2)
    three.load_state_dict(two.state_dict())
    assert told(three, [1.0, 9.0], 6) == []


def test_a_monitor_takes_it():
    import torch

    model = torch.nn.Linear(2, 2)
    loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    batch = torch.ones(8, 2), torch.arange(8) % 2
    rule = Stuck(math.log(2), at=3)
    with Monitor(model, optimizer, loss, metrics=["loss"], schedule=lambda step: True, alerts=[rule]) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
        assert [alert.rule for alert in monitor.alerts] == ["stuck"]


@pytest.mark.parametrize("chance", [0, -1.0, math.inf, math.nan, "2", True])
def test_bad_chance(chance):
    with pytest.raises(ArgumentError, match=r"`chance` must be a positive number, or None\."):
        Stuck(chance)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match=r"`at` must be an integer of at least 1\. Got 0\."):
        Stuck(2.0, at=0)
    for part in (0, 1.5, "1"):
        with pytest.raises(ArgumentError, match=r"`part` must be in \(0, 1\]\."):
            Stuck(2.0, part=part)
    with pytest.raises(ArgumentError, match=r"`metric` must be the name of a metric\. Got ''\."):
        Stuck(2.0, metric="")
