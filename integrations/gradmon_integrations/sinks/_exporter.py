"""The part of the Prometheus sink that several runs of one process share: a registry and the server that shows it."""

from __future__ import annotations

import errno
import re
import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from gradmon._errors import ArgumentError

RUN = ("run", "rank")
_PREFIX = "gradmon_"


class Exporter:
    """A registry of its own, its families of series, and an HTTP server that stops when the last user lets go.

    Attributes:
        lock: Held by the sinks while they touch what they share.
        port: The port that the server listens on.
        alerts_firing: How many alerts are active.
        alerts_total: How often an alert began to fire.
        last_probe: When readings came last.
        last_step: The step of the last readings.
    """

    def __init__(self, port: int, address: str) -> None:
        """Start to serve.

        Raises:
            ArgumentError: `port` is taken or not allowed, or `address` is not this machine's.
        """
        self.lock = threading.RLock()
        self._registry = CollectorRegistry()
        self._families: dict[tuple[str, bool], Gauge] = {}
        # "alerts" and "alerts_created" are what the counter registers beside its own name.
        self._taken = {_PREFIX + "alerts", _PREFIX + "alerts_created"}
        self.alerts_firing = self._gauge("alerts_firing", "Alerts that are firing now.", RUN)
        self.last_probe = self._gauge("last_probe_timestamp_seconds", "When gradmon last measured, as Unix time.", RUN)
        self.last_step = self._gauge("last_step", "The optimizer step that gradmon last measured.", RUN)
        self.alerts_total = Counter(
            self._claim("alerts_total"),
            "How often an alert began to fire.",
            RUN,
            registry=self._registry,
        )
        self._users = 0
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except OSError as error:
            raise ArgumentError(*_explained(error, port, address)) from error
        self.port = int(self._server.server_port)

    def family(self, name: str, meaning: str, *, layered: bool) -> Gauge:
        """The gauge of a metric, made when it is first asked for."""
        with self.lock:
            key = (name, layered)
            if key not in self._families:
                if layered:
                    family = self._gauge(f"layer_{name}", f"{meaning or name} (one layer)", (*RUN, "layer"))
                else:
                    family = self._gauge(name, meaning or name, RUN)
                self._families[key] = family
            return self._families[key]

    def acquire(self) -> None:
        """Count one more user."""
        with self.lock:
            self._users += 1

    def release(self) -> None:
        """Count one user less; without users, stop the server and free its port."""
        with self.lock:
            self._users -= 1
            if self._users:
                return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(self._claim(name), text, labels, registry=self._registry)

    def _claim(self, name: str) -> str:
        """A name that Prometheus accepts and that nothing in this registry has yet."""
        full = _PREFIX + re.sub(r"[^a-zA-Z0-9_:]", "_", name)
        while full in self._taken:
            full += "_"
        self._taken.add(full)
        return full


def _explained(error: OSError, port: int, address: str) -> tuple[str, str, object]:
    """Which argument is to blame, what it must be, and what it was."""
    if error.errno == errno.EADDRINUSE:
        return "port", f"be free on {address}; runs of one process share a port through `sibling`", port
    if error.errno == errno.EACCES:
        return "port", "be one that this user may listen on", port
    return "address", f"be an address of this machine ({error.strerror})", repr(address)
