"""Every family that gradmon shows to Prometheus, in a registry of its own."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry

from gradmon_integrations.sinks._catalogue import metric_meaning
from gradmon_integrations.sinks._prometheus_families import Family
from gradmon_integrations.sinks._prometheus_histogram import Histogram
from gradmon_integrations.sinks._prometheus_info import Info
from gradmon_integrations.sinks._prometheus_layers import layered_meaning
from gradmon_integrations.sinks._prometheus_names import RUN, metric_name

CUMULATIVE = {
    "monitor_failures": "How often something inside gradmon failed, while training went on.",
    "sink_errors": "How often a sink of gradmon failed.",
    "sink_dropped": "How many readings and alerts gradmon dropped, because a sink was too slow.",
}
"""Readings that only grow: counters, not gauges."""
_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Registry:
    """The families, shared by all runs of one export.

    Attributes:
        lock: Held by whoever touches a series.
        collectors: What the client library makes text of.
        info: What describes a run.
        started: When gradmon began to watch.
        finished: Whether the run came to its end.
        alerts_firing: How many alerts are active.
        last_probe: When readings came last.
        last_step: The step of the last readings.
        alerts_total: How often an alert began to fire.
        readings_total: How many readings there were.
        dropped_total: How many series are not shown, because there are too many layers.
        cumulative: The counters that follow a reading, by its name.
        probe_duration: How long probes took.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.collectors = CollectorRegistry()
        self._readings: dict[tuple[str, bool], Family] = {}
        self._alerts: dict[str, Family] = {}
        self._taken = set[str]()
        self.info = Info(self.lock, self._claim("run", "_info"), "What describes a run; the value is always 1.")
        self.collectors.register(self.info)
        self.started = self._gauge("run_start_timestamp_seconds", "When gradmon began to watch, as Unix time.")
        self.finished = self._gauge("run_finished", "1 after the training came to its end, 0 while it runs or failed.")
        self.alerts_firing = self._gauge("alerts_firing", "Alerts that are firing now.")
        self.last_probe = self._gauge("last_probe_timestamp_seconds", "When gradmon last measured, as Unix time.")
        self.last_step = self._gauge("last_step", "The optimizer step that gradmon last measured.")
        self.alerts_total = self._counter("alerts", "How often an alert began to fire.")
        self.readings_total = self._counter("readings", "How many numbers gradmon has measured.")
        text = "How many series of layers are not shown on their own, because there are too many layers."
        self.dropped_total = self._counter("dropped_series", text)
        self.cumulative = {name: self._counter(name, text) for name, text in CUMULATIVE.items()}
        name = self._claim("probe_duration_seconds", "_bucket", "_sum", "_count")
        self.probe_duration = Histogram(self.lock, name, "How long one measurement of gradmon took.", _BOUNDS)
        self.collectors.register(self.probe_duration)

    def reading(self, name: str, *, layered: bool) -> Family:
        """The gauges of a metric, made when they are first asked for."""
        family = self._readings.get((name, layered))
        if family is None:
            meaning = metric_meaning(name) or name
            if layered:
                family = self._gauge(f"layer_{name}", layered_meaning(name, meaning), (*RUN, "layer"))
            else:
                family = self._gauge(name, meaning)
            self._readings[name, layered] = family
        return family

    def alert(self, rule: str) -> Family:
        """The gauges of an alert rule, made when they are first asked for."""
        family = self._alerts.get(rule)
        if family is None:
            text = f"For how many layers, the whole model counting as one, the alert {rule} is firing now."
            family = self._alerts[rule] = self._gauge(f"alert_{rule}", text)
        return family

    def _gauge(self, name: str, meaning: str, labels: tuple[str, ...] = RUN) -> Family:
        family = Family(self.lock, "gauge", self._claim(name), meaning, labels)
        self.collectors.register(family)
        return family

    def _counter(self, name: str, meaning: str) -> Family:
        family = Family(self.lock, "counter", self._claim(name, "_total"), meaning)
        self.collectors.register(family)
        return family

    def _claim(self, name: str, *suffixes: str) -> str:
        """A name that Prometheus accepts and that nothing here has yet, not with these suffixes either."""
        # The client library registers counters and histograms under this one as well.
        endings = ("", *suffixes, "_created")
        full = metric_name(name)
        while any(full + ending in self._taken for ending in endings):
            full += "_"
        self._taken.update(full + ending for ending in endings)
        return full
