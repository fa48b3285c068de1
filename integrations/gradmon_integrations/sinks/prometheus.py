"""Readings as Prometheus gauges, served over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import Gauge

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._catalogue import metric_meaning
from gradmon_integrations.sinks._exporter import Exporter

_UNNAMED = "default"


class PrometheusSink:
    """Serves the newest readings for Prometheus to scrape.

    Gauges, each with the labels ``run`` and ``rank``:

    - ``gradmon_<name>``: the reading of the whole model, NaN and the infinities included;
    - ``gradmon_layer_<name>``: the readings of single layers, with the further label ``layer``;
    - ``gradmon_alerts_firing``, ``gradmon_last_probe_timestamp_seconds``, ``gradmon_last_step``.

    ``gradmon_alert_<rule>`` is the number of layers (or the model as a whole) for which a rule fires now. The counter
    ``gradmon_alerts_total`` also shows alerts that came and went between two scrapes. The registry is the sink's own:
    what the program exports besides is not touched. All methods may be called from any thread.
    """

    def __init__(self, port: int = 0, *, address: str = "127.0.0.1", run: str | None = None, rank: int = 0) -> None:
        """Start to serve.

        Args:
            port: The port; 0 takes a free one, which `port` and `url` then tell.
            address: Where to listen; the default is reachable from this machine only, ``"0.0.0.0"`` from anywhere.
            run: The label; None means the name of the monitor's run.
            rank: The label; like `run` it is the monitor's unless `run` is given.

        Raises:
            ArgumentError: `port` is not in [0, 65535], is taken or not allowed; `address` is not this machine's;
                `run` is empty, or `rank` negative.
        """
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
            raise ArgumentError("port", "be a whole number in [0, 65535]", repr(port))
        if not address:
            raise ArgumentError("address", "be a host name or an IP address", repr(address))
        _check_labels(run, rank)
        self._join(Exporter(port, address), address, run, rank)

    @classmethod
    def from_spec(cls, argument: str) -> PrometheusSink:
        """Make the sink of a string: ``"prometheus:9464"``, or ``"prometheus:0.0.0.0:9464"`` with an address.

        Raises:
            ArgumentError: There is no port.
        """
        address, _, port = argument.rpartition(":")
        if not (port.isascii() and port.isdigit()):
            raise ArgumentError("port", "be given, as in 'prometheus:9464'", repr(f"prometheus:{argument}"))
        return cls(int(port), address=address.strip("[]")) if address else cls(int(port))

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._exporter.port

    @property
    def url(self) -> str:
        """Where to scrape, as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._address, self._address)
        return f"http://[{host}]:{self.port}/metrics" if ":" in host else f"http://{host}:{self.port}/metrics"

    def sibling(self, run: str, rank: int = 0) -> PrometheusSink:
        """A sink for another run of this process, on the same port.

        The series of a sink that is closed stay as they are until the server stops, which it does when the last of the
        siblings is closed.

        Args:
            run: Its label.
            rank: Its label.

        Returns:
            The sink.

        Raises:
            ArgumentError: `run` is empty, or `rank` negative.
            GradmonError: This sink is closed.
        """
        _check_labels(run, rank)
        with self._exporter.lock:
            self._check_open()
            sink = PrometheusSink.__new__(PrometheusSink)
            sink._join(self._exporter, self._address, run, rank)
        return sink

    def bind(self, run: str, rank: int) -> None:
        """Take over the monitor's labels, unless `run` was given."""
        with self._exporter.lock:
            if not self._labelled:
                self._run, self._rank = run, str(rank)
                self._children.clear()

    def write(self, readings: Sequence[Reading]) -> None:
        """Set one gauge a reading.

        Raises:
            GradmonError: The sink is closed.
        """
        with self._exporter.lock:
            self._check_open()
            for reading in readings:
                self._child(reading.name, reading.layer).set(reading.value)
            labels = (self._run, self._rank)
            self._exporter.last_probe.labels(*labels).set(time.time())
            self._exporter.alerts_firing.labels(*labels).set(len(self._firing))
            steps = [reading.step for reading in readings if reading.step is not None]
            if steps:
                self._exporter.last_step.labels(*labels).set(max(steps))

    def alert(self, alert: Alert) -> None:
        """Count the alert.

        Raises:
            GradmonError: The sink is closed.
        """
        with self._exporter.lock:
            self._check_open()
            key = (alert.rule, alert.layer)
            if alert.state == "firing":
                if key not in self._firing:
                    self._exporter.alerts_total.labels(self._run, self._rank).inc()
                self._firing.add(key)
            else:
                self._firing.discard(key)
            self._exporter.alerts_firing.labels(self._run, self._rank).set(len(self._firing))
            # By name and not by label: every series of a run has the same two labels.
            firing = sum(rule == alert.rule for rule, _ in self._firing)
            self._child(f"alert_{alert.rule}", None).set(firing)

    def close(self) -> None:
        """Stop the server, unless a sibling still needs it."""
        with self._exporter.lock:
            if self._closed:
                return
            self._closed = True
        self._exporter.release()

    def _join(self, exporter: Exporter, address: str, run: str | None, rank: int) -> None:
        exporter.acquire()
        self._exporter = exporter
        self._address = address
        self._labelled = run is not None
        self._run = run or _UNNAMED
        self._rank = str(rank)
        self._children: dict[tuple[str, str | None], Gauge] = {}
        self._firing: set[tuple[str, str | None]] = set()
        self._closed = False

    def _child(self, name: str, layer: str | None) -> Gauge:
        child = self._children.get((name, layer))
        if child is None:
            family = self._exporter.family(name, metric_meaning(name), layered=layer is not None)
            labels = (self._run, self._rank) if layer is None else (self._run, self._rank, layer)
            child = self._children[name, layer] = family.labels(*labels)
        return child

    def _check_open(self) -> None:
        if self._closed:
            raise GradmonError(f"The sink of {self.url} is closed.")


def _check_labels(run: str | None, rank: int) -> None:
    if run is not None and not run:
        raise ArgumentError("run", "be a name or None", repr(run))
    if rank < 0:
        raise ArgumentError("rank", "not be negative", rank)
