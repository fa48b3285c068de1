"""Alerts to a web address: chat rooms, pagers, and whatever else takes a POST."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading, Severity
from gradmon.sinks._notice import Notices

_TRIES = 3
_PAUSE = 1.0
"""Seconds before the second try; before the third twice as many."""
_TOO_MANY = 429


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows none: what is followed becomes a GET without the alert, and takes the headers to wherever it leads."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """No further request."""


_OPENER = urllib.request.build_opener(_NoRedirects)


class WebhookSink:
    """Posts each alert as a JSON object; readings are left out.

    Its fields are those of `Alert` and ``run``, ``rank``, ``host``, ``time`` (seconds since 1970), and ``text``, the
    whole in words, which is what the incoming webhooks of Slack, Mattermost and others show. A server that is away, or
    answers with an error of its own (5xx) or "too many requests", is asked three times.

    Example:
        >>> sink = WebhookSink("https://chat.example.org/hooks/abc", least="critical")
        >>> sink.close()
    """

    def __init__(
        self,
        url: str,
        *,
        least: Severity = "warning",
        resolved: bool = True,
        pause: float = 600.0,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        body: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        """Choose where to, and what.

        Args:
            url: The address, http or https.
            least: The least severity that is worth a message.
            resolved: Whether to tell when an alert resolves.
            pause: The seconds within which a rule that fires again is not told of again.
            headers: Further headers, such as one that authorises.
            timeout: Seconds to wait for an answer.
            body: From the fields to what is posted as JSON; None for the fields themselves.

        Raises:
            ArgumentError: An argument is not what it must be.
        """
        parts = urlsplit(url) if isinstance(url, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError("url", "be an address that begins with http:// or https://", repr(url))
        if parts.username is not None or not url.strip().isprintable() or " " in url.strip():
            must = "have no user, blank or control character in it; `headers` can authorise"
            raise ArgumentError("url", must, "one that has")  # it may be a secret
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("timeout", "be a positive number of seconds", timeout)
        self._url, self._timeout, self._body = url, timeout, body
        # What follows the host may be a secret, and is not for the log.
        self._host = str(parts.hostname)
        self._headers = {"Content-Type": "application/json", "User-Agent": "gradmon", **(headers or {})}
        self._notices = Notices(least, resolved, pause)

    @classmethod
    def from_spec(cls, argument: str) -> WebhookSink:
        """Make the sink of a string such as ``"webhook:https://chat.example.org/hooks/abc"``."""
        return cls(argument)

    def bind(self, run: str, rank: int) -> None:
        """Name the run in every message."""
        self._notices.run, self._notices.rank = run, rank

    def write(self, readings: Sequence[Reading]) -> None:
        """Send what was put off; nobody wants a message for each reading.

        Raises:
            GradmonError: It was not accepted.
        """
        self._notices.deliver(self._tell)

    def alert(self, alert: Alert) -> None:
        """Post the alert, if it is worth a message.

        Raises:
            GradmonError: It was not accepted.
        """
        self._notices.take(alert)
        self._notices.deliver(self._tell)

    def _tell(self, alert: Alert) -> None:
        text = f"{self._notices.title(alert)}\n{self._notices.text(alert)}"
        fields = {**self._notices.fields(alert), "text": text}
        data = json.dumps(fields if self._body is None else self._body(fields)).encode()
        request = urllib.request.Request(self._url, data, self._headers, method="POST")
        for attempt in range(1, _TRIES + 1):
            error = self._posted(request)
            if error is None:
                return
            final = error.startswith(("HTTP 3", "HTTP 4")) and error != f"HTTP {_TOO_MANY}"
            if attempt == _TRIES or final:
                raise GradmonError(f"The webhook at {self._host} did not take the alert {alert.rule}: {error}.")
            time.sleep(_PAUSE * attempt)

    def _posted(self, request: urllib.request.Request) -> str | None:
        """What went wrong; None if nothing did."""
        try:
            with _OPENER.open(request, timeout=self._timeout) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}"
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {getattr(error, 'reason', error)}"
        except http.client.HTTPException as error:
            return type(error).__name__  # its text may hold the address
        return None

    def close(self) -> None:
        """Do nothing: there is no connection between two messages."""
