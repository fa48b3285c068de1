"""Runs from the files of `JsonlSink`, which may still be growing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading
from gradmon.sinks.jsonl import FORMAT_VERSION, decoded
from gradmon_integrations.watch.runs import SourceError, Watched

_CHUNK = 1 << 22
_HEAD = 256
_OTHERS = "hold lines that a `JsonlSink` wrote"


class FileSource:
    """All runs of a file, or of the files named ``*.jsonl`` below a directory.

    Args:
        path: The file or directory; it may come into being later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tails: dict[Path, Tail] = {}
        self._foreign: set[Path] = set()

    def read(self) -> Sequence[Watched]:
        """All runs, with what is new.

        Raises:
            SourceError: There is no file yet.
            ArgumentError: The file was not written by a `JsonlSink`, or by a newer one.
        """
        if self._path.is_dir():
            for path in sorted(self._path.rglob("*.jsonl")):
                self._tails.setdefault(path, Tail(path))
        elif self._path.exists():
            self._tails.setdefault(self._path, Tail(self._path))
        for path, tail in self._tails.items():
            if path in self._foreign:
                continue
            try:
                tail.read()
            except ArgumentError:
                if path == self._path:
                    raise
                self._foreign.add(path)  # a directory may hold other programs' files of JSON lines
        runs = [run for path, tail in self._tails.items() if path not in self._foreign for run in tail.runs.values()]
        if not runs:
            raise SourceError(self._nothing())
        return runs

    def _nothing(self) -> str:
        if not self._path.exists():
            return f"{self._path} does not exist."
        if not self._path.is_dir():
            return f"{self._path} is empty so far."
        if any(self._path.rglob("events.out.tfevents.*")):
            return (
                f"{self._path} holds event files of TensorBoard only: `tensorboard --logdir {self._path}` shows them. "
                'To watch a run, give its monitor a second sink: sinks=[..., "jsonl:runs/NAME.jsonl"].'
            )
        return f"{self._path} holds no run: no file named *.jsonl that a `JsonlSink` wrote."


class Tail:
    """Follows one file.

    Args:
        path: The file.

    Attributes:
        runs: What was found, by run and rank.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start()

    def _start(self) -> None:
        self.runs: dict[tuple[str, int], Watched] = {}
        self._run: Watched | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self._head = b""

    def read(self) -> None:
        """Read what was added; a file that was replaced or shortened is read from its beginning.

        Raises:
            ArgumentError: The file cannot be read, or was not written by a `JsonlSink`.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return  # it was moved away: what is known stays
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity or status.st_size < self._offset:
            self._start()
            self._identity = identity
        if status.st_size == self._offset:
            return
        try:
            with self._path.open("rb") as file:
                # A new file may get the number of the one that was deleted just before, and one that was emptied keeps
                # it; the first line, which has the time in it, tells.
                head = file.read(_HEAD)
                if not head.startswith(self._head):
                    self._start()
                    self._identity = identity
                self._head = head
                file.seek(self._offset)
                while chunk := file.read(_CHUNK):
                    self._offset += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    for line in lines:
                        self._take(line)
        except OSError as error:
            raise ArgumentError("path", f"be a file that can be read ({error.strerror})", self._path) from error
        if self._run is not None:
            self._run.newest = self._run.ended or status.st_mtime

    def _take(self, line: bytes) -> None:
        # A reading of a single layer is not shown, and in a long file there are many. Inside of a string the quotes
        # would be escaped.
        if not line.strip() or (b'"layer":' in line and line.startswith(b'{"kind":"reading"')):
            return
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or "kind" not in fields:
            if self._run is None:
                raise ArgumentError("path", _OTHERS, self._path)
            return  # a line that a killed process left unfinished
        kind = fields.pop("kind")
        try:
            self._add(kind, fields)
        except ArgumentError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError("path", _OTHERS, f"{line[:60]!r} in {self._path}") from error

    def _add(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "run":
            self._begin(fields)
        elif self._run is None:
            self._begin({})
        run = self._run
        assert run is not None
        if kind == "reading":
            run.take([Reading(**decoded(fields, Reading._fields))])
        elif kind == "alert":
            optional: dict[str, Any] = {"step": None, "layer": None}
            run.take([], [Alert(**(optional | decoded(fields, Alert._fields)))])
        elif kind == "info":
            run.info.update(fields["info"])
        elif kind == "end":
            run.succeeded, run.ended = bool(fields["succeeded"]), float(fields["time"])

    def _begin(self, fields: dict[str, Any]) -> None:
        if fields.get("version", 0) > FORMAT_VERSION:
            must = f"be written in version {FORMAT_VERSION} of the file format or an older one"
            raise ArgumentError("path", must, f"version {fields['version']} in {self._path}")
        time = float(fields["time"]) if "time" in fields else None
        if self._run is not None:
            self._run.newest = self._run.ended or time
        key = (fields.get("run") or self._path.stem, int(fields.get("rank") or 0))
        known = key in self.runs
        self._run = run = self.runs.setdefault(key, Watched(*key))
        if known and fields.get("continued"):  # another monitor had written to the file in between
            return
        run.resumed = known
        run.began = run.began or time
        run.newest, run.succeeded, run.ended = time, None, None
