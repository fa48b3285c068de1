"""TensorBoard event files to which each step is written as one event, however many numbers it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from gradmon._errors import GradmonError

# How many events may wait for the disk; one more makes the sink, never the training, wait.
_WAITING = 1000
_PAUSE = 60.0


class EventFile:
    """Takes the values of a step together.

    `SummaryWriter.add_scalar` makes one event, one checksum and one write of the file of each number; one event for all
    numbers of a step costs a fifth of that or less, which counts: meanwhile the training waits for the interpreter.

    A file that cannot be written any more, because the disk was full or a share away, is given up, and another one is
    begun beside it a minute later: TensorBoard reads them as one.
    """

    def __init__(self, logdir: str, flush_secs: int) -> None:
        """Choose where to; the file is made with the first event.

        Args:
            logdir: The directory, local or anything else that TensorBoard writes to.
            flush_secs: How long an event may wait before it is on disk.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2

        # The messages of these modules are made when they are imported, where no type checker sees them.
        event: Any = event_pb2
        summary: Any = summary_pb2
        self._event, self._summary, self._metadata = event.Event, summary.Summary, summary.SummaryMetadata
        self.logdir = logdir
        self._flush_secs = flush_secs
        self._writer: Any = None
        self._not_before: float | None = None
        self._described: set[str] = set()

    def scalar(self, tag: str, value: float, meaning: str = "") -> Any:
        """A number, as a value for `add`; the first of a tag carries what it means."""
        if not meaning or tag in self._described:
            return self._summary.Value(tag=tag, simple_value=value)
        self._described.add(tag)
        return self._summary.Value(
            tag=tag,
            simple_value=value,
            metadata=self._metadata(
                summary_description=meaning,
                plugin_data=self._metadata.PluginData(plugin_name="scalars"),
            ),
        )

    def add(self, values: Iterable[Any], step: int) -> None:
        """Write values of one step as one event; nothing where there are none."""
        summary = self._summary(value=values)
        if summary.value:
            event = self._event(wall_time=time.time(), step=step, summary=summary)
            self._use(lambda writer: writer.add_event(event))

    def flush(self) -> None:
        """Wait until everything is on disk."""
        if self._writer is not None:
            self._use(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush, and close the file, if there is one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _use(self, work: Callable[[Any], None]) -> None:
        if self._writer is None and self._not_before is not None and time.monotonic() < self._not_before:
            raise GradmonError(f"The event file in {self.logdir} failed, and is not tried again yet.")
        try:
            if self._writer is None:
                from tensorboard.summary.writer.event_file_writer import EventFileWriter

                self._writer = EventFileWriter(self.logdir, _WAITING, self._flush_secs)
            work(self._writer)
        except Exception:
            self._writer = None
            self._not_before = time.monotonic() + _PAUSE
            raise
