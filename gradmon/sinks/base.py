"""What a sink must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gradmon._reading import Alert, Reading


@runtime_checkable
class Sink(Protocol):
    """Takes what leaves the monitor. It never sees a tensor.

    A sink that holds a file or a port raises `GradmonError` when it is written to after `close`. A sink that is to be
    had by name, as in ``sinks="jsonl:run.jsonl"``, also has a class method ``from_spec(argument: str)``, which gets
    what follows the first colon (an empty string where there is none), and is installed as an entry point of the group
    ``gradmon.sinks``.
    """

    def write(self, readings: Sequence[Reading]) -> None:
        """Take the readings of one probe."""
        ...

    def alert(self, alert: Alert) -> None:
        """Take an alert that started or stopped firing."""
        ...

    def close(self) -> None:
        """Let go of files, ports and threads; a second call does nothing."""
        ...


@runtime_checkable
class RunAware(Protocol):
    """A sink that labels what it writes. Optional: sinks without labels leave it out."""

    def bind(self, run: str, rank: int) -> None:
        """Learn the run's name and this process's rank; the monitor calls it once, before the first write."""
        ...
