"""The exceptions that gradmon raises, and the one it uses to say that a number cannot be had."""

from __future__ import annotations

OUT_OF_MEMORY = "out of memory"
"""The reason of a number that is missing because memory ran out."""


class GradmonError(Exception):
    """Base of every error that gradmon raises on purpose."""


class ArgumentError(GradmonError, ValueError):
    """An argument is not what it must be; the message names it, says what it must be and what it was."""

    def __init__(self, name: str, must: str, got: object) -> None:
        super().__init__(f"`{name}` must {must}. Got {got}.")


class PluginError(GradmonError, LookupError):
    """A sink or a command was asked for by a name under which nothing is installed."""


class Unavailable(GradmonError):
    """A number cannot be trusted, so there is none.

    The reason ends up in `Reading.reason`, beside a value of NaN.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def told(error: BaseException) -> str:
    """An error in one line, for a reason: its kind and what it says, where it can say anything."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # it runs inside the training's passes, and the class is the caller's
        return type(error).__name__
