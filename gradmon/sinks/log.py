"""A sink for the terminal and for whatever else the logging module reaches."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading, Severity

_LEVELS: dict[Severity, int] = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


class LogSink:
    """Logs one compact line a write, and one an alert.

    Readings of single layers are counted, not spelled out. A firing alert is logged at the level that bears the name of
    its severity, a resolved one at INFO.
    """

    # Between the program's own lines, at the place where it happened.
    immediate = True

    def __init__(self, logger: logging.Logger | None = None, level: int | str = logging.INFO) -> None:
        """Choose where to.

        Args:
            logger: The logger; None means the one named ``gradmon``.
            level: The level of the readings' lines, as a number or a name.

        Raises:
            ArgumentError: `logger` is no logger, or `level` no level.
        """
        if not isinstance(logger, logging.Logger | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("logger", "be a logging.Logger or None", repr(logger))
        self.logger = logger or logging.getLogger("gradmon")
        self.level = _level(level)
        self._prefix = ""

    @classmethod
    def from_spec(cls, argument: str) -> LogSink:
        """Make the sink of the string ``"log"``, or of one with a level, such as ``"log:debug"``."""
        return cls(level=argument) if argument else cls()

    def bind(self, run: str, rank: int) -> None:
        """Begin every line with the run, and with the rank where it is not 0."""
        self._prefix = _one_line(f"{run} rank {rank}: " if rank else f"{run}: ")

    def write(self, readings: Sequence[Reading]) -> None:
        """Log the readings on one line."""
        if not readings or not self.logger.isEnabledFor(self.level):
            return
        parts = [_words(reading) for reading in readings if reading.layer is None]
        if len(parts) < len(readings):
            parts.append(f"{len(readings) - len(parts)} of layers")
        self.logger.log(self.level, "%s%s%s", self._prefix, _at(readings[0].step), ", ".join(parts))

    def alert(self, alert: Alert) -> None:
        """Log the alert on one line."""
        level = _LEVELS[alert.severity] if alert.state == "firing" else logging.INFO
        where = f" in {alert.layer}" if alert.layer else ""
        text = f"{_at(alert.step)}{alert.rule} {alert.state}{where}: {alert.message}"
        if alert.state == "firing" and alert.remedy:
            text += f" Remedy: {alert.remedy}"
        self.logger.log(level, "%s%s", self._prefix, _one_line(text))

    def close(self) -> None:
        """Do nothing: the logger belongs to the program."""


def _one_line(text: str) -> str:
    """A text without line breaks and other control characters, whatever layers are named."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _level(level: object) -> int:
    names = logging.getLevelNamesMapping()
    if isinstance(level, str) and level.upper() in names:
        return names[level.upper()]
    if isinstance(level, int) and not isinstance(level, bool):
        return level
    raise ArgumentError("level", f"be a number or one of {', '.join(names)}", repr(level))


def _at(step: int | None) -> str:
    return "" if step is None else f"step {step}: "


def _words(reading: Reading) -> str:
    reason = f" ({reading.reason})" if reading.reason else ""
    return f"{reading.name} {reading.value:.4g}{reason}"
