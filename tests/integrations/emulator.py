"""A terminal for tests: a program runs on a real pseudo-terminal, and pyte shows what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte


class Terminal:
    """A terminal in which one program runs after the other."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=5000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.status: int | None = None
        self._file = self.pid = -1

    def resize(self, columns: int, rows: int) -> None:
        """As a window manager does it: the program hears SIGWINCH."""
        self.screen.resize(rows, columns)
        self._size(columns, rows)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def start(self, scene: Callable[[], object] | list[str], environ: Mapping[str, str] | None = None) -> None:
        """Start a function in a forked process, or a program."""
        entries = {"TERM": "xterm-256color", "COLORTERM": "", **(environ or {})}
        ready, go = os.pipe()
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.close(go)
            os.read(ready, 1)
            _child(scene, entries)
        os.close(ready)
        self._size(self.screen.columns, self.screen.lines)
        os.write(go, b"x")
        os.close(go)

    def until(self, seen: Callable[[], object], timeout: float = 30) -> None:
        """Feed the terminal until something can be seen, or fail."""
        end = time.monotonic() + timeout
        while not seen():
            assert time.monotonic() < end, "not seen:\n" + self.dump()
            assert self._feed(0.1), "the program ended:\n" + self.dump()

    def settle(self, seconds: float = 0.3) -> None:
        """Feed the terminal until nothing has come for a while."""
        while self._feed(seconds, quiet=True):
            pass

    def end(self, timeout: float = 120) -> int:
        """Feed the terminal until the program ends; its exit status."""
        stop = time.monotonic() + timeout
        while self._feed(0.5):
            if time.monotonic() > stop:
                os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._file)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def send(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._file, keys)

    def play(self, scene: Callable[[], object] | list[str], environ: Mapping[str, str] | None = None) -> str:
        """Run something to its end, which must be a good one; what stands in the terminal then."""
        self.start(scene, environ)
        status = self.end()
        assert status == 0, f"exit status {status}\n{self.dump()}"
        return self.text

    @property
    def lines(self) -> list[str]:
        """What stands in the terminal, with what has scrolled out of it, without the empty rest."""
        top = ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in self.screen.history.top]
        found = [*top, *(row.rstrip() for row in self.screen.display)]
        while found and not found[-1]:
            found.pop()
        return found

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def dump(self) -> str:
        return f"{self.text}\n{'=' * self.screen.columns}\n{self.raw[-2000:]!r}"

    def _feed(self, wait: float, quiet: bool = False) -> bool:
        """Whether there was something, or (unless `quiet`) may be something still."""
        found, _, _ = select.select([self._file], [], [], wait)
        if not found:
            return not quiet
        try:
            data = os.read(self._file, 65536)
        except OSError:  # Linux: the other end is closed
            return False
        self.raw += data
        self.stream.feed(data)
        return bool(data)


class Gate:
    """Where the program waits, so that the terminal can be looked at; made before the program starts."""

    def __init__(self) -> None:
        self._wait, self._go = os.pipe()

    def wait(self) -> None:
        """Wait, on the program's side."""
        assert os.read(self._wait, 1)

    def look(self, terminal: Terminal) -> str:
        """Let the terminal come to rest, and let the program go on; what stood there."""
        terminal.settle()
        seen = terminal.text
        os.write(self._go, b"x")
        return seen


def _child(scene: Callable[[], object] | list[str], entries: Mapping[str, str]) -> None:
    """The program's side; never returns."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ.update(entries)
    if isinstance(scene, list):
        os.execv(scene[0], scene)
    status = 1
    try:
        encoding = entries.get("PYTHONIOENCODING", "utf-8")
        sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
        scene()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def python(program: Path) -> list[str]:
    """The command that runs a program with this Python."""
    return [sys.executable, str(program)]
