"""Serving over TLS, with certificates made on the spot."""

import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error

import pytest

from gradmon._errors import ArgumentError
from gradmon._reading import Reading
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import fetch, stop_at_once

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the certificates and keys of a server, a client and a stranger, each its own authority."""
    place = tmp_path_factory.mktemp("tls")
    for name in ("server", "client", "stranger"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", 2),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", place / f"{name}.key", "-out", place / f"{name}.pem"),
        )
    openssl("ec", "-aes128", "-passout", "pass:secret", "-in", place / "server.key", "-out", place / "locked.key")
    return place


def serve(made, **more):
    sink = PrometheusSink(certfile=made / "server.pem", keyfile=str(made / "server.key"), linger=0, **more)
    sink.write([Reading("loss", 1.5, 1)])
    return sink


def trusting(made, client=None):
    context = ssl.create_default_context(cafile=made / "server.pem")
    if client is not None:
        context.load_cert_chain(made / f"{client}.pem", made / f"{client}.key")
    return context


def test_scraped_over_tls(made):
    sink = serve(made)
    assert sink.url == f"https://127.0.0.1:{sink.port}/metrics"
    assert 'gradmon_loss{rank="0",run="default"} 1.5' in fetch(sink.url, context=trusting(made))
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(sink.url, context=ssl.create_default_context())
    sink.close()


def test_who_speaks_http_gets_nothing_and_disturbs_nobody(made, capfd):
    sink = serve(made)
    with pytest.raises(OSError, match=r".*"):
        fetch(sink.url.replace("https", "http"))
    assert "gradmon_loss" in fetch(sink.url, context=trusting(made))
    sink.close()
    assert capfd.readouterr() == ("", "")


def test_only_known_clients_are_let_in(made):
    sink = serve(made, client_cafile=made / "client.pem", client_auth_required=True)
    assert "gradmon_loss" in fetch(sink.url, context=trusting(made, "client"))
    for context in (trusting(made), trusting(made, "stranger")):
        with pytest.raises(OSError, match=r".*"):
            fetch(sink.url, context=context)
    sink.close()


def test_authorities_from_a_directory(made, tmp_path):
    shutil.copy(made / "client.pem", tmp_path / "client.pem")
    openssl("rehash", tmp_path)
    sink = serve(made, client_capath=tmp_path, client_auth_required=True)
    assert "gradmon_loss" in fetch(sink.url, context=trusting(made, "client"))
    sink.close()


def test_a_client_that_says_nothing_holds_up_nobody(made):
    sink = serve(made)
    with socket.create_connection(("127.0.0.1", sink.port), timeout=10):
        assert "gradmon_loss" in fetch(sink.url, context=trusting(made))
        closing = threading.Thread(target=sink.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


# Arguments


def test_a_certificate_without_its_key(made):
    with pytest.raises(ArgumentError, match=r"`keyfile` must be given where `certfile` is\. Got None\."):
        PrometheusSink(certfile=made / "server.pem")
    with pytest.raises(ArgumentError, match=r"`certfile` must be given where `keyfile` is\. Got None\."):
        PrometheusSink(keyfile=made / "server.key")


@pytest.mark.parametrize("given", [{"client_cafile": "x"}, {"client_capath": "x"}, {"client_auth_required": True}])
def test_clients_are_not_checked_without_tls(given):
    with pytest.raises(ArgumentError, match=r"`certfile` must be given where clients are to be checked\. Got None\."):
        PrometheusSink(**given)


@pytest.mark.parametrize("name", ["client_cafile", "client_capath"])
def test_authorities_that_would_not_be_asked(made, name):
    with pytest.raises(ArgumentError, match=r"`client_auth_required` must be True where `client_cafile` or .*\. Got F"):
        serve(made, **{name: made / "client.pem"})


@pytest.mark.parametrize(
    ("cert", "key", "why"),
    [
        ("missing.pem", "server.key", "No such file or directory"),
        ("server.pem", "missing.key", "No such file or directory"),
        ("server.key", "server.key", "PEM"),
        ("server.pem", "client.key", "KEY_VALUES_MISMATCH"),
        ("server.pem", "locked.key", "PEM"),
    ],
)
def test_files_that_cannot_be_used(made, cert, key, why):
    match = rf"`certfile` must be a certificate, and `keyfile` its key without a password, in PEM \(.*{why}.*\)\. Got '"
    with pytest.raises(ArgumentError, match=match):
        PrometheusSink(certfile=made / cert, keyfile=made / key)


def test_authorities_that_cannot_be_used(made):
    with pytest.raises(ArgumentError, match=r"`client_cafile` must hold certificates of authorities in PEM \(No such "):
        serve(made, client_cafile=made / "missing.pem", client_auth_required=True)
    with pytest.raises(ArgumentError, match=r"`client_cafile` must hold certificates of authorities in PEM \(.*\)\. G"):
        serve(made, client_cafile=made / "client.key", client_auth_required=True)
