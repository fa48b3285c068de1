"""A budget of time, with made-up times: never more than it allows, for everybody something."""

import itertools
import json
import math

import numpy as np
import pytest

import gradmon
from gradmon import ArgumentError, budget
from gradmon.schedules import Ledger

GROUPS = ["gradient", "examples", "weights", "step"]
FIRST = {"gradient": 4, "examples": 40, "weights": 25, "step": 25, "inputs": 150}
"""How many steps the first probe of each group takes; what a `budget` expects too."""
LATER = {"gradient": 0.6, "examples": 1.5, "weights": 2.2, "step": 3.0, "inputs": 4.5}


class Run:
    """A training with made-up times, whose own clock does not trust the budget's.

    Args:
        spent: ``spent(group, whether for the first time)``, in seconds.
        lasts: ``lasts(step)``, in seconds.
    """

    def __init__(self, schedule, groups=GROUPS, spent=None, lasts=lambda step: 1.0):
        self.schedule, self.groups, self.lasts = schedule, list(groups), lasts
        self.spent = spent or (lambda group, first: FIRST[group] if first else LATER[group])
        self.trained, self.own, self.looked, self.seen = [], [], [], set()

    def go(self, steps):
        for _ in range(steps):
            number = len(self.trained) + 1
            due = self.schedule.choose(self.groups)  # asked before the step, as a monitor does
            self.trained.append(self.lasts(number))
            self.schedule.ledger.trained(self.lasts(number))
            cost = 0.0
            if due:
                chosen = [group for group in self.groups if group in due]
                cost = self.spent(chosen[-1], chosen[-1] not in self.seen)
                self.seen.add(chosen[-1])
                self.schedule.ledger.spent(cost)
                self.schedule.looked(chosen, cost)
            self.looked.append(due)
            self.own.append(cost)
        return self

    def counts(self, start=0):
        return {group: sum(group in due for due in self.looked[start:]) for group in self.groups}

    def part(self):
        """The monitor's time over the training's, of the whole run."""
        return sum(self.own) / sum(self.trained)

    def worst(self, window=200, start=0):
        """The same over any so many steps, at most."""
        own, trained = (np.cumsum([0.0, *times[start:]]) for times in (self.own, self.trained))
        return ((own[window:] - own[:-window]) / (trained[window:] - trained[:-window])).max()

    def worst_beside_one(self, window=200):
        """The same without the dearest probe of each window."""
        own, trained = (np.lib.stride_tricks.sliding_window_view(times, window) for times in (self.own, self.trained))
        return ((own.sum(1) - own.max(1)) / trained.sum(1)).max()

    def settled(self):
        """The step after which no group comes for the first time."""
        known, last = set(), 0
        for number, due in enumerate(self.looked, 1):
            dearest = max(due, key=self.groups.index, default=None)
            if dearest is not None and dearest not in known:
                known.add(dearest)
                last = number
        return last

    def after_all(self, times=1):
        """The step after which every group has been the dearest of its probe so many times; None if that never was."""
        seen = dict.fromkeys(self.groups, 0)
        for number, due in enumerate(self.looked, 1):
            if due:
                seen[max(due, key=self.groups.index)] += 1
            if min(seen.values()) >= times:
                return number
        return None


def noisy(seed, spread=0.2):
    factors = np.random.default_rng(seed).lognormal(0, spread, size=20_000)
    return lambda step: float(factors[step])


# --- never too much --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.03, 0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_over_any_window_what_fits_stays_below_the_fraction(fraction, scale):
    """All probes fit into a window; only before that is known, one may come on top of what else is in it."""
    run = Run(budget(fraction), spent=lambda group, first: scale * LATER[group], lasts=lambda step: scale).go(6000)
    assert run.worst(start=run.settled()) <= fraction
    assert run.worst_beside_one() <= fraction
    assert run.part() <= fraction
    assert run.part() > 0.5 * fraction  # what is allowed is made use of


@pytest.mark.parametrize("fraction", [0.03, 0.05, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_dear_first_probes_are_waited_for(fraction, seed):
    run = Run(budget(fraction), lasts=noisy(seed)).go(15_000)
    # The whole run pays, at any time, for what does not fit into a window.
    own, trained = np.cumsum(run.own), np.cumsum(run.trained)
    assert (own <= fraction * trained).all()
    assert run.after_all() is not None
    assert run.worst(start=run.after_all(times=2) + 1) <= fraction


@pytest.mark.parametrize("fraction", [0.03, 0.05])
def test_what_was_saved_up_is_not_spent_at_once(fraction):
    """A tiny model, whose first probes take five times as long as expected, and the later ones do not fit a window."""
    run = Run(budget(fraction), spent=lambda group, first: 5 * FIRST[group] if first else 5 * LATER[group]).go(60_000)
    assert run.after_all(times=3) is not None
    assert run.part() <= fraction
    assert run.worst_beside_one() <= fraction


def test_two_dear_probes_do_not_share_a_window():
    spent = {"gradient": 0.5, "inputs": 40.0}
    run = Run(budget(0.03), ["gradient", "inputs"], lambda group, first: spent[group]).go(20_000)
    dear = [number for number, due in enumerate(run.looked) if "inputs" in due]
    assert all(b - a > 200 for a, b in itertools.pairwise(dear))


def test_probe_that_never_fits_a_window():
    spent = {"gradient": 0.5, "inputs": 40.0}
    run = Run(budget(0.03), ["gradient", "inputs"], lambda group, first: spent[group]).go(20_000)
    counts = run.counts(start=2000)
    assert counts["inputs"] >= 3
    assert counts["gradient"] > 5 * counts["inputs"]
    own, trained = np.cumsum(run.own), np.cumsum(run.trained)
    assert (own <= 0.03 * trained).all()


def test_probe_that_gets_dearer():
    """Its price is that of last time: one probe too dear, and it is waited for."""
    spent = {"now": 0.5}
    run = Run(budget(0.1), ["gradient"], lambda group, first: spent["now"]).go(1000)
    spent["now"] = 5.0
    run.go(5000)
    assert run.worst(start=1200) <= 0.1
    assert run.part() <= 0.1


def test_part_that_comes_with_the_next_batch_counts():
    schedule = budget(0.1)
    run = Run(schedule, ["step"], lambda group, first: 1.0).go(300)
    schedule.looked(["step"], 2.0, more=True)
    assert schedule.expected("step") == pytest.approx(3.0)
    run.go(1)
    assert schedule.expected("step") in (1.0, 3.0)


# --- for everybody something -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["dear_first_probes", "all_alike"])
@pytest.mark.parametrize("fraction", [0.03, 0.05, 0.1, 0.2, 0.5])
def test_nobody_starves(fraction, first):
    """What a probe takes fits into a window, but not beside all that the others may spend there."""
    run = Run(budget(fraction), spent=None if first else lambda group, first: LATER[group])
    assert all(count > 10 for count in run.go(20_000).counts().values()), run.counts()


@pytest.mark.parametrize("fraction", [0.03, 0.05, 0.1])
def test_what_is_cheap_comes_at_least_as_often(fraction):
    run = Run(budget(fraction)).go(30_000)
    counts = list(run.counts(start=run.after_all()).values())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] > 0
    assert counts[0] > 2 * counts[-1]


@pytest.mark.parametrize("order", range(5))
def test_every_group_comes_whatever_the_prices(order):
    """Also where the order is not that of the prices."""
    groups = list(np.random.default_rng(order).permutation(GROUPS))
    run = Run(budget(0.03), groups).go(60_000)
    assert all(count > 3 for count in run.counts().values()), run.counts()


def test_dear_probe_takes_along_what_costs_less():
    run = Run(budget(0.1)).go(5000)
    for due in run.looked[run.after_all() :]:
        if due:
            last = max(GROUPS.index(group) for group in due)
            assert due == frozenset(GROUPS[: last + 1])


def test_nothing_before_there_is_a_time():
    schedule = budget(0.5)
    assert schedule.choose(GROUPS) == frozenset()
    schedule.ledger.trained(1.0)
    assert schedule.choose([]) == frozenset()


def test_twice_the_budget_looks_about_twice_as_often():
    few, many = (Run(budget(fraction)).go(40_000) for fraction in (0.03, 0.06))
    for group in GROUPS:
        ratio = many.counts(20_000)[group] / few.counts(20_000)[group]
        assert 1.4 < ratio < 2.9, group


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [1e2, 1e5])
def test_pause_counts_ten_usual_steps(pause):
    ledger = Ledger()
    for _ in range(100):
        ledger.trained(2.0)
    ledger.trained(pause)
    assert ledger.total == pytest.approx(2.0 * 110)
    assert ledger.usual == pytest.approx(2.0)
    assert ledger.recent[0] == pytest.approx(2.0 * 110)


def test_pauses_buy_nothing():
    """An evaluation that takes as long as a thousand steps, after every hundred of them."""
    plain = Run(budget(0.05)).go(10_000)
    paused = Run(budget(0.05), lasts=lambda step: 1000.0 if step % 100 == 0 else 1.0).go(10_000)
    assert sum(paused.own) <= 1.15 * sum(plain.own) + LATER["step"]
    steps = 10_000 - 100
    assert sum(paused.own) <= 0.05 * (steps + 100 * 10)


def test_window_of_the_ledger():
    generator, ledger, trained, own = np.random.default_rng(0), Ledger(window=50), [], []
    for _ in range(300):
        seconds = generator.uniform(1, 2)
        ledger.trained(seconds)
        trained.append(seconds)
        own.append(0.0)
        if generator.random() < 0.2:
            own[-1] = generator.uniform(0, 3)
            ledger.spent(own[-1])
        # What was spent after the last step is not one of its own yet.
        assert ledger.recent[0] == pytest.approx(sum(trained[-50:]))
        assert ledger.recent[1] == pytest.approx(sum(own[-51:]))
        assert ledger.overhead == pytest.approx(sum(own[-51:]) / sum(trained[-50:]))
    assert ledger.own == pytest.approx(sum(own))
    assert ledger.total == pytest.approx(sum(trained))
    assert ledger.steps == 300


def test_ledger_without_a_step():
    assert math.isnan(Ledger().overhead)
    assert Ledger().usual == 0


# --- arguments and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), True, "0.1", None])
def test_wrong_fraction(fraction):
    with pytest.raises(ArgumentError, match=r"`fraction` must be in \(0, 1\]\. Got "):
        budget(fraction)


@pytest.mark.parametrize("window", [0, -5, 2.0, True, "200", None])
def test_wrong_window(window):
    with pytest.raises(ArgumentError, match=r"`window` must be a positive integer\. Got "):
        budget(0.1, window=window)


def test_defaults():
    assert repr(budget()) == "budget(0.03)"
    assert budget(1).fraction == 1.0
    assert budget(0.1, window=7).ledger.window == 7
    assert gradmon.budget is budget


@pytest.mark.parametrize("after", [0, 100, 3000])
def test_state(after):
    run = Run(budget(0.05)).go(after)
    other = budget(0.05)
    other.load_state_dict(json.loads(json.dumps(run.schedule.state_dict())))
    assert other.state_dict() == run.schedule.state_dict()
    assert [other.expected(group) for group in GROUPS if group in other.state_dict()["costs"]] == [
        run.schedule.expected(group) for group in GROUPS if group in other.state_dict()["costs"]
    ]
    again = Run(other)
    again.looked, again.seen = list(run.looked), set(run.seen)  # what was looked at once is dear no more
    again.trained, again.own = [0.0] * after, [0.0] * after
    again.go(8000)
    assert (again.part() * 8000 + sum(run.own)) / (8000 + after) <= 0.05
    # As often as a run that was not interrupted, but for the window that begins anew.
    run.go(8000)
    for group in GROUPS:
        assert abs(again.counts(after)[group] - run.counts(after)[group]) <= 2 + 0.3 * run.counts(after)[group], group
