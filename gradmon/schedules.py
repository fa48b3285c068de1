"""When to look: any callable from the step's number to a bool, or a budget; these are the usual ones."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmon._errors import ArgumentError

Schedule = Callable[[int], bool]
"""``schedule(step) -> bool``; steps count from 1. It must depend on the step only."""

_FIRST = {"gradient": 4.0, "examples": 40.0, "weights": 25.0, "step": 25.0, "scaled": 40.0, "inputs": 150.0}
"""What the first probe of a group of metrics is expected to take, in training steps."""
_FIRST_OF_OTHERS = 40.0
_PART = 0.9
"""The part of a budget that is given to what can be timed; the rest is for hooks, and for what takes longer."""
_ASKING = 0.1
"""The part of a budget that may go into asking whether anything is due."""
_PAUSE = 10
"""How many usual steps the time between two steps counts at most."""
_MEDIAN_OF = 51
_MEDIAN_EVERY = 16


@dataclass(frozen=True)
class every:  # noqa: N801 - reads as a word where it is used: schedule=every(50)
    """Every n-th step: n, 2 n, 3 n, ...

    Raises:
        ArgumentError: `n` is not a positive integer.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("n", "be a positive integer", self.n)

    def __call__(self, step: int) -> bool:
        """Whether to look at this step."""
        return step % self.n == 0

    def following(self, step: int) -> int:
        """The first step after this one that is to be looked at."""
        return (step // self.n + 1) * self.n


@dataclass(frozen=True)
class log_spaced:  # noqa: N801 - as above
    """The steps closest to ``10 ** (i / per_decade)``, i = 0, 1, ...: dense at the start, where most goes wrong.

    Raises:
        ArgumentError: `per_decade` is not a positive integer.
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        per_decade = self.per_decade
        if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("per_decade", "be a positive integer", per_decade)

    def __call__(self, step: int) -> bool:
        """Whether to look at this step."""
        if step < 1:
            return False
        guess = 0
        while round(10 ** (guess / self.per_decade)) < step:
            guess += 1
        return round(10 ** (guess / self.per_decade)) == step


class Ledger:
    """The time of the training and the time of its monitor, as a whole and over the last steps.

    Args:
        window: How many steps the last ones are.
    """

    def __init__(self, window: int = 200) -> None:
        self.window = window
        self.total = self.own = 0.0
        self.steps = 0
        self.usual = 0.0
        self._recent: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._last: deque[tuple[int, float, float]] = deque()
        self._told = self._last_steps = 0
        self._last_total = self._last_own = 0.0
        self._spent = 0.0

    def trained(self, seconds: float, steps: int = 1, last: float | None = None) -> None:
        """A step of the training, or some together, took so long; what was spent before counts for them.

        Args:
            seconds: The time.
            steps: How many.
            last: The time of the last one, which tells what is usual; None for the mean, in which a pause would hide.
        """
        self.steps += steps
        self._told += 1
        self._recent.append(seconds / steps if last is None else last)
        if len(self._recent) < _MEDIAN_OF or self._told % _MEDIAN_EVERY == 0:
            self.usual = statistics.median(self._recent)
        seconds = min(seconds, (steps - 1 + _PAUSE) * self.usual)
        self.total += seconds
        self._last.append((steps, seconds, self._spent))
        self._last_steps += steps
        self._last_total += seconds
        self._last_own += self._spent
        self._spent = 0.0
        while self._last_steps - self._last[0][0] >= self.window:
            gone, lasted, own = self._last.popleft()
            self._last_steps -= gone
            self._last_total, self._last_own = max(0.0, self._last_total - lasted), max(0.0, self._last_own - own)

    def spent(self, seconds: float) -> None:
        """The monitor took so long."""
        self.own += seconds
        self._spent += seconds

    @property
    def recent(self) -> tuple[float, float]:
        """The time of the training and that of the monitor over the last steps, in seconds."""
        return self._last_total, self._last_own + self._spent

    @property
    def overhead(self) -> float:
        """The monitor's time over the training's, over the last steps; NaN before the first."""
        total, own = self.recent
        return own / total if total > 0 else math.nan

    def state_dict(self) -> dict[str, float]:
        """The totals, as plain types; the last steps begin anew, because the next machine may be another one."""
        return {"total": self.total, "own": self.own}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up what was saved."""
        self.total, self.own = float(state["total"]), float(state["own"])


class budget:  # noqa: N801 - as above
    """As often as a given part of the training's time allows.

    Metrics are looked at in groups that share their passes, and a probe of one group takes those that cost less along.
    Every group is allowed the same part of the budget, so that what is cheap comes oftener; its turn comes when what it
    has not spent yet pays for what it took last time. Over any `window` steps the sum stays at or below the fraction,
    unless a single probe takes more than that: then it is made only when the whole run so far pays for it.

    Time is wall-clock time, on CUDA that between events. A pause between steps (an evaluation, a checkpoint) counts no
    more than ten usual steps. The first probe of a group finds things out and takes several times as long as the later
    ones: it is waited for accordingly. Where steps are so short that asking takes a tenth of the budget or more, the
    monitor asks every few steps only, at most `window` / 4. A budget belongs to one monitor.

    Args:
        fraction: The monitor's time over the training's, in (0, 1].
        window: The number of steps.

    Raises:
        ArgumentError: An argument is out of range.
    """

    def __init__(self, fraction: float = 0.03, *, window: int = 200) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("fraction", "be in (0, 1]", fraction)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("window", "be a positive integer", window)
        self.fraction = float(fraction)
        self.ledger = Ledger(window)
        self._spent: dict[str, float] = {}
        self._costs: dict[str, float] = {}
        self._dearer = 1.0
        self._last: int | None = None

    def __repr__(self) -> str:
        return f"budget({self.fraction:g})"

    def expected(self, group: str) -> float:
        """What a probe of a group is expected to take, in seconds."""
        if group in self._costs:
            return self._costs[group]
        return _FIRST.get(group, _FIRST_OF_OTHERS) * self._dearer * self.ledger.usual

    def choose(self, groups: Sequence[str]) -> frozenset[str]:
        """The groups to look at in the coming step.

        Args:
            groups: All there are, those that cost less first.
        """
        ledger = self.ledger
        allowed = _PART * self.fraction * ledger.total
        if not groups or ledger.own >= allowed:
            return frozenset()
        share = allowed / len(groups)
        payable: list[tuple[float, int]] = []
        for place, group in enumerate(groups):
            cost, before = self.expected(group), self._spent.get(group, 0.0)
            known = group in self._costs
            if before + cost <= share if known else ledger.own + cost <= allowed:
                payable.append((before + cost if known else 0.0, place))
        if not payable:
            return frozenset()
        # The one that is farthest behind; while it does not fit into the window, nobody else may fill it up.
        place = min(payable)[1]
        if not self._fits(self.expected(groups[place]), allowed):
            return frozenset()
        return frozenset({groups[place], *(group for group in groups[:place] if group in self._costs)})

    def _fits(self, cost: float, allowed: float) -> bool:
        ledger = self.ledger
        total, own = ledger.recent
        if own + cost <= _PART * self.fraction * total:
            return True
        # What does not fit even into a window of its own is paid for by the whole run.
        alone = self._last is None or ledger.steps - self._last >= ledger.window
        return alone and ledger.own + cost <= allowed

    def rest(self, seconds: float) -> int:
        """How many steps may go by before it is worth asking again.

        Args:
            seconds: What it takes to ask.
        """
        paid = _ASKING * self.fraction * self.ledger.usual
        if paid <= 0 or seconds <= 0:
            return 0
        return max(1, min(self.ledger.window // 4, math.ceil(seconds / paid))) - 1

    def looked(self, groups: Sequence[str], seconds: float, *, more: bool = False) -> None:
        """A probe of some groups took so long; the dearest of them pays.

        Args:
            groups: The groups, those that cost less first.
            seconds: The time.
            more: Whether this belongs to their last probe.
        """
        group = groups[-1]
        self._last = self.ledger.steps
        self._spent[group] = self._spent.get(group, 0.0) + seconds
        if more:
            self._costs[group] = self._costs.get(group, 0.0) + seconds
            return
        expected = _FIRST.get(group, _FIRST_OF_OTHERS) * self.ledger.usual
        if group not in self._costs and expected > 0:
            # Where a pass takes longer than its size says (a tiny model), so do those of the other groups.
            self._dearer = max(self._dearer, seconds / expected)
        self._costs[group] = seconds

    def state_dict(self) -> dict[str, Any]:
        """What has been spent, and for what, as plain types."""
        return {
            "ledger": self.ledger.state_dict(),
            "spent": dict(self._spent),
            "costs": dict(self._costs),
            "dearer": self._dearer,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self.ledger.load_state_dict(state["ledger"])
        self._spent = {str(group): float(seconds) for group, seconds in state["spent"].items()}
        self._costs = {str(group): float(seconds) for group, seconds in state["costs"].items()}
        self._dearer = float(state["dearer"])
