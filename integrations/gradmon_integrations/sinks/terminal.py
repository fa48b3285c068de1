"""The newest numbers and the active alerts in the terminal in which the training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading

Style = Literal["auto", "lines"]
_STYLES = ("auto", "lines")


class TerminalSink:
    """A panel at the bottom of the terminal, or lines where a panel cannot be.

    The panel stays below what the program prints. While somebody else draws there, be it tqdm, rich (and with them
    Lightning or transformers) or a bar drawn by hand, it makes way, and a line appears above that bar now and then, and
    at every alert. Where standard output is no terminal, or one without cursor movements (``TERM=dumb``), there are
    such lines only, without control codes; ``NO_COLOR`` takes the colours away. Processes of another rank than 0 print
    their alerts only.

    What goes past `sys.stdout` and `sys.stderr`, such as the output of a subprocess, is not seen, and may be written
    over; ``"terminal:lines"`` is for programs that do this.

    Args:
        style: ``"auto"``, or ``"lines"`` for lines on a terminal, too.
        refresh: The least seconds between two drawings of the panel.
        pause: The least seconds between two lines with numbers, and between two lines about the same alert rule.
        file: Where to; None for standard output.

    Raises:
        ArgumentError: `style` is unknown, or `refresh` or `pause` no number of seconds.
        GradmonError: rich is not installed.
    """

    immediate = True
    """A panel that lags behind the program's own lines would mislead; and it is drawn quickly and seldom."""
    logs_alerts = True
    """The alerts are told here: a log of them in the same terminal would tell them twice."""

    def __init__(
        self, style: Style = "auto", *, refresh: float = 0.25, pause: float = 10.0, file: TextIO | None = None
    ) -> None:
        if style not in _STYLES:
            raise ArgumentError("style", f"be one of {', '.join(_STYLES)}", repr(style))
        refresh, pause = _seconds("refresh", refresh), _seconds("pause", pause)
        try:
            from gradmon_integrations.sinks._terminal_writer import Writer
        except ImportError as error:
            message = f'The terminal sink needs rich ({error}). To install it: pip install "gradmon[terminal]"'
            raise GradmonError(message) from error
        self._writer = Writer(file, panels=style == "auto", refresh=refresh, pause=pause)

    @classmethod
    def from_spec(cls, argument: str) -> TerminalSink:
        """Make the sink of the string ``"terminal"``, or of ``"terminal:lines"``.

        Raises:
            ArgumentError: Something else follows the name.
        """
        if argument not in ("", *_STYLES):
            raise ArgumentError("sinks", "be 'terminal' or 'terminal:lines'", repr(f"terminal:{argument}"))
        return cls("lines" if argument == "lines" else "auto")

    def bind(self, run: str, rank: int) -> None:
        """Take the run's name for the title, and begin to listen to what else is printed.

        Raises:
            GradmonError: The sink is closed.
        """
        self._writer.begin()
        self._writer.run, self._writer.rank = run, rank

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Take model and optimizer for the title."""
        self._writer.about = " ".join(str(info[key]) for key in ("model", "optimizer") if info.get(key))

    def write(self, readings: Sequence[Reading]) -> None:
        """Show the readings, if it is time.

        Raises:
            GradmonError: The sink is closed.
        """
        self._writer.begin()
        if readings:
            self._writer.write(readings)

    def alert(self, alert: Alert) -> None:
        """Print a line that stays, unless there was one about the same rule just now; the panel counts them all.

        Raises:
            GradmonError: The sink is closed.
        """
        self._writer.begin()
        self._writer.alert(alert)

    def finish(self, succeeded: bool) -> None:
        """Say in the last panel how the run ended."""
        self._writer.end = "finished" if succeeded else "ended by an error"

    def close(self) -> None:
        """Leave the last state in the terminal, and the terminal as it was found; a second call does nothing."""
        self._writer.close()


def _seconds(name: str, value: object) -> float:
    """Accept a number of seconds.

    Raises:
        ArgumentError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ArgumentError(name, "be a number of seconds, 0 or more", repr(value))
    return float(value)
