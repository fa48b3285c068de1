"""A rule on the loss soon after the start: what has learned nothing by then hardly ever does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradmon._errors import ArgumentError
from gradmon._reading import Reading, Severity
from gradmon.alerts._rule import Judgement, Remedy, Switching, apart, check_count, check_metric, speaks_of

CHANCE = "preflight_chance"
"""The reading that tells the loss at chance, where a rule is not told."""


class Stuck(Switching):
    """Fires if the loss is still near that of a guess some steps after the start.

    ``loss > part * chance`` at the first reading from step `at` on; resolves when a later one is below. An infinite
    loss is as bad; NaN is the matter of `NonFinite`. It judges nothing before step `at`, and nothing as long as it does
    not know the loss at chance.

    Args:
        chance: The loss at chance, such as ln C for C classes; None for that of a reading ``preflight_chance``.
        at: From which step on it judges, at least 1.
        part: Above which part of the loss at chance a run counts as stuck, in (0, 1].
        metric: The loss; on a fixed probe it is less noisy than on the batches.
        name: The alert's name.
        severity: ``info``, ``warning`` or ``critical``.
        remedy: What to change, or a function that says it with numbers.
        clear_after: How many readings in a row must be below before it resolves.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        chance: float | None = None,
        *,
        at: int = 20,
        part: float = 0.89,
        metric: str = "loss",
        name: str = "stuck",
        severity: Severity = "warning",
        remedy: Remedy = "Restart rather than change something in mid-run: initialise anew with `gradmon.reinitialize` "
        "and take the learning rate of `gradmon.suggest_lr`.",
        clear_after: int = 2,
    ) -> None:
        super().__init__(name, severity, remedy, 1, clear_after)
        if chance is not None and not (_is_number(chance) and 0 < chance < math.inf):
            raise ArgumentError("chance", "be a positive number, or None", chance)
        check_count("at", at, 1)
        if not _is_number(part) or not 0 < part <= 1:
            raise ArgumentError("part", "be in (0, 1]", part)
        check_metric(metric)
        self.chance = None if chance is None else float(chance)
        self.at, self.part, self.metric = at, part, metric
        self.listens = self.wanted(metric) | {CHANCE}
        self._over = False

    def judge(self, reading: Reading) -> Judgement | None:
        """Bad if near chance; None before step `at`, without the loss at chance, and once something was learned."""
        if reading.name == CHANCE and reading.layer is None and self.chance is None:
            if math.isfinite(reading.value) and reading.value > 0:
                self.chance = reading.value
            return None
        known = speaks_of(reading, self.metric) and reading.step is not None and reading.step >= self.at
        if not known or self.chance is None or self._over:
            return None
        chance, limit = self.chance, self.part * self.chance
        bad = reading.value > limit
        # What has once learned something may rise again, but that is not what this rule is about.
        self._over = not bad and not self._firing.get(None, False)

        def message() -> str:
            value, limited = apart(reading.value, limit)
            side = "still above" if bad else "now below"
            return f"The {self.metric} is {value} at step {reading.step}, {side} {limited}: a guess has {chance:.4g}."

        return Judgement(bad, message)

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as plain types."""
        return {**super().state_dict(), "chance": self.chance, "over": self._over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        super().load_state_dict(state)
        self.chance = None if state["chance"] is None else float(state["chance"])
        self._over = bool(state["over"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
