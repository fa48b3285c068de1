"""Readings as TensorBoard scalars, alerts as TensorBoard text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._catalogue import metric_group


class TensorBoardSink:
    """Writes TensorBoard event files.

    A reading of the whole model goes to the tag ``<group>/<name>``, such as ``step-consistency/weight_condition``, so
    that TensorBoard draws each group's charts on one card; metrics of the caller's own go to ``gradmon/<name>``. A
    reading of a layer goes to ``layer-<name>/<layer>``: one card a metric, one chart a layer. NaN and the infinities
    are written as they are. Alerts are text, under ``alerts/<rule>``.

    TensorBoard needs a step: writes whose readings have none are counted, from 1.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, flush_secs: int = 10) -> None:
        """Create the event file.

        Args:
            logdir: The directory of this run, local or anything else that TensorBoard writes to (``s3://...``). Runs
                are told apart by their directories.
            flush_secs: How long a reading may wait before it is on disk.

        Raises:
            ArgumentError: `logdir` is empty or a file, or `flush_secs` is not positive.
        """
        if not isinstance(logdir, str | os.PathLike) or not os.fspath(logdir):
            raise ArgumentError("logdir", "be the path of a directory", repr(logdir))
        if flush_secs <= 0:
            raise ArgumentError("flush_secs", "be positive", flush_secs)
        self.logdir = os.fspath(logdir)
        if Path(self.logdir).is_file():
            raise ArgumentError("logdir", "be the path of a directory", f"the file {self.logdir}")
        # Imported late: it takes seconds, and a program may name this class without using it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self.logdir, flush_secs=flush_secs)
        self._writes_without_step = 0
        self._last_step = 0
        self._closed = False

    @classmethod
    def from_spec(cls, argument: str) -> TensorBoardSink:
        """Make the sink of a string such as ``"tensorboard:runs/mlp-1"``."""
        return cls(argument)

    def write(self, readings: Sequence[Reading]) -> None:
        """Write one scalar a reading.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        if any(reading.step is None for reading in readings):
            self._writes_without_step += 1
        for reading in readings:
            step = self._writes_without_step if reading.step is None else reading.step
            self._writer.add_scalar(_tag(reading), reading.value, step)
            self._last_step = step

    def alert(self, alert: Alert) -> None:
        """Write the alert as text, at its step or, where it has none, at that of the last reading.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        step = self._last_step if alert.step is None else alert.step
        self._writer.add_text(f"alerts/{alert.rule}", _markdown(alert), step)
        # An alert is worth seeing at once, even where readings may wait.
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def _check_open(self) -> None:
        # A closed SummaryWriter would open a second event file without a word.
        if self._closed:
            raise GradmonError(f"The sink of {self.logdir} is closed.")


def _tag(reading: Reading) -> str:
    if reading.layer is None:
        return f"{metric_group(reading.name)}/{reading.name}"
    return f"layer-{reading.name}/{reading.layer}"


def _markdown(alert: Alert) -> str:
    where = f" in `{alert.layer}`" if alert.layer else ""
    lines = [f"**{alert.state}** ({alert.severity}){where}, value {alert.value:.4g}", alert.message]
    if alert.remedy:
        lines.append(f"**Remedy:** {alert.remedy}")
    return "\n\n".join(lines)
