"""What a sink must be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from gradmon._reading import Alert, Reading


@runtime_checkable
class Sink(Protocol):
    """Takes what leaves the monitor. It never sees a tensor.

    A monitor calls it from a thread of the sink's own, so that whatever is slow there costs the training nothing; its
    methods run one after another. A sink that only remembers, or that belongs to the training's thread, says so by a
    class attribute ``immediate = True``, and is called on the spot. One that shows alerts where the log would show
    them, too, says ``logs_alerts = True``, and the monitor does not log them.

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


@runtime_checkable
class InfoAware(Protocol):
    """A sink that says what kind of run it is. Optional."""

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Learn what describes the run: versions, model, optimizer, and the user's own hyperparameters.

        The monitor calls it once, after `bind`.
        """
        ...


@runtime_checkable
class EndAware(Protocol):
    """A sink that tells a run that came to its end from one that was lost. Optional."""

    def finish(self, succeeded: bool) -> None:
        """Learn that the run has ended: by itself, or by an exception. The monitor calls it once, before `close`."""
        ...
