"""Readings for Prometheus by way of a Pushgateway, for jobs that are too short to be scraped."""

from __future__ import annotations

import http.client
import math
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import delete_from_gateway, push_to_gateway
from prometheus_client.exposition import default_handler

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._prometheus_registry import Registry
from gradmon_integrations.sinks._prometheus_run import Run, check


class PushgatewaySink:
    """Pushes the newest readings to a Pushgateway, from which Prometheus scrapes them.

    The series are those of `PrometheusSink`. They are pushed as a group of their own, with the grouping key ``run`` and
    ``rank``; each push replaces what the group held. Prometheus has to scrape the gateway with ``honor_labels: true``.
    A gateway keeps what it has until it is told otherwise, also of a run that was killed:
    ``gradmon_last_probe_timestamp_seconds`` tells how old it is.

    A push that fails raises from the method that wanted it. One that was put off, because the one before was less than
    `interval` ago, is made from a thread, and raises from the next call.
    """

    def __init__(
        self,
        address: str,
        *,
        job: str = "gradmon",
        run: str | None = None,
        rank: int = 0,
        interval: float = 15.0,
        timeout: float = 5.0,
        layers: int = 64,
        delete_on_finish: bool = False,
    ) -> None:
        """Make the sink; the gateway is first spoken to when there are readings.

        Args:
            address: Host and port of the gateway, or its URL.
            job: The label ``job``.
            run: The label; None means the name of the monitor's run.
            rank: The label; like `run` it is the monitor's unless `run` is given.
            interval: How many seconds are between two pushes at least.
            timeout: How many seconds the gateway may take to accept a connection, and to answer.
            layers: How many layers of a metric have a series of their own.
            delete_on_finish: Whether the group is deleted from the gateway when the training has come to its end. That
                of a training that failed is left there, to be looked at.

        Raises:
            ArgumentError: An argument is not what it must be.
        """
        if not _is_gateway(address):
            raise ArgumentError(
                "address", "be host and port, such as 'localhost:9091', or a URL without a user", repr(address)
            )
        if not job:
            raise ArgumentError("job", "be a name", repr(job))
        if not 0 <= interval < math.inf:
            raise ArgumentError("interval", "be a number of seconds that is not negative", interval)
        if not 0 < timeout < math.inf:
            raise ArgumentError("timeout", "be a positive number of seconds", timeout)
        check(run, rank, layers)
        self._address, self._job, self._interval, self._timeout = address, job, interval, timeout
        self._delete_on_finish = delete_on_finish
        self._registry = Registry()
        self._run = Run(self._registry, run, rank, layers)
        self._lock = threading.Lock()
        self._next = -math.inf
        self._timer: threading.Timer | None = None
        self._late_error: GradmonError | None = None
        self._delete = False
        self._closed = False

    @classmethod
    def from_spec(cls, argument: str) -> PushgatewaySink:
        """Make the sink of a string such as ``"pushgateway:localhost:9091"``."""
        return cls(argument)

    def bind(self, run: str, rank: int) -> None:
        """Take over the monitor's labels, unless `run` was given, and begin; nothing is pushed yet.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.bind(run, rank)

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Show what describes the run as labels of ``gradmon_run_info``, from the next push on.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.describe(info)

    def write(self, readings: Sequence[Reading]) -> None:
        """Set one series a reading, and push.

        Raises:
            GradmonError: The sink is closed, or the gateway did not take what it got.
        """
        self._check_open()
        self._run.write(readings)
        self._changed()

    def alert(self, alert: Alert) -> None:
        """Count the alert, and push.

        Raises:
            GradmonError: The sink is closed, or the gateway did not take what it got.
        """
        self._check_open()
        self._run.alert(alert)
        self._changed()

    def finish(self, succeeded: bool) -> None:
        """Say that the run came to its end, if it did; `close` pushes it.

        Raises:
            GradmonError: The sink is closed.
        """
        self._check_open()
        self._run.finish(succeeded)
        self._delete = succeeded and self._delete_on_finish

    def close(self) -> None:
        """Push once more, if there is anything to push, or delete what was pushed.

        Raises:
            GradmonError: The gateway did not take what it got.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self._delete:
                self._send(lambda key: delete_from_gateway(self._address, self._job, key, self._timeout, _quoted))
            elif self._run.begun:
                self._push()

    def _changed(self) -> None:
        """Push, now or when it is time.

        Raises:
            GradmonError: The gateway did not take what it got, now or the last time.
        """
        with self._lock:
            error, self._late_error = self._late_error, None
            wait = self._next - time.monotonic()
            if wait <= 0:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                self._push()
            elif self._timer is None:
                # Without it an alert would wait for the next probe, however far away that is.
                self._timer = threading.Timer(wait, self._push_late)
                self._timer.daemon = True
                self._timer.start()
        if error is not None:
            raise error

    def _push_late(self) -> None:
        with self._lock:
            if self._timer is None or self._closed:  # somebody was faster
                return
            self._timer = None
            try:
                self._push()
            except GradmonError as error:
                self._late_error = error

    def _push(self) -> None:
        # A gateway that is not there is not asked more often than one that is.
        self._next = time.monotonic() + self._interval
        collectors = self._registry.collectors
        self._send(lambda key: push_to_gateway(self._address, self._job, collectors, key, self._timeout, _quoted))

    def _send(self, send: Callable[[dict[str, str]], None]) -> None:
        """Speak to the gateway about the run's group.

        Raises:
            GradmonError: It does not answer, or not as it should.
        """
        try:
            send(dict(zip(("run", "rank"), self._run.labels, strict=True)))
        except (OSError, http.client.HTTPException) as error:
            raise GradmonError(f"The Pushgateway at {self._address} failed: {_reason(error)}") from error

    def _check_open(self) -> None:
        if self._closed:
            raise GradmonError(f"The sink of the Pushgateway at {self._address} is closed.")


def _is_gateway(address: object) -> bool:
    if not isinstance(address, str):
        return False
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        # The client library cannot log in.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.username
    except ValueError:
        return False


def _quoted(url: str, *request: Any, **options: Any) -> Callable[[], None]:
    """Say what the client library wants to say, and quote blanks in names as the gateway expects it."""
    # Older versions of the library write them as plus signs, which a gateway takes for what they are.
    address, path, names = url.partition("/metrics/")
    return default_handler(address + path + names.replace("+", "%20"), *request, **options)


def _reason(error: Exception) -> str:
    """What went wrong, in words: the gateway says in the body why it refuses something."""
    if isinstance(error, urllib.error.HTTPError):
        with error:
            return f"{error} {error.read(300).decode(errors='replace').strip()}".strip()
    return str(error) or type(error).__name__
