"""One JSON object a line: a file that survives a killed process and that any other program can read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading

FORMAT_VERSION = 1
_FORMAT = "hold lines that a `JsonlSink` wrote"
_RUN = '{"kind":"run"'
_FLOATS = frozenset({"value", "scale", "resolution"})


class JsonlSink:
    """Appends to a file of JSON lines.

    Each line is an object with a ``kind``: ``run`` (``run``, ``rank``, ``version`` of the file format, ``time`` in
    seconds since 1970), ``info`` (what describes the run), ``reading`` or ``alert`` (their fields; those that are None
    are left out), and at last ``end`` (``succeeded``, ``time``). A run line precedes what its run wrote. The JSON is
    strict: NaN is written as ``null``, the infinities as ``"inf"`` and ``"-inf"``. Every write is flushed, so that a
    killed process loses at most the line it was writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, and create it and its directories where they do not exist.

        Args:
            path: The file. What is already in it stays.

        Raises:
            ArgumentError: `path` is empty, or no file that can be written.
        """
        self.path = _checked(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = _lacks_newline(self.path)
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ArgumentError("path", f"be a file that can be written ({error.strerror})", path) from error
        self._head: tuple[str | None, int | None] | None = None
        self._end: int | None = None
        if torn:
            self._file.write("\n")

    @classmethod
    def from_spec(cls, argument: str) -> JsonlSink:
        """Make the sink of a string such as ``"jsonl:run.jsonl"``."""
        return cls(argument)

    def bind(self, run: str, rank: int) -> None:
        """Write the run line.

        Raises:
            ArgumentError: The file cannot be written, as on a full disk.
            GradmonError: The sink is closed.
        """
        self._head = None
        try:
            self._append(_header(run, rank))
        except OSError as error:
            raise ArgumentError("path", f"be a file that can be written ({error.strerror})", self.path) from error
        self._head = (run, rank)

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Append the line that describes the run, and flush.

        Raises:
            GradmonError: The sink is closed.
        """
        told = {name: _number(value) if isinstance(value, float) else value for name, value in info.items()}
        self._append(_line("info", {"info": told}))

    def finish(self, succeeded: bool) -> None:
        """Append the line that says how the run ended, and flush.

        Raises:
            GradmonError: The sink is closed.
        """
        self._append(_line("end", {"succeeded": succeeded, "time": time.time()}))

    def write(self, readings: Sequence[Reading]) -> None:
        """Append one line a reading, and flush.

        Raises:
            GradmonError: The sink is closed.
        """
        self._append("".join(_line("reading", reading._asdict()) for reading in readings))

    def alert(self, alert: Alert) -> None:
        """Append one line, and flush.

        Raises:
            GradmonError: The sink is closed.
        """
        self._append(_line("alert", alert._asdict()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, text: str) -> None:
        if self._file.closed:
            raise GradmonError(f"The sink of {self.path} is closed.")
        with _alone(self._file.fileno()):
            size = os.fstat(self._file.fileno()).st_size
            if self._end is None and self._head is None and not text.startswith(_RUN):
                self._head = (None, None)
                text = _header(None, None) + text
            elif self._end not in (None, size) and self._head is not None:
                # Another monitor or rank writes to the file as well: what follows is not of its run.
                text = _header(*self._head, continued=True) + text
            self._file.write(text)
            self._file.flush()
            self._end = os.fstat(self._file.fileno()).st_size


class Recording(NamedTuple):
    """What a file of JSON lines holds.

    Attributes:
        readings: In the order in which they were written.
        alerts: In the order in which they were written.
    """

    readings: list[Reading]
    alerts: list[Alert]


class RunLog(NamedTuple):
    """What a file of JSON lines holds of one run, also if it was interrupted and went on.

    Attributes:
        run: Its name; that of the file where it has none.
        rank: The process's rank.
        time: When it began, in seconds since 1970.
        info: What describes it; numbers, strings and booleans.
        readings: In the order in which they were written.
        alerts: In the order in which they were written.
        succeeded: Whether it came to its end by itself; None where it was killed, or still runs.
        ended: When it ended, in seconds since 1970; None where nothing says so.
    """

    run: str
    rank: int
    time: float
    info: dict[str, Any]
    readings: list[Reading]
    alerts: list[Alert]
    succeeded: bool | None
    ended: float | None


def read_jsonl(path: str | os.PathLike[str]) -> Recording:
    """Read back what a `JsonlSink` wrote, whatever runs it is from.

    A line that a killed process left unfinished is skipped, be it the last one or followed by the next run's. Lines of
    a kind that is not known here are skipped as well.

    Args:
        path: The file.

    Returns:
        The readings and the alerts, as a pair.

    Raises:
        ArgumentError: `path` is empty, cannot be read, holds other lines than a `JsonlSink` writes, or was written in
            a newer version of the format.
    """
    recording = Recording([], [])
    for _, readings, alerts in _parts(path):
        recording.readings.extend(readings)
        recording.alerts.extend(alerts)
    return recording


def read_runs(path: str | os.PathLike[str]) -> list[RunLog]:
    """Read back what a `JsonlSink` wrote, run by run and rank by rank, in the order in which they began.

    A run that was resumed has several run lines: what follows them is put together. Unfinished lines and lines of an
    unknown kind are skipped, as by `read_jsonl`.

    Args:
        path: The file.

    Returns:
        The runs.

    Raises:
        ArgumentError: As for `read_jsonl`.
    """
    found: dict[tuple[str, int], RunLog] = {}
    for head, readings, alerts in _parts(path):
        key = (str(head.get("run") or Path(path).stem), int(head.get("rank", 0)))
        log = found.get(key) or RunLog(*key, float(head.get("time", 0.0)), {}, [], [], None, None)
        info: dict[str, Any] = {**log.info, **head.get("info", {})}
        end: dict[str, Any] = head.get("end", {})
        log = log._replace(info=info, succeeded=end.get("succeeded"), ended=end.get("time"))
        _rewind(log, readings, alerts)
        log.readings.extend(readings)
        log.alerts.extend(alerts)
        found[key] = log
    return list(found.values())


def _rewind(log: RunLog, newer: Sequence[Reading], alerts: Sequence[Alert]) -> None:
    """Forget what a run that goes on from an earlier step had said of later ones: that part has been given up."""
    steps = [reading.step for reading in newer if reading.step is not None]
    if steps:
        first = min(steps)
        # Its first may only be what had waited for the next batch: the rest of that step was not made anew.
        anew = {(reading.name, reading.layer) for reading in newer if reading.step == first}
        log.readings[:] = [
            reading
            for reading in log.readings
            if reading.step is None
            or reading.step < first
            or (reading.step == first and (reading.name, reading.layer) not in anew)
        ]
        log.alerts[:] = standing(log.alerts, first, alerts)


def standing(alerts: Iterable[Alert], first: int, newer: Iterable[Alert]) -> list[Alert]:
    """What a run that goes on from an earlier step leaves of the alerts before it was interrupted.

    Args:
        alerts: Those before, in their order.
        first: The step of its first reading since; it may have been looked at in part before the run was saved.
        newer: The alerts since, which begin with those that fired when the run was saved.

    Returns:
        Those before that step, and the ends of such as no longer fired when it was saved.
    """
    fired = [alert for alert in newer if alert.state == "firing" and (alert.step is None or alert.step <= first)]
    still = {(alert.rule, alert.layer) for alert in fired}
    firing, found = set[tuple[str, str | None]](), list[Alert]()
    for alert in alerts:
        key = (alert.rule, alert.layer)
        ends = alert.state == "resolved" and key in firing and key not in still
        if alert.step is None or alert.step < first or ends:
            found.append(alert)
            (firing.add if alert.state == "firing" else firing.discard)(key)
    return found


_Part = tuple[dict[str, Any], list[Reading], list[Alert]]
"""A run line with what was said of the run under ``info`` and ``end``, and what follows it."""


def _parts(path: str | os.PathLike[str]) -> list[_Part]:
    """What follows each run line.

    Raises:
        ArgumentError: As for `read_jsonl`.
    """
    parts: list[_Part] = []
    part: _Part | None = None
    try:
        # Not splitlines(): that also splits at characters which a line of JSON may hold.
        lines = _checked(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ArgumentError("path", f"be a file that can be read ({error.strerror})", path) from error
    for number, fields in _objects(lines, path):
        kind = fields.pop("kind", None)
        try:
            newer = kind == "run" and fields["version"] > FORMAT_VERSION
            if kind == "run":
                fields["rank"], fields["time"] = int(fields.get("rank") or 0), float(fields.get("time") or 0.0)
            begun = [part for part in parts if kind == "run" and _same(part[0], fields)]
            if begun and fields.get("continued"):
                part = begun[-1]
            elif kind == "run" or (part is None and kind in ("info", "reading", "alert", "end")):
                part = (fields if kind == "run" else {}, [], [])
                parts.append(part)
            if part is None:
                continue
            if kind == "reading":
                part[1].append(Reading(**decoded(fields, Reading._fields)))
            elif kind == "alert":
                optional: dict[str, Any] = {"step": None, "layer": None}
                part[2].append(Alert(**(optional | decoded(fields, Alert._fields))))
            elif kind == "info":
                part[0]["info"] = dict(fields["info"])
            elif kind == "end":
                part[0]["end"] = {"succeeded": bool(fields["succeeded"]), "time": float(fields["time"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError("path", _FORMAT, f"line {number} of {os.fspath(path)}") from error
        if newer:
            must = f"be written in version {FORMAT_VERSION} of the file format or an older one"
            raise ArgumentError("path", must, f"version {fields['version']} in {os.fspath(path)}")
    return parts


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two run lines name the same run and rank."""
    return (one.get("run"), one.get("rank", 0)) == (other.get("run"), other.get("rank", 0))


def _checked(path: object) -> Path:
    if isinstance(path, str | os.PathLike) and (name := os.fspath(cast("str | os.PathLike[str]", path))):
        return Path(name)
    raise ArgumentError("path", "be the path of a file", f"{path!r}")


def _lacks_newline(path: Path) -> bool:
    """Whether a killed process left its last line unfinished."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _header(run: str | None, rank: int | None, *, continued: bool = False) -> str:
    more = {"continued": True} if continued else {}
    return _line("run", {"run": run, "rank": rank, "version": FORMAT_VERSION, "time": time.time(), **more})


@contextlib.contextmanager
def _alone(file: int) -> Generator[None, None, None]:
    """Keep other processes from appending meanwhile, where the system can do that."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _line(kind: str, fields: Mapping[str, Any]) -> str:
    told = {key: value for key, value in fields.items() if value is not None and value != ()}
    encoded = {key: _number(value) if key in _FLOATS else value for key, value in told.items()}
    return json.dumps({"kind": kind, **encoded}, allow_nan=False, separators=(",", ":")) + "\n"


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return str(float(value)) if math.isinf(value) else float(value)


def decoded(fields: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The known ones of a line's fields, as a `Reading` or an `Alert` holds them.

    Raises:
        TypeError: A field is of another kind.
        ValueError: A field is no number where it must be one.
    """
    found = {key: fields[key] for key in known if key in fields}
    for key in _FLOATS & found.keys():
        found[key] = math.nan if found[key] is None else float(found[key])
    if not isinstance(found.get("step", 0), int):
        raise TypeError("a step is a whole number")
    if "blame" in found:
        found["blame"] = tuple(str(layer) for layer in found["blame"])
    return found


def _objects(lines: Sequence[str], path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of the lines, with the lines' numbers from 1.

    An unfinished line can only be the last one that its process wrote, so what follows it must be a run line.

    Raises:
        ArgumentError: Something else follows.
    """
    unfinished: int | None = None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            unfinished = unfinished or number
            continue
        fields = cast("dict[str, Any]", fields)
        if unfinished and fields.get("kind") != "run":
            raise ArgumentError("path", _FORMAT, f"line {unfinished} of {os.fspath(path)}")
        unfinished = None
        yield number, fields
