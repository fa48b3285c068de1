"""The monitors of several ranks take the same course: they begin together, say the same, and stop at the same step."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from torch import nn

from gradmon._batches import example_count
from gradmon._errors import GradmonError, Unavailable
from gradmon._reading import Reading
from gradmon._types import Batch
from gradmon.metrics import Metric
from gradmon.pacing import Pacer, Plan
from gradmon.probes import Taken
from gradmon.publishing import Publisher
from gradmon.reading import Pending, Reader
from gradmon.team import Group, Team, find_ranks, is_sharded, passes_talk, running

_LOG = logging.getLogger("gradmon")
_LARGEST = frozenset({"monitor_failures"})
"""The readings about a monitor itself of which the largest counts; of all others that of the first rank."""


def find_team(
    model: nn.Module, group: Group, alike: Mapping[str, Any], timeout: float
) -> tuple[Team | None, int, str | None]:
    """Who trains a model together.

    Args:
        model: The model.
        group: The processes, or how to find them.
        alike: What must be the same on all of them.
        timeout: How many seconds to wait for the others.

    Returns:
        The team, or None for this process alone; this process's place in it; and why of the model only the norms can be
        had (or nothing, where it would take a team and there is none), or None where everything can.

    Raises:
        ArgumentError: `group` is not what it must be.
    """
    ranks = find_ranks(model, group)
    team = None if ranks is None else Team.gathered(ranks, alike, timeout)
    refused = None if ranks is None else ranks.why_not
    if team is None and running() and is_sharded(model):
        refused = "the parameters are sharded over processes that are not measured together"
    elif team is None and running():
        refused = passes_talk(model)  # as many passes as this process makes, the others may not
    if refused is not None:
        _LOG.warning("Much of this model cannot be measured: %s.", refused)
    return team, 0 if ranks is None else ranks.rank, refused


class Lockstep:
    """Rounds in which the monitors of all ranks look at the same step; between them nobody says anything.

    Args:
        team: The ranks.
        pacer: Says when.
        reader: Knows which metrics were given up.
        publisher: Is asked for the end of the training.
        dim: The dimension that holds the examples.
    """

    def __init__(self, team: Team, pacer: Pacer, reader: Reader, publisher: Publisher, dim: int) -> None:
        self._team, self._pacer, self._reader, self._publisher = team, pacer, reader, publisher
        self._dim = dim
        self._stops = False

    @property
    def stops(self) -> bool:
        """Whether the training should end, as the ranks have agreed; where they cannot, as this one thinks."""
        return self._stops or (self._team.lost is not None and self._publisher.should_stop)

    @contextlib.contextmanager
    def round(
        self, step: int, batch: Batch, taken: Taken | None, due: Sequence[Metric], pending: Pending | None
    ) -> Generator[str | None]:
        """A context for what is done about a step: all ranks enter it together, and leave it with the same plans.

        Args:
            step: The number of the step.
            batch: Its batch.
            taken: What the optimizer's step started from.
            due: The metrics that are due.
            pending: What waits for this batch.

        Yields:
            Why the ranks cannot look at it together; None where they can.
        """
        team = self._team
        if not due and pending is None and not self._pacer.meets(step):
            yield None
            return
        reason = self._begin(step, batch, taken, due, pending)
        try:
            yield reason
        except Exception as error:
            team.trouble(error)
            self._finish(step)
            raise
        except BaseException:
            team.leave("was interrupted")
            raise
        else:
            self._finish(step)

    def _begin(
        self, step: int, batch: Batch, taken: Taken | None, due: Sequence[Metric], pending: Pending | None
    ) -> str | None:
        team = self._team
        try:
            heard = team.begin(
                step=step,
                due=[metric.name for metric in due],
                pending=None if pending is None else pending.number,
                taken=taken is not None,
                examples=self._count(batch),
                given_up=dict(self._reader.given_up),
            )
        except Unavailable as missing:
            return missing.reason
        team.examples = [int(other["examples"] or 0) for other in heard]
        for other in heard:
            self._reader.given_up = {**other["given_up"], **self._reader.given_up}
        reason = _apart(heard)
        if reason is not None:
            team.end(reason)
        return reason

    def _count(self, batch: Batch) -> int | None:
        try:
            return example_count(batch, self._dim)
        except GradmonError:
            return None

    def _finish(self, step: int) -> None:
        team = self._team
        plan = self._pacer.proposal(step) if team.leads else None
        heard = team.finish(stop=self._publisher.should_stop, plan=plan)
        agreed = None if heard is None else heard[0]["plan"]
        self._pacer.adopt(None if agreed is None else Plan(*agreed), step)
        if heard is not None:
            self._stops = any(other["stop"] for other in heard)

    def pooled(self, step: int, readings: Sequence[Reading]) -> list[Reading]:
        """The circumstances of a step, with the number of the examples of all ranks."""
        size = Reading("batch_size", float(self._team.total), step)
        if not all(self._team.examples):
            reason = "the batch of some rank holds no tensor whose first dimension counts its examples"
            size = size._replace(value=math.nan, reason=reason)
        return [size if reading.name == size.name else reading for reading in readings]

    def alike(self, readings: Sequence[Reading]) -> list[Reading]:
        """What the monitor says about itself, the same on all ranks: times and sinks are those of the first."""
        try:
            heard = self._team.exchange("itself", readings=[[r.name, r.value, r.reason] for r in readings])
        except Unavailable:
            return list(readings)
        said: list[dict[str, Any]] = [{r[0]: r for r in other["readings"]} for other in heard]
        found: list[Reading] = []
        for reading in readings:
            _, value, reason = said[0].get(reading.name, (None, reading.value, reading.reason))
            if reading.name in _LARGEST:
                value = max(other[reading.name][1] for other in said if reading.name in other)
            found.append(reading._replace(value=float(value), reason=reason))
        return found

    def close(self) -> None:
        """The run has come to its end: the others need not wait for this rank."""
        self._team.leave("has ended")


def _apart(heard: Sequence[dict[str, Any]]) -> str | None:
    """Why ranks cannot look at a step together; None where they can."""
    steps = sorted({int(other["step"]) for other in heard})
    if len(steps) > 1:
        return f"the ranks are at different steps ({' and '.join(map(str, steps))})"
    for name, what in (
        ("due", "different metrics are due on different ranks"),
        ("pending", "not all ranks have looked at the step before"),
        ("taken", "the optimizer has taken a step on some ranks only"),
    ):
        if any(other[name] != heard[0][name] for other in heard):
            return what
    return None
