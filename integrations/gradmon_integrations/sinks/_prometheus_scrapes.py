"""Who has seen what: when an answer has gone out, and whether what was to be seen was in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_FORGOTTEN = 300.0
"""Seconds after the last scrape when nobody is taken to scrape any more: as long as Prometheus looks back."""


class Scrapes:
    """A WSGI application around that of the client library, which knows what has been fetched from it.

    Args:
        app: The application that answers.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._news = 0
        self._seen = 0
        self._last: float | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"] == "/favicon.ico":
            return self._app(environ, start_response)
        with self._changed:
            self._last = time.monotonic()
            news = self._news
        return _Answer(list(self._app(environ, start_response)), lambda: self._sent(news))

    def expect(self) -> None:
        """Say that there is something new that should still be fetched."""
        with self._changed:
            self._news += 1

    def expected(self) -> bool:
        """Whether something new has not been fetched yet, though there was somebody who fetches."""
        with self._changed:
            there = self._last is not None and time.monotonic() - self._last < _FORGOTTEN
            return there and self._seen < self._news

    def wait(self, seconds: float) -> bool:
        """Wait until everything new has been fetched; tell whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: self._seen >= self._news, seconds)

    def _sent(self, news: int) -> None:
        with self._changed:
            self._seen = max(self._seen, news)
            self._changed.notify_all()


class _Answer:
    """The parts of an answer. Its length is known, so that the server tells it to the client."""

    def __init__(self, parts: list[bytes], sent: Callable[[], None]) -> None:
        self._parts, self._sent = parts, sent

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        # A server comes back for more only after it has sent what it got.
        self._sent()
