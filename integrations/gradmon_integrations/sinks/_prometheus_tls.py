"""What a server needs to be known and to know its clients: files, and that they are fit for use."""

from __future__ import annotations

import os
import ssl
from typing import NamedTuple

from gradmon._errors import ArgumentError

Path = str | os.PathLike[str]


class Tls(NamedTuple):
    """The arguments of the client library's server that have to do with TLS; all None and False: plain HTTP.

    Attributes:
        certfile: The server's certificate, with its chain.
        keyfile: Its private key, without a password.
        client_cafile: The authorities whose clients are let in.
        client_capath: The same as a directory.
        client_auth_required: Whether a client must have a certificate.
    """

    certfile: str | None = None
    keyfile: str | None = None
    client_cafile: str | None = None
    client_capath: str | None = None
    client_auth_required: bool = False

    @classmethod
    def checked(
        cls,
        certfile: Path | None,
        keyfile: Path | None,
        client_cafile: Path | None,
        client_capath: Path | None,
        client_auth_required: bool,
    ) -> Tls:
        """The arguments, when a server can be started with them.

        Raises:
            ArgumentError: One is missing without which another has no effect, or a file cannot be used.
        """
        given = (certfile, keyfile, client_cafile, client_capath)
        cert, key, cafile, capath = (None if path is None else os.fspath(path) for path in given)
        # The client library serves plain HTTP where one of the two is missing.
        if (cert is None) != (key is None):
            missing, present = ("keyfile", "certfile") if key is None else ("certfile", "keyfile")
            raise ArgumentError(missing, f"be given where `{present}` is", None)
        if cert is None and (cafile is not None or capath is not None or client_auth_required):
            raise ArgumentError("certfile", "be given where clients are to be checked", None)
        # And it checks no client, whatever authorities it has, unless it is told to.
        if (cafile is not None or capath is not None) and not client_auth_required:
            must = "be True where `client_cafile` or `client_capath` is given: without it no client is checked"
            raise ArgumentError("client_auth_required", must, client_auth_required)
        if cert is not None:
            _try(cert, key, cafile, capath)
        return cls(cert, key, cafile, capath, client_auth_required)


def _try(cert: str, key: str | None, cafile: str | None, capath: str | None) -> None:
    """Load the files as the server will; by then it listens, and its errors name no argument.

    Raises:
        ArgumentError: A file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password: a key that has one would be asked for at the terminal.
        context.load_cert_chain(cert, key, password="")
    except OSError as error:
        must = f"be a certificate, and `keyfile` its key without a password, in PEM ({error.strerror or error})"
        raise ArgumentError("certfile", must, f"{cert!r} and {key!r}") from error
    if cafile is None and capath is None:
        return
    try:
        context.load_verify_locations(cafile, capath)
    except OSError as error:
        name, got = ("client_capath", capath) if cafile is None else ("client_cafile", cafile)
        must = f"hold certificates of authorities in PEM ({error.strerror or error})"
        raise ArgumentError(name, must, repr(got)) from error
