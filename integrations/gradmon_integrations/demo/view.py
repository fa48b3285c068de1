"""What shows the runs while they train."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Protocol

Tone = Literal["title", "good", "note", "bad", "text", "command"]


class View(Protocol):
    """Shows the runs. Used as a context manager around the training; `say` works before and after it, too."""

    def __enter__(self) -> View:
        """Begin to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state, and leave the terminal as it was."""
        ...

    def step(self, step: int) -> None:
        """All runs have taken a step, and their monitors have looked if they were to."""
        ...

    def say(self, text: str, tone: Tone = "text") -> None:
        """Print a paragraph; a command is never broken into lines."""
        ...
