"""What several runs of one process share to be seen by Prometheus: the families, and the server that shows them."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import make_wsgi_app, start_http_server

from gradmon._errors import ArgumentError
from gradmon_integrations.sinks._prometheus_registry import Registry
from gradmon_integrations.sinks._prometheus_scrapes import Scrapes
from gradmon_integrations.sinks._prometheus_tls import Tls

_LOG = logging.getLogger("gradmon")


class Exporter:
    """A registry of its own, and an HTTP server that stops when the last user lets go.

    Args:
        port: The port; 0 takes a free one.
        address: Where to listen.
        tls: How to be known, and to know clients.
        linger: How many seconds to wait at most, in the end, for what has not been scraped yet.

    Attributes:
        registry: The families.
        scrapes: Who has seen what.
        port: The port that the server listens on.
        url: Where to scrape, as seen from this machine.

    Raises:
        ArgumentError: `port` is taken or not allowed, or `address` is not this machine's.
    """

    def __init__(self, port: int, address: str, tls: Tls, linger: float) -> None:
        self.registry = Registry()
        self._linger = linger
        self._users = 0
        try:
            self._server, self._thread = start_http_server(port, address, self.registry.collectors, **tls._asdict())
        except OSError as error:
            raise ArgumentError(*_explained(error, port, address)) from error
        self._app = make_wsgi_app(self.registry.collectors)
        self.scrapes = Scrapes(self._answer)
        self._server.set_app(self.scrapes)
        if isinstance(self._server.socket, ssl.SSLSocket):
            # The handshake is left to the thread of each request: a client that says nothing would hold up the one that
            # takes them all, and with it the end of the training.
            self._server.socket.do_handshake_on_connect = False  # pyright: ignore[reportAttributeAccessIssue]
        self._server.handle_error = _noted
        self.port = int(self._server.server_port)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        scheme = "http" if tls.certfile is None else "https"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def acquire(self) -> None:
        """Count one more user."""
        with self.registry.lock:
            self._users += 1

    def release(self) -> None:
        """Count one user less; without users, wait for the last scrape, stop the server and free its port."""
        with self.registry.lock:
            self._users -= 1
            if self._users:
                return
        try:
            self._wait()
        finally:
            self._server.shutdown()
            # Workers that were forked meanwhile hold the socket as well, and with it the port.
            with contextlib.suppress(OSError):
                self._server.socket.shutdown(socket.SHUT_RDWR)
            self._server.server_close()
            self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # The client library collects one family after the other; meanwhile no writer may come in between.
        with self.registry.lock:
            return self._app(environ, start_response)

    def _wait(self) -> None:
        if self._linger and self.scrapes.expected():
            _LOG.info("Waiting up to %g s for the last scrape of %s.", self._linger, self.url)
            if not self.scrapes.wait(self._linger):
                _LOG.info("The last readings at %s have not been scraped.", self.url)


def _noted(request: Any, client_address: Any) -> None:
    """Log what a client did wrong, such as to speak HTTP where TLS is spoken; the standard server writes to stderr."""
    _LOG.debug("A request from %s failed.", client_address, exc_info=sys.exc_info())


def _explained(error: OSError, port: int, address: str) -> tuple[str, str, object]:
    """Which argument is to blame, what it must be, and what it was."""
    if error.errno == errno.EADDRINUSE:
        must = f"be free on {address}; runs of one process share one through `sibling`, each rank needs its own"
        return "port", must, port
    if error.errno == errno.EACCES:
        return "port", "be one that this user may listen on", port
    return "address", f"be an address of this machine ({error.strerror})", repr(address)
