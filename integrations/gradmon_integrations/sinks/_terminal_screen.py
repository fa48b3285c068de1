"""The bottom of a terminal, which panels share with whatever else the program prints.

The panel is a guest: the streams' `write` is wrapped, so that the panel is taken away before anybody else's text
arrives, and drawn again below it as soon as a line is complete and nobody else draws. The streams themselves stay in
their place, so that bars and logging handlers that hold them are heard as well, and the cursor is never hidden: a
program that is killed leaves a terminal that can be used.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TextIO

from rich.cells import cell_len

from gradmon_integrations.sinks import _terminal_displays as displays

_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-Z\\-_]|[ -/]*[0-~])")
_UPWARDS = re.compile(r"\x1b\[[0-9]*[AF]")
_LONGEST = 4096


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        text: What is written, with colours, without a line break.
        cells: How wide it is.
    """

    text: str
    cells: int


class Unfinished:
    """The line in which the cursor stands.

    Attributes:
        open: Whether there is something, such as a bar that somebody draws by hand.
        climbs: Whether it belongs to a display of several lines.
    """

    def __init__(self) -> None:
        self.open = self.climbs = False
        self._text = ""

    def follow(self, text: str) -> None:
        """Take note of what was written."""
        _, broken, last = text.rpartition("\n")
        self._text = (last if broken else self._text + last)[-_LONGEST:]
        found = _ESCAPE.sub("", self.visible)
        # At its beginning, a line of blanks is one that was wiped; further on, one that begins with an indentation.
        self.open = bool(found.strip() if self._text.endswith("\r") else found)
        self.climbs = self.open and (self.climbs or bool(_UPWARDS.search(text)))

    @property
    def visible(self) -> str:
        """What can be read there, as it was written."""
        return self._text.rstrip("\r").rpartition("\r")[2]

    def again(self, width: int, height: int) -> tuple[str, str]:
        """What has to be written before lines that go above, and after them."""
        shown = self.visible
        after = shown + ("\r" if self._text.endswith("\r") else "")
        above = max(0, cell_len(_ESCAPE.sub("", shown)) - 1) // width  # rows, where it is longer than one
        if above >= height:
            return "\n", after
        return f"\r\x1b[{above}A\x1b[J" if above else "\r\x1b[K", after


class Screen:
    """Draws the panels of all its owners at the bottom of one terminal.

    Args:
        out: The stream on which it draws; a terminal.
        others: Other streams, of which those are heard that lead to a terminal.
    """

    def __init__(self, out: TextIO, others: Sequence[TextIO]) -> None:
        self.out = out
        self._lock = threading.RLock()
        self.pid = os.getpid()
        self._panels: dict[object, list[Line]] = {}
        self._shown: list[Line] = []
        self._line = Unfinished()
        self._hooks: list[tuple[TextIO, Callable[[str], int], Callable[[str], int] | None]] = []
        self._gone = False
        self._write = out.write
        for stream in dict.fromkeys([out, *others]):
            if stream is out or stream.isatty():
                self._hook(stream)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self.out.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        return columns or 80, rows or 24

    @property
    def free(self) -> bool:
        """Whether nobody else draws, so that a panel can be shown."""
        return not self._gone and not self._line.open and not displays.busy()

    def show(self, owner: object, lines: Sequence[Line]) -> None:
        """Show or replace the panel of an owner; while somebody else draws it waits."""
        with self._lock:
            self._panels[owner] = list(lines)
            if self.free:
                self._draw()

    def hide(self, owner: object) -> None:
        """Take the panel of an owner away."""
        with self._lock:
            if self._panels.pop(owner, None) is not None:
                self._erase()
                if self.free:
                    self._draw()

    def print(self, text: str, *, anyway: bool = False) -> bool:
        """Print lines that stay: above the panels, above bars, and above an unfinished line.

        Args:
            text: The lines.
            anyway: Whether to print them below a display above which nothing can be printed.

        Returns:
            False if there is a display of several lines that is not known, above which nothing can be printed.
        """
        if displays.print_above(text):  # without the lock: other libraries have theirs, and call `_foreign` inside
            return True
        with self._lock:
            if self._line.climbs and not anyway:
                return False
            self._erase()
            if self._line.climbs:
                before, after = "\n", ""
                self._line = Unfinished()
            else:
                before, after = self._line.again(*self.size) if self._line.open else ("", "")
            self._put(f"{before}{text}\n{after}")
            if self.free:
                self._draw()
        return True

    def close(self) -> None:
        """Leave the streams as they were found."""
        with self._lock:
            self._erase()
            self._panels.clear()
            for stream, hook, before in self._hooks:
                # Somebody who wrapped it later keeps what he has: the hook only passes on from now on.
                if stream.__dict__.get("write") is not hook:
                    continue
                if before is None:
                    del stream.__dict__["write"]
                else:
                    stream.__dict__["write"] = before
            self._hooks.clear()

    def _hook(self, stream: TextIO) -> None:
        before = stream.__dict__.get("write")
        hook = partial(self._foreign, stream.write)
        stream.__dict__["write"] = hook
        self._hooks.append((stream, hook, before))

    def _foreign(self, write: Callable[[str], int], text: str) -> int:
        """What others write passes here."""
        # In a forked process there is no panel, and the lock may be held for ever.
        if not text or not self._hooks or os.getpid() != self.pid:
            return write(text)
        with self._lock:
            self._erase()
            written = write(text)
            self._line.follow(text)
            if self._panels and self.free:
                self._draw()
        return written

    def _draw(self) -> None:
        if not self._panels and not self._shown:
            return
        lines = [line for panel in self._panels.values() for line in panel][-(self.size[1] - 1) :]
        up = self._upwards()
        # Noted afterwards: an interrupt in between leaves a copy of the panel behind, and never takes away too much.
        if self._put(up + "".join(f"{line.text}\x1b[K\n" for line in lines) + ("\x1b[J" if up else "")):
            self._shown = lines

    def _erase(self) -> None:
        if self._shown:
            up = self._upwards()
            self._shown = []
            self._put(f"{up}\x1b[J")

    def _upwards(self) -> str:
        """From below the panel to its beginning; a terminal that became narrower has broken its lines anew."""
        if not self._shown:
            return ""
        width, height = self.size
        rows = sum(max(1, -(-line.cells // width)) for line in self._shown)
        return f"\r\x1b[{min(rows, height - 1)}A"

    def _put(self, text: str) -> bool:
        """Write; whether there is still somewhere to write to."""
        try:
            self._write(encodable(text, self.out))
            self.out.flush()
        except (OSError, ValueError):
            # The terminal is gone, or the stream closed. Whoever prints next must not hear of it from here.
            self._gone, self._shown = True, []
        return not self._gone


_SCREENS: dict[int, tuple[Screen, set[object]]] = {}


def borrow(owner: object, out: TextIO) -> Screen:
    """The screen of a terminal, the same for all who draw on its stream."""
    # That of a process from which this one was forked is not its own.
    if id(out) not in _SCREENS or _SCREENS[id(out)][0].pid != os.getpid():
        # What rich has put in the place of a stream writes to the stream itself in the end.
        streams = [getattr(stream, "rich_proxied_file", stream) for stream in (sys.stdout, sys.stderr) if stream]
        _SCREENS[id(out)] = (Screen(out, streams), set())
    screen, owners = _SCREENS[id(out)]
    owners.add(owner)
    return screen


def give_back(owner: object, screen: Screen) -> None:
    """The owner is done; the last one closes the screen."""
    screen.hide(owner)
    _, owners = _SCREENS.get(id(screen.out), (screen, set()))
    owners.discard(owner)
    if not owners:
        _SCREENS.pop(id(screen.out), None)
        screen.close()


def encodable(text: str, stream: TextIO) -> str:
    """The text with a question mark for each character that the stream does not know."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
