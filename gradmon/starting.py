"""The check before the first step, as a monitor makes it: at the first batch, at the weights before its step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError, told
from gradmon._reading import Reading
from gradmon._types import Batch, Loss, Reduction
from gradmon.alerts import Above, Rule, Stuck, default_rules
from gradmon.preflight._coefficients import LIMIT
from gradmon.preflight.look import Look, look
from gradmon.preflight.verdict import Preflight, judged
from gradmon.probes import Keep, Taken
from gradmon.publishing import Failures

_PASSES = 40
_EARLY = 20
"""From which step on the loss says more about the risk than what was seen before the first one."""
RISK = "preflight_risk"
"""The reading that tells the probability of a failure."""


class Start:
    """Checks at the first batch whether the run will train, and once more when the loss has something to say.

    The verdict is readings ``preflight_...``, the alert ``preflight`` where the run will probably fail, and the alert
    ``stuck`` where the loss is that of a guess at the first reading from step 20 on.

    Args:
        wanted: Whether to check at all.
        model: The model.
        optimizer: Its optimizer, before its first step.
        loss: The loss.
        reduction: How one value per example becomes the batch loss.

    Attributes:
        found: The verdict; None before there is one.

    Raises:
        ArgumentError: `wanted` is neither True nor False, or there is no optimizer, or no loss.
    """

    def __init__(
        self, wanted: bool, model: nn.Module, optimizer: Optimizer | None, loss: Loss | None, reduction: Reduction
    ) -> None:
        if not isinstance(wanted, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("preflight", "be True or False", repr(wanted))
        self.found: Preflight | None = None
        self._wanted = self._waits = wanted
        self._follows = False
        self._before: Optimizer | None = None
        if not wanted:
            return
        if not isinstance(optimizer, Optimizer) or loss is None:
            raise ArgumentError("preflight", "be False without an optimizer and a loss", True)
        self._model, self._loss = model, loss
        self._reduction: Reduction = reduction
        self._live = optimizer
        # As it is before the first step: some of what a step leaves in it would make the trial steps shorter.
        memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._before = copy.deepcopy(optimizer, memo)

    @property
    def waits(self) -> bool:
        """Whether the check is still to come."""
        return self._waits

    def skip(self) -> None:
        """Make no check: the run goes on from a later step."""
        self._waits = False
        self._before = None

    def rules(self, alerts: Any) -> Any:
        """Rules together with those on the verdict; None for none.

        Args:
            alerts: The rules that were asked for; those of one name with a rule on the verdict take its place.
        """
        if not self._wanted or not isinstance(alerts, Iterable) or (isinstance(alerts, str) and alerts != "default"):
            return alerts  # none are wanted, or what is none is refused by who takes them
        given: list[Any] = default_rules() if isinstance(alerts, str) else list(cast("Iterable[Any]", alerts))
        named = {getattr(rule, "name", None) for rule in given}
        own: list[Rule] = [
            Above(RISK, LIMIT, name="preflight", severity="warning", remedy=self._remedy, after=1, clear_after=1),
            Stuck(at=_EARLY),
        ]
        return [*given, *(rule for rule in own if rule.name not in named)]

    def _remedy(self, reading: Reading, known: Mapping[str, float]) -> str:
        found = self.found
        if found is None or not found.causes:
            return "See what `gradmon.preflight` says."
        return " ".join(
            f"{cause.title.capitalize()}. {cause.evidence} {cause.remedy[0].upper()}{cause.remedy[1:]}."
            for cause in found.causes[:2]
        )

    def keep(self, wanted: Keep) -> Keep:
        """What is to be kept of the coming step where something is wanted of it already."""
        return "weights" if self._waits and wanted == "nothing" else wanted

    def readings(
        self, step: int, batch: Batch, taken: Taken | None, rates: Sequence[float], failures: Failures, alone: bool
    ) -> list[Reading]:
        """The verdict, at the first step that the optimizer takes; nothing at later ones.

        Args:
            step: The number of the step.
            batch: Its batch.
            taken: What it started from; None where none was taken.
            rates: Its learning rates.
            failures: Where an error is noted; it goes no further.
            alone: Whether this process trains the model alone.
        """
        optimizer = self._before
        if not self._waits or taken is None or optimizer is None:
            return []
        self.skip()
        if not alone:
            reason = "several processes train the model: call gradmon.preflight before it is wrapped"
            return [Reading(RISK, math.nan, step, reason=reason)]
        try:
            self.found = judged(self._look(optimizer, batch, taken, rates))
        except Exception as error:
            failures.note("preflight", error)
            return [Reading(RISK, math.nan, step, reason=told(error))]
        self._follows = True
        return self.found.to_readings(step)

    def _look(self, optimizer: Optimizer, batch: Batch, taken: Taken, rates: Sequence[float]) -> Look:
        for group, now in zip(optimizer.param_groups, self._live.param_groups, strict=True):
            group.update({name: value for name, value in now.items() if name != "params"})
        # A scheduler may have gone on since.
        for group, rate in zip((g for g in optimizer.param_groups if g.get("lr") is not None), rates, strict=False):
            group["lr"] = rate
        batches = iter([batch])  # a list of one tensor would be taken for a batch
        return look(self._model, optimizer, self._loss, batches, _PASSES, reduction=self._reduction, base=taken.values)

    def later(self, readings: Sequence[Reading]) -> list[Reading]:
        """The risk once more, from the first loss after enough steps; nothing before and after that."""
        if not self._follows or self.found is None:
            return []
        for reading in readings:
            if reading.name == "loss" and reading.layer is None and (reading.step or 0) >= _EARLY:
                self._follows = False
                risk = self.found.risk_after(reading.value)
                return [] if risk is None or math.isnan(risk) else [Reading(RISK, risk, reading.step)]
        return []
