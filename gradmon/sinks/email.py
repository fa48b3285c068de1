"""Alerts by e-mail."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Sequence
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading, Severity
from gradmon.sinks._notice import Notices

Security = Literal["starttls", "tls", "none"]
_PORTS: dict[Security, int] = {"starttls": 587, "tls": 465, "none": 25}


class EmailSink:
    """Sends one message an alert; readings are left out."""

    def __init__(
        self,
        host: str,
        sender: str,
        recipients: str | Sequence[str],
        *,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        security: Security = "starttls",
        least: Severity = "warning",
        resolved: bool = True,
        pause: float = 600.0,
        timeout: float = 20.0,
    ) -> None:
        """Choose from whom to whom, and by which server.

        Args:
            host: The SMTP server.
            sender: The address of the sender.
            recipients: One address, or several.
            port: The server's port; None for the usual one: 587, with TLS from the start 465, without any 25.
            user: The user's name; None to send without logging in.
            password: The user's password.
            security: ``"starttls"``, ``"tls"`` (from the start) or ``"none"``.
            least: The least severity that is worth a message.
            resolved: Whether to tell when an alert resolves.
            pause: The seconds within which a rule that fires again is not told of again.
            timeout: Seconds to wait for the server.

        Raises:
            ArgumentError: An argument is not what it must be.
        """
        if not isinstance(host, str) or not host:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("host", "be the name of a mail server", repr(host))
        addresses = [recipients] if isinstance(recipients, str) else list(recipients)
        for name, address in (("sender", sender), *(("recipients", address) for address in addresses)):
            if not isinstance(address, str) or "@" not in address or set(address) & set("\r\n"):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ArgumentError(name, "be an address, such as me@example.org", repr(address))
        if not addresses:
            raise ArgumentError("recipients", "be at least one address", repr(recipients))
        if security not in _PORTS:
            raise ArgumentError("security", 'be "starttls", "tls" or "none"', repr(security))
        if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("port", "be in [1, 65535]", port)
        if (user is None) != (password is None):
            raise ArgumentError("password", "be given with `user`, and only with it", "only one of them")
        self._host, self._port = host, _PORTS[security] if port is None else port
        self._sender, self._recipients, self._security = sender, addresses, security
        self._login, self._timeout = (user, password), timeout
        self._notices = Notices(least, resolved, pause)

    @classmethod
    def from_spec(cls, argument: str) -> EmailSink:
        """Make the sink of a string.

        ``"email:smtp://user:password@mail.example.org:587/?from=me@example.org&to=you@example.org,they@example.org"``;
        ``smtps`` for TLS from the start, ``smtp+plain`` for none. Reserved characters are percent-encoded.

        Raises:
            ArgumentError: It is no such string.
        """
        schemes: dict[str, Security] = {"smtp": "starttls", "smtps": "tls", "smtp+plain": "none"}
        try:
            parts = urlsplit(argument)
            query, port = parse_qs(parts.query), parts.port
            sender, recipients = query["from"][0], query["to"][0].split(",")
            security, host = schemes[parts.scheme], parts.hostname or ""
        except (KeyError, ValueError):
            must = "be like email:smtp://USER:PASSWORD@HOST:PORT/?from=ADDRESS&to=ADDRESS,ADDRESS"
            raise ArgumentError("sinks", must, "something else") from None  # it may hold a password
        user, password = (None if part is None else unquote(part) for part in (parts.username, parts.password))
        return cls(host, sender, recipients, port=port, user=user, password=password, security=security)

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
            GradmonError: It could not be sent.
        """
        self._notices.take(alert)
        self._notices.deliver(self._tell)

    def _tell(self, alert: Alert) -> None:
        message = EmailMessage()
        # A header is one line, whatever a run is named.
        message["Subject"] = " ".join(self._notices.title(alert).split())
        message["From"], message["To"] = self._sender, ", ".join(self._recipients)
        message["Date"], message["Message-ID"] = formatdate(localtime=True), make_msgid(domain="gradmon.invalid")
        message.set_content(self._notices.text(alert))
        try:
            self._send(message)
        except (OSError, smtplib.SMTPException) as error:
            raise GradmonError(f"{self._host} did not take the alert {alert.rule}: {error}.") from error

    def _send(self, message: EmailMessage) -> None:
        context = ssl.create_default_context()
        if self._security == "tls":
            server = smtplib.SMTP_SSL(self._host, self._port, timeout=self._timeout, context=context)
        else:
            server = smtplib.SMTP(self._host, self._port, timeout=self._timeout)
        with server:
            if self._security == "starttls":
                server.starttls(context=context)
            user, password = self._login
            if user is not None and password is not None:
                server.login(user, password)
            refused = server.send_message(message)
        if refused:  # an error is raised only where all of them are
            raise GradmonError(f"{self._host} did not take the alert for {', '.join(refused)}.")

    def close(self) -> None:
        """Do nothing: there is no connection between two messages."""
