"""Readings as TensorBoard scalars, charts and histograms; alerts and what the run is as text and hyperparameters."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks import _tensorboard_hparams as hparams
from gradmon_integrations.sinks._tensorboard_events import EventFile
from gradmon_integrations.sinks._tensorboard_histograms import LayerHistograms, histogram
from gradmon_integrations.sinks._tensorboard_layout import Charts
from gradmon_integrations.sinks._tensorboard_tags import Series, log10, series
from gradmon_integrations.sinks._tensorboard_text import AlertLog, alert_markdown, run_markdown


class TensorBoardSink:
    """Writes a TensorBoard event file.

    - Scalars: a reading of the whole model goes to the tag ``<group>/<name>``, such as
      ``step-consistency/weight_condition``, so that TensorBoard draws each group's charts together; metrics of the
      caller's own go to ``gradmon/<name>``. Condition numbers, noise scale and sharpness also have
      ``<group>/log10_<name>``, NaN where there is no logarithm. A reading of a layer goes to ``layer-<name>/<layer>``.
      NaN and the infinities are written as they are.
    - Custom scalars: a layout with a category for each question.
    - Histograms: ``layers/<name>``, over the layers of the model, every so many writes.
    - Text: ``alerts/log``, a table of all alerts, and ``alerts/<rule>``; ``run``, what the run is.
    - HParams: the run's row, with the last finite values of some metrics, from the series ``latest/<name>``.

    TensorBoard needs a step: writes whose readings have none are counted, from 1. It reads the files of a directory
    one after the other, and as one run, so the directory should be this sink's alone.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, flush_secs: int = 10, histogram_every: int = 10) -> None:
        """Prepare the directory.

        Args:
            logdir: The directory of this run, local or anything else that TensorBoard writes to (``s3://...``). Runs
                are told apart by their directories; ranks other than 0 write to ``rank-<rank>`` in it.
            flush_secs: How long a reading may wait before it is on disk.
            histogram_every: In how many writes there is at most one histogram of a metric over the layers.

        Raises:
            ArgumentError: `logdir` is empty, a file or cannot be made, `flush_secs` is not positive, or
                `histogram_every` is not a positive whole number.
        """
        if not isinstance(logdir, str | os.PathLike) or not os.fspath(logdir):
            raise ArgumentError("logdir", "be the path of a directory", repr(logdir))
        if not isinstance(flush_secs, int | float) or not flush_secs > 0:
            raise ArgumentError("flush_secs", "be positive", repr(flush_secs))
        if not isinstance(histogram_every, int) or histogram_every < 1:
            raise ArgumentError("histogram_every", "be a positive whole number", repr(histogram_every))
        self.logdir = os.fspath(logdir)
        if Path(self.logdir).is_file():
            raise ArgumentError("logdir", "be the path of a directory", f"the file {self.logdir}")
        self._every = histogram_every
        # Imported late, for it takes a moment, and a program may name this class without using it; but not as late as
        # the first write, since what is wrong should be told at once.
        import torch.utils.tensorboard  # noqa: F401
        from tensorboard.compat import tf

        try:
            tf.io.gfile.makedirs(self.logdir)
        except OSError as error:
            must = f"be a directory that can be written ({error.strerror})"
            raise ArgumentError("logdir", must, self.logdir) from error
        self._file = EventFile(self.logdir, flush_secs)
        self._run: str | None = None
        self._series: dict[tuple[str, str | None], Series] = {}
        self._charts = Charts()
        self._histograms = LayerHistograms(histogram_every)
        self._log = AlertLog()
        self._latest = hparams.Latest()
        self._described = False
        self._writes = 0
        self._writes_without_step = 0
        self._last_step = 0
        self._closed = False

    @classmethod
    def from_spec(cls, argument: str) -> TensorBoardSink:
        """Make the sink of a string such as ``"tensorboard:runs/mlp-1"``."""
        return cls(argument)

    def bind(self, run: str, rank: int) -> None:
        """Take the run's name, and a directory of its own for a rank other than 0."""
        self._run = run
        if rank:
            self.logdir = self._file.logdir = os.path.join(self.logdir, f"rank-{rank}")

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Write what the run is: as text, and as hyperparameters.

        Raises:
            GradmonError: The sink is closed.
        """
        file = self._open()
        self._described = True
        file.add([*hparams.experiment(info), *hparams.session_start(info)], 0)
        file.add([_text("run", run_markdown(self._run, info))], 0)
        file.flush()

    def write(self, readings: Sequence[Reading]) -> None:
        """Write the readings, all of one step as one event, and what is due beside them.

        Raises:
            GradmonError: The sink is closed.
        """
        file = self._open()
        self._writes += 1
        if any(reading.step is None for reading in readings):
            self._writes_without_step += 1
        events: defaultdict[int, list[Any]] = defaultdict(list)
        for reading in readings:
            events[self._step(reading.step)] += self._scalars(file, reading)
        # Readings that waited for the next batch come with the newer ones of that batch.
        self._last_step = max(events, default=self._last_step)
        for (name, step), values in self._histograms.due(readings).items():
            events[self._step(step)].append(histogram(name, values))
        for step, values in events.items():
            file.add(values, step)
        self._latest.see(readings)
        if (self._writes - 1) % self._every == 0:
            self._write_latest(file)
        self._charts.see(readings)
        layout = self._charts.due()
        if layout is not None:
            from torch.utils.tensorboard import summary

            file.add(summary.custom_scalars(layout).value, self._last_step)

    def alert(self, alert: Alert) -> None:
        """Write the alert and the table, at the alert's step or, where it has none, at that of the last reading.

        Raises:
            GradmonError: The sink is closed.
        """
        file = self._open()
        step = self._last_step if alert.step is None else alert.step
        self._log.add(alert)
        texts = {f"alerts/{alert.rule}": alert_markdown(alert), "alerts/log": self._log.markdown()}
        file.add([_text(tag, markdown) for tag, markdown in texts.items()], step)
        # An alert is worth seeing at once, even where readings may wait.
        file.flush()

    def finish(self, succeeded: bool) -> None:
        """Write how the run ended, and its last values.

        Raises:
            GradmonError: The sink is closed.
        """
        file = self._open()
        self._write_latest(file)
        if self._described:
            file.add(hparams.session_end(succeeded), self._last_step)
        file.flush()

    def close(self) -> None:
        """Write the last values, flush and close the event file."""
        if self._closed:
            return
        self._closed = True
        try:
            self._write_latest(self._file)
        finally:
            self._file.close()

    def _step(self, step: int | None) -> int:
        return self._writes_without_step if step is None else step

    def _scalars(self, file: EventFile, reading: Reading) -> list[Any]:
        key = (reading.name, reading.layer)
        if key not in self._series:
            self._series[key] = series(*key)
        tag, logarithm, meaning = self._series[key]
        values = [file.scalar(tag, reading.value, meaning)]
        if logarithm is not None:
            values.append(file.scalar(logarithm, log10(reading.value), f"The decimal logarithm of: {meaning}"))
        return values

    def _write_latest(self, file: EventFile) -> None:
        if self._described:
            latest = self._latest.news(self._log.fired)
            file.add([file.scalar(tag, value) for tag, value in latest.items()], self._last_step)

    def _open(self) -> EventFile:
        if self._closed:
            raise GradmonError(f"The sink of {self.logdir} is closed.")
        return self._file


def _text(tag: str, markdown: str) -> Any:
    from torch.utils.tensorboard import summary

    return summary.text(tag, markdown).value[0]
