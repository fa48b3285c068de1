"""What describes a run, as the labels of a series that is always 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric, Sample

from gradmon_integrations.sinks._prometheus_families import Lock, filled
from gradmon_integrations.sinks._prometheus_names import label_names, text


class Info:
    """The family ``<name>_info``: a collector of the client library.

    Every series has the labels of all of them, empty where a run knows nothing of the kind; to Prometheus an empty
    label is the same as none.

    Args:
        lock: Held while the labels are read; whoever writes them holds it too.
        name: The name, without ``_info``.
        meaning: The help text.
    """

    def __init__(self, lock: Lock, name: str, meaning: str) -> None:
        self._lock, self._name, self._meaning = lock, name, meaning
        self._runs: dict[tuple[str, str], dict[str, str]] = {}

    def set(self, run: str, rank: str, info: Mapping[str, object]) -> None:
        """Say what describes a run; what was said of it before is forgotten."""
        told = {label: text(info[key]) for key, label in label_names(info).items()}
        self._runs[run, rank] = {"run": text(run), "rank": rank, **told}

    def describe(self) -> Iterator[Metric]:
        """The family without its samples."""
        yield filled(self._name, self._meaning, "info", ())

    def collect(self) -> Iterator[Metric]:
        """The family with its samples; nothing as long as it has none."""
        with self._lock:
            runs = list(self._runs.values())
        if runs:
            empty = dict.fromkeys((label for labels in runs for label in labels), "")
            samples = [Sample(f"{self._name}_info", {**empty, **labels}, 1.0) for labels in runs]
            yield filled(self._name, self._meaning, "info", samples)
