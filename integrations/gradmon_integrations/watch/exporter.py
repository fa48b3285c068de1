"""Runs from what `PrometheusSink` serves; how they went before the first look is not known there."""

from __future__ import annotations

import base64
import http.client
import math
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gradmon._errors import ArgumentError
from gradmon._reading import Alert, Reading, Severity
from gradmon.alerts import default_rules
from gradmon_integrations.display.states import metric_of
from gradmon_integrations.watch.runs import SourceError, Watched

_PREFIX = "gradmon_"
_COUNTS = {f"{_PREFIX}{name}_total": name for name in ("monitor_failures", "sink_errors", "sink_dropped")}
_TIMEOUT = 5.0


class ExporterSource:
    """All runs that one address serves.

    Args:
        url: The address; ``/metrics`` is added where there is no path.

    Raises:
        ArgumentError: It is no address of HTTP.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError("SOURCE", "be a file, a directory or an address such as http://127.0.0.1:9464", url)
        self._headers = {"Accept": "text/plain; version=0.0.4"}
        host = parts.netloc
        if "@" in host:
            login, _, host = host.rpartition("@")
            self._headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        path = "/metrics" if parts.path in ("", "/") else parts.path
        self._url = urlunsplit((parts.scheme, host, path, parts.query, ""))
        self._runs: dict[tuple[str, int], Watched] = {}

    def read(self) -> Sequence[Watched]:
        """All runs, with what is new; those that were served before stay, and say that they are out of reach.

        Raises:
            SourceError: Nothing was ever had from there.
        """
        try:
            served = list(self._fetch())
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            if not self._runs:
                raise SourceError(f"{self._url} cannot be read: {reason}") from error
            for run in self._runs.values():
                run.lost = reason
            return list(self._runs.values())
        grouped: dict[tuple[str, int], list[Sample]] = {}
        for sample in served:
            if sample.name.startswith(_PREFIX) and "run" in sample.labels and sample.labels.get("rank", "0").isdigit():
                grouped.setdefault((sample.labels["run"], int(sample.labels.get("rank", 0))), []).append(sample)
        for key, samples in grouped.items():
            _update(self._runs.setdefault(key, Watched(*key)), samples)
        if not self._runs:
            raise SourceError(f"{self._url} serves no run of gradmon.")
        for key in self._runs.keys() - grouped.keys():
            self._runs[key].lost = "no longer served"
        return list(self._runs.values())

    def _fetch(self) -> Iterator[Sample]:
        request = urllib.request.Request(self._url, headers=self._headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            text = response.read().decode("utf-8", "replace")
        for family in text_string_to_metric_families(text):
            yield from family.samples


def _update(run: Watched, samples: Sequence[Sample]) -> None:
    """Take what is served of one run."""
    single = {sample.name.removeprefix(_PREFIX): sample.value for sample in samples if len(sample.labels) <= 2}
    step = int(single["last_step"]) if math.isfinite(single.get("last_step", math.nan)) else None
    values = {name: value for name, value in single.items() if _is_reading(name)}
    for sample in samples:
        if sample.name in _COUNTS:
            values[_COUNTS[sample.name]] = sample.value
        elif sample.name == f"{_PREFIX}run_info":
            run.info = {key: text for key, text in sample.labels.items() if text and key not in ("run", "rank")}
    run.lost = ""
    began = single.get("run_start_timestamp_seconds")
    run.resumed, run.began = began != run.began, began
    run.newest = single.get("last_probe_timestamp_seconds") or run.began
    finished = single.get("run_finished") == 1
    run.succeeded, run.ended = (True, run.newest) if finished else (None, None)
    readings = [Reading(name, value, step) for name, value in values.items()]
    if step is not None and (step != run.step or not run.history.series):
        run.take(readings)
    elif step is not None:
        run.renew(readings)  # what compares with the next batch comes later, under the same step
    firing = {name.removeprefix("alert_") for name, value in single.items() if name.startswith("alert_") and value > 0}
    known = {alert.rule for alert in run.history.active}
    # Of an alert that fires at the first look nobody knows since when.
    since = step if run.history.writes > 1 else None
    run.take([], [_alert(rule, "firing", values, since) for rule in sorted(firing - known)])
    run.take([], [_alert(rule, "resolved", values, step) for rule in sorted(known - firing)])


def _is_reading(name: str) -> bool:
    own = ("last_", "run_", "alert_", "alerts_", "layer_", "probe_duration_", "dropped_series")
    return not name.startswith(own) and not name.endswith(("_total", "_created", "_bucket", "_sum", "_count"))


@cache
def _rules() -> Mapping[str, object]:
    return {rule.name: rule for rule in default_rules()}


def _alert(rule: str, state: str, values: Mapping[str, float], step: int | None) -> Alert:
    """An alert of which only the name is served; severity and remedy are those of the default rule of that name."""
    known = _rules().get(rule)
    severity: Severity = getattr(known, "severity", "warning")
    remedy = getattr(known, "remedy", "")
    metric = metric_of(rule)
    value = values.get(metric or "", math.nan)
    if callable(remedy):
        remedy = remedy(Reading(metric or rule, value, step), values)
    return Alert(rule, severity, "firing" if state == "firing" else "resolved", value, step, None, "", str(remedy))
