"""Readings for Prometheus, served over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._exporter import Exporter
from gradmon_integrations.sinks._prometheus_run import Run, check
from gradmon_integrations.sinks._prometheus_tls import Path, Tls


class PrometheusSink:
    """Serves the newest readings for Prometheus to scrape.

    Every series has the labels ``run`` and ``rank``. Gauges:

    - ``gradmon_<name>``: the reading of the whole model, NaN and the infinities included;
    - ``gradmon_layer_<name>``: the readings of single layers, with the further label ``layer``. The first `layers` of
      them have a series of their own, the rest is one, ``layer="other"``: for norms the root of the sum of their
      squares, for the layers' parts of the whole their sum, for ``update_ratio`` the largest, for anything else NaN;
    - ``gradmon_alert_<rule>``: for how many layers, the whole model counting as one, a rule fires now;
      ``gradmon_alerts_firing``: the same over all rules;
    - ``gradmon_last_probe_timestamp_seconds``, ``gradmon_last_step``;
    - ``gradmon_run_info``: 1, with what describes the run as labels; ``gradmon_run_start_timestamp_seconds``, and
      ``gradmon_run_finished``: 0, and 1 once the training has come to its end.

    Counters: ``gradmon_readings_total``, ``gradmon_alerts_total``, which also shows alerts that came and went between
    two scrapes, ``gradmon_dropped_series_total``, ``gradmon_monitor_failures_total``, ``gradmon_sink_errors_total``,
    ``gradmon_sink_dropped_total``. A histogram: ``gradmon_probe_duration_seconds``. In the OpenMetrics format it and
    ``gradmon_readings_total`` have exemplars with the step.

    A scrape shows what was written together whole or not at all. The registry is the sink's own: what the program
    exports besides is not touched. All methods may be called from any thread.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        address: str = "127.0.0.1",
        run: str | None = None,
        rank: int = 0,
        layers: int = 64,
        linger: float = 20.0,
        certfile: Path | None = None,
        keyfile: Path | None = None,
        client_cafile: Path | None = None,
        client_capath: Path | None = None,
        client_auth_required: bool = False,
    ) -> None:
        """Start to serve.

        Args:
            port: The port; 0 takes a free one, which `port` and `url` then tell.
            address: Where to listen; the default is reachable from this machine only, ``"0.0.0.0"`` from anywhere.
            run: The label; None means the name of the monitor's run.
            rank: The label; like `run` it is the monitor's unless `run` is given.
            layers: How many layers of a metric have a series of their own.
            linger: How many seconds `close` waits at most until Prometheus has seen how a run ended. It does not wait
                where the run was not said to have ended, nor where nobody has scraped within the last five minutes.
                The default is longer than the usual interval of 15 seconds.
            certfile: The server's certificate, in PEM: the sink then speaks TLS.
            keyfile: Its key, without a password.
            client_cafile: The certificates of the authorities whose clients are let in.
            client_capath: A directory of such certificates.
            client_auth_required: Whether a client must have a certificate.

        Raises:
            ArgumentError: `port` is not in [0, 65535], is taken or not allowed; `address` is not this machine's; a
                file cannot be used; or another argument is not what it must be.
        """
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
            raise ArgumentError("port", "be a whole number in [0, 65535]", repr(port))
        if not address:
            raise ArgumentError("address", "be a host name or an IP address", repr(address))
        if not 0 <= linger < float("inf"):
            raise ArgumentError("linger", "be a number of seconds that is not negative", linger)
        check(run, rank, layers)
        tls = Tls.checked(certfile, keyfile, client_cafile, client_capath, client_auth_required)
        self._join(Exporter(port, address, tls, linger), run, rank, layers)

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
        return self._exporter.url

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
        check(run, rank, self._layers)
        with self._exporter.registry.lock:
            self._check_open()
            sink = PrometheusSink.__new__(PrometheusSink)
            sink._join(self._exporter, run, rank, self._layers)
        return sink

    def bind(self, run: str, rank: int) -> None:
        """Take over the monitor's labels, unless `run` was given, and begin.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.bind(run, rank)

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Show what describes the run as labels of ``gradmon_run_info``.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.describe(info)

    def write(self, readings: Sequence[Reading]) -> None:
        """Set one series a reading.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.write(readings)

    def alert(self, alert: Alert) -> None:
        """Count the alert.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.alert(alert)

    def finish(self, succeeded: bool) -> None:
        """Show that the run came to its end, if it did, and have `close` wait until that has been scraped.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.finish(succeeded)
        self._exporter.scrapes.expect()

    def close(self) -> None:
        """Stop the server, unless a sibling still needs it; before that, wait for the last scrape: see `linger`."""
        with self._exporter.registry.lock:
            if self._closed:
                return
            self._closed = True
        self._exporter.release()

    def _join(self, exporter: Exporter, run: str | None, rank: int, layers: int) -> None:
        exporter.acquire()
        self._exporter = exporter
        self._layers = layers
        self._run = Run(exporter.registry, run, rank, layers)
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise GradmonError(f"The sink of {self.url} is closed.")
