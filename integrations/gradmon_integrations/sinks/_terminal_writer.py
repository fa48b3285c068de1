"""When a run says what in the terminal: a panel where it can be, lines where it cannot, and neither too often."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from gradmon._errors import GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.display.alerts import line
from gradmon_integrations.display.history import History
from gradmon_integrations.display.panel import HIGHEST, clock, compact, hanging, panel
from gradmon_integrations.display.words import one_line
from gradmon_integrations.sinks._terminal_screen import Line, Screen, borrow, encodable, give_back

_REMEMBERED = 64
_HELD = 16


class Writer:
    """Says what one run has to say.

    Args:
        file: Where to; None for standard output.
        panels: Whether panels are wanted where they can be.
        refresh: The least seconds between two drawings of the panel.
        pause: The least seconds between two lines with numbers, and between two about the same rule.

    Attributes:
        run: The run's name.
        rank: The rank of this process; only 0 shows numbers.
        about: What else is known of the run.
        end: How it ended; empty while it goes on.

    Raises:
        GradmonError: There is no standard output.
    """

    def __init__(self, file: TextIO | None, *, panels: bool, refresh: float, pause: float) -> None:
        self.run, self.rank, self.about, self.end = "", 0, "", ""
        out = sys.stdout if file is None else file
        if out is None:
            raise GradmonError("The terminal sink needs a standard output, and this process has none.")
        self._out: TextIO = getattr(out, "rich_proxied_file", out)
        self._console = Console(file=self._out)
        # Another one to make strings of texts: a console writes to its file even when it is captured.
        self._painter = Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system=self._console.color_system,  # pyright: ignore[reportArgumentType]
            no_color=self._console.no_color,
            legacy_windows=False,
        )
        self._panels, self._refresh, self._pause = panels, refresh, pause
        self._history = History(most=_REMEMBERED)
        self._screen: Screen | None = None
        self._step: int | None = None
        self._drawn = self._lined = -math.inf
        self._told: dict[tuple[str, str], float] = {}
        self._held: list[Text] = []
        self._begun = self._closed = False
        self._pid = os.getpid()

    def begin(self) -> None:
        """Listen to what else is printed, from the first call on.

        Raises:
            GradmonError: It is closed.
        """
        if self._closed:
            raise GradmonError("The terminal sink is closed.")
        if self._begun:
            return
        self._begun = True
        plain = self._console.is_dumb_terminal or self._console.legacy_windows or not hasattr(self._out, "__dict__")
        if not plain and not self._out.closed and self._out.isatty():
            self._screen = borrow(self, self._out)
        atexit.register(self._at_exit)

    def write(self, readings: Sequence[Reading]) -> None:
        """Take readings, and show them if it is time."""
        self._history.write(readings)
        self._step = max((reading.step for reading in readings if reading.step is not None), default=self._step)
        if self.rank:
            return
        now = time.monotonic()
        if self._panelled:
            if now - self._drawn >= self._refresh:
                self._draw()
            return
        if self._screen is not None:
            self._screen.hide(self)  # no old numbers when the other display goes
        if now - self._lined >= self._pause:
            self._lined = now
            self._print(compact(self._head(self._step), self._history, width=self._width))

    def alert(self, alert: Alert) -> None:
        """Print a line that stays, unless there was one about the same rule just now."""
        self._history.alert(alert)
        now, what = time.monotonic(), (alert.rule, alert.state)
        if now - self._told.get(what, -math.inf) < self._pause:
            return
        self._told[what] = now
        told = Text(f"{self._head(alert.step)}  ").append_text(line(alert))
        self._print(told if self._width is None else hanging(told, self._console, self._width))
        if self._panelled and not self.rank:
            self._draw()

    def close(self) -> None:
        """Say the last, and leave the terminal as it was found."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        try:
            if self._history.writes and not self.rank:
                self._last()
        finally:
            if self._screen is not None:
                give_back(self, self._screen)

    def _at_exit(self) -> None:
        # Not in a forked process, whose terminal is its parent's; and the stream may have been closed before.
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError, ValueError):
                self.close()

    @property
    def _panelled(self) -> bool:
        """Whether a panel can be shown now."""
        return self._panels and self._screen is not None and self._screen.free

    @property
    def _width(self) -> int | None:
        """How wide a line may be: what is no terminal has none that ends."""
        return None if self._screen is None else self._screen.size[0] - 1

    def _draw(self) -> None:
        if self._screen is not None:
            self._drawn = time.monotonic()
            lines = self._panel(self._screen, min(HIGHEST, self._screen.size[1] - 2))
            self._screen.show(self, [Line(self._coloured(line), line.cell_len) for line in lines])

    def _last(self) -> None:
        """The last state, which stays."""
        if self._screen is not None and self._panelled:
            self._screen.hide(self)
            # It may scroll from here on, so that no alert has to be left out.
            self._print(Text("\n").join(self._panel(self._screen, 3 * HIGHEST)), anyway=True)
        else:
            self._print(compact(self._head(self._step), self._history, self.end, self._width), anyway=True)

    def _panel(self, screen: Screen, height: int) -> list[Text]:
        title = "  ".join(filter(None, [self._head(self._step), one_line(self.about)]))
        return panel(title, self.end or clock(), self._history, self._console, screen.size[0] - 1, height)

    def _head(self, step: int | None) -> str:
        name = f" {one_line(self.run)}" if self.run else ""
        rank = f" rank {self.rank}" if self.rank else ""
        return f"gradmon{name}{rank}" + ("" if step is None else f" step {step}")

    def _print(self, text: Text, *, anyway: bool = False) -> None:
        """Print lines; where that is impossible now, before the next ones."""
        self._held = [*self._held, text][-_HELD:]
        lines = "\n".join(map(self._coloured, self._held))
        if self._screen is None:
            self._out.write(encodable(f"{lines}\n", self._out))
            self._out.flush()
        elif not self._screen.print(lines, anyway=anyway):
            return
        self._held = []

    def _coloured(self, text: Text) -> str:
        with self._painter.capture() as captured:
            self._painter.print(text, end="", soft_wrap=True, highlight=False, markup=False, emoji=False)
        return captured.get()
