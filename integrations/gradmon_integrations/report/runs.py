"""Which runs the files hold: each with a name of its own, its ranks together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading
from gradmon.sinks import RunLog, read_runs


@dataclass(frozen=True)
class Source:
    """A run as it was found.

    Attributes:
        label: What it is called: the run's name, and the file's where several have that name.
        files: Each rank's file and what it holds, the lowest rank first.
    """

    label: str
    files: tuple[tuple[Path, RunLog], ...]

    @property
    def path(self) -> Path:
        """The file of the rank that is shown."""
        return self.files[0][0]

    @property
    def log(self) -> RunLog:
        """What the rank that is shown wrote."""
        return self.files[0][1]

    @property
    def others(self) -> list[RunLog]:
        """What the other ranks wrote."""
        return [log for _, log in self.files[1:]]


def find_runs(paths: Sequence[Path]) -> list[Source]:
    """The runs of files, and of the ``*.jsonl`` below directories.

    Args:
        paths: Files and directories. A file that is named twice counts once.

    Returns:
        The runs in the order of their files; of each, the lowest rank is the one that is shown. Ranks in different
        files belong to one run if these lie in one directory and name the same run.

    Raises:
        ArgumentError: A path does not exist, holds no run, or is no file that a `JsonlSink` wrote.
    """
    found: list[dict[int, tuple[Path, RunLog]]] = []
    seen: set[Path] = set()
    for path in paths:
        for file, logs in _logs(path):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            for log in logs:
                home = next((one for one in reversed(found) if _belongs(log, file, one)), None)
                if home is None:
                    found.append(home := {})
                home[log.rank] = (file, log)
    ranked = [tuple(held[rank] for rank in sorted(held)) for held in found]
    return _labelled([Source(files[0][1].run, files) for files in ranked])


def _logs(path: Path) -> Iterator[tuple[Path, list[RunLog]]]:
    """The files of a path, with their runs.

    Raises:
        ArgumentError: There is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise ArgumentError("RUN", "be a JSONL file, or a directory that holds some", path)
        logs = _read(path)
        if not logs:
            empty = "which is empty" if path.stat().st_size == 0 else "which holds none"
            raise ArgumentError("RUN", "be a file that holds a run", f"{path}, {empty}")
        yield path, logs
        return
    useful = False
    for file in sorted(path.rglob("*.jsonl")):
        try:
            logs = _read(file)
        except ArgumentError as error:
            print(f"gradmon: left out: {error}", file=sys.stderr)
            continue
        if logs:
            useful = True
            yield file, logs
    if not useful:
        raise ArgumentError("RUN", "be a directory with JSONL files that hold runs", path)


def _read(path: Path) -> list[RunLog]:
    """The runs of a file.

    Raises:
        ArgumentError: It is no file that a `JsonlSink` wrote.
    """
    logs = read_runs(path)
    for log in logs:
        for one in [*log.readings, *log.alerts]:
            if not _sound(one):
                raise ArgumentError("RUN", "hold lines that a `JsonlSink` wrote", f"{path}, with {one}")
    return logs


def _sound(one: Reading | Alert) -> bool:
    """Whether its fields are of the types that they are said to be."""
    words = (one.name, one.reason) if isinstance(one, Reading) else (one.rule, one.severity, one.message, one.remedy)
    texts = all(word is None or isinstance(word, str) for word in (*words, one.layer))
    return texts and words[0] is not None and isinstance(one.step or 0, int)


def _belongs(log: RunLog, file: Path, ranks: dict[int, tuple[Path, RunLog]]) -> bool:
    """Whether a log is another rank of a run that was found before."""
    path, other = next(iter(ranks.values()))
    return log.rank not in ranks and (log.run, file.parent) == (other.run, path.parent)


def _labelled(sources: Sequence[Source]) -> list[Source]:
    """Names that tell the runs apart: with the file's stem, its path, or a number, where the run's name does not."""
    labelled = list(sources)
    for longer in (lambda one: f"{one.log.run} ({one.path.stem})", lambda one: f"{one.log.run} ({one.path})"):
        counts = Counter(source.label for source in labelled)
        labelled = [replace(one, label=longer(one)) if counts[one.label] > 1 else one for one in labelled]
    return labelled
