"""Schedules: at which steps to look."""

import itertools
import math

import pytest

from gradmon import every, log_spaced


def steps(schedule, last: int) -> list[int]:
    return [step for step in range(1, last + 1) if schedule(step)]


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_every_n_th_step(n):
    assert steps(every(n), 200) == list(range(n, 201, n))


def test_log_spaced_steps_of_one_decade():
    assert steps(log_spaced(1), 20_000) == [1, 10, 100, 1000, 10_000]
    assert steps(log_spaced(2), 1100) == [1, 3, 10, 32, 100, 316, 1000]


@pytest.mark.parametrize("per_decade", [1, 3, 10, 25])
def test_log_spaced_steps_are_those_closest_to_the_powers(per_decade):
    expected = {round(10 ** (i / per_decade)) for i in range(4 * per_decade + 1)}
    assert set(steps(log_spaced(per_decade), 10**4)) == expected


def test_log_spaced_is_dense_at_the_start():
    found = steps(log_spaced(), 10**4)
    assert found[:6] == [1, 2, 3, 4, 5, 6]
    for first, last in ((100, 1000), (1000, 10_000)):
        assert sum(first < step <= last for step in found) == 10
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(found) if a > 100]
    assert max(gaps) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("schedule", [log_spaced(1), log_spaced(10)])
def test_log_spaced_knows_no_step_before_the_first(schedule):
    assert not schedule(0)
    assert not schedule(-1)
    assert schedule(1)


@pytest.mark.parametrize("step", [10**9, 10**15])
def test_late_steps_are_answered(step):
    assert log_spaced(10)(step)
    assert not log_spaced(10)(step + 1)


def test_schedules_are_values():
    assert every(3) == every(3) != every(4)
    assert log_spaced() == log_spaced(10)
    assert repr(every(3)) == "every(n=3)"
