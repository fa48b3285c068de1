"""Alerts by apprise: more than a hundred chat, push, pager and mail services."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading, Severity
from gradmon.sinks._notice import Notices

_KINDS = {"info": "info", "warning": "warning", "critical": "failure"}


class AppriseSink:
    """Sends each alert to the services that some apprise addresses stand for; readings are left out."""

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        least: Severity = "warning",
        resolved: bool = True,
        pause: float = 600.0,
    ) -> None:
        """Choose where to.

        Args:
            urls: One address, or several, as apprise writes them: ``"slack://..."``, ``"mailto://..."``.
            least: The least severity that is worth a message.
            resolved: Whether to tell when an alert resolves.
            pause: The seconds within which a rule that fires again is not told of again.

        Raises:
            ArgumentError: An address is none that apprise knows, or another argument is not what it must be.
            GradmonError: apprise is not installed.
        """
        try:
            import apprise
        except ImportError as error:
            raise GradmonError(f'AppriseSink needs apprise ({error}): pip install "gradmon[apprise]"') from error
        self._notices = Notices(least, resolved, pause)
        self._services: Any = apprise.Apprise()
        for number, url in enumerate([urls] if isinstance(urls, str) else urls, start=1):
            if not self._services.add(url):  # addresses hold passwords, and are not repeated
                raise ArgumentError("urls", "be addresses that apprise knows", f"another one, number {number}")
        if not len(self._services):
            raise ArgumentError("urls", "be at least one address", repr(urls))

    @classmethod
    def from_spec(cls, argument: str) -> AppriseSink:
        """Make the sink of a string such as ``"apprise:slack://token/channel"``; several addresses after commas."""
        return cls([url.strip() for url in argument.split(",") if url.strip()])

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
        """Send the alert, if it is worth a message.

        Raises:
            GradmonError: A service did not take it.
        """
        self._notices.take(alert)
        self._notices.deliver(self._tell)

    def _tell(self, alert: Alert) -> None:
        kind = "success" if alert.state == "resolved" else _KINDS[alert.severity]
        sent = self._services.notify(
            title=self._notices.title(alert), body=self._notices.text(alert), notify_type=kind, body_format="text"
        )
        if not sent:
            raise GradmonError(f"A service of apprise did not take the alert {alert.rule}; its log says more.")

    def close(self) -> None:
        """Do nothing: there is no connection between two messages."""
