"""Alerts by webhook and by e-mail, to real servers on this machine."""

import contextlib
import json
import logging
import math
import re
import socket
import ssl
import threading
import time
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from gradmon import ArgumentError, GradmonError, Monitor, every
from gradmon._reading import Alert
from gradmon.alerts import Above
from gradmon.sinks import EmailSink, WebhookSink, make_sink


def alert(state="firing", severity="warning", rule="step_too_long", value=1.4, layer=None):
    return Alert(rule, severity, state, value, 30, layer, "step_ratio is 1.4, above 1.", "Lower it.", ("head",))


class Receiver(HTTPServer):
    """Keeps what is posted, and answers what it is told to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.headers, self.answers = [], [], []
        self.pause = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/hooks/secret"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self.server.headers.append(dict(self.headers))
        time.sleep(self.server.pause)
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.end_headers()

    def log_message(self, *arguments):
        """Be quiet."""


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setattr("gradmon.sinks.webhook._PAUSE", 0.0)
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhook_posts_the_alert_with_its_run(receiver):
    sink = WebhookSink(receiver.url, headers={"Authorization": "Bearer x"})
    sink.bind("mlp", 3)
    sink.write([])
    sink.alert(alert())
    (body,) = receiver.bodies
    assert {key: body[key] for key in ("run", "rank", "rule", "severity", "state", "value", "step", "blame")} == {
        "run": "mlp", "rank": 3, "rule": "step_too_long", "severity": "warning", "state": "firing", "value": 1.4,
        "step": 30, "blame": ["head"],
    }  # fmt: skip
    assert body["text"].startswith(
        "[gradmon] mlp rank 3: step_too_long firing (warning)\nstep_ratio is 1.4, above 1.\n"
    )
    assert "Remedy: Lower it." in body["text"]
    assert abs(body["time"] - time.time()) < 60
    assert receiver.headers[0]["Authorization"] == "Bearer x"
    assert receiver.headers[0]["Content-Type"] == "application/json"
    sink.close()


@pytest.mark.parametrize(("value", "told"), [(math.nan, None), (math.inf, "inf"), (-math.inf, "-inf")])
def test_webhook_sends_strict_json(receiver, value, told):
    WebhookSink(receiver.url).alert(alert(value=value))
    assert receiver.bodies[0]["value"] == told


def test_webhook_with_a_body_of_ones_own(receiver):
    WebhookSink(receiver.url, body=lambda fields: {"content": fields["rule"]}).alert(alert())
    assert receiver.bodies == [{"content": "step_too_long"}]


def test_only_alerts_that_are_worth_a_message(receiver):
    sink = WebhookSink(receiver.url, least="warning")
    sink.alert(alert(severity="info", rule="a"))
    sink.alert(alert("resolved", severity="info", rule="a"))
    sink.alert(alert("resolved", rule="never_told"))
    sink.alert(alert("firing", rule="b"))
    sink.alert(alert("firing", rule="b", layer="head"))
    sink.alert(alert("resolved", rule="b"))
    assert [(b["rule"], b["layer"], b["state"]) for b in receiver.bodies] == [
        ("b", None, "firing"), ("b", "head", "firing"), ("b", None, "resolved"),
    ]  # fmt: skip
    silent = WebhookSink(receiver.url, resolved=False)
    silent.alert(alert())
    silent.alert(alert("resolved"))
    assert len(receiver.bodies) == 4


def test_a_flapping_rule_is_told_of_once_in_a_while(receiver, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gradmon.sinks._notice.time.monotonic", lambda: clock[0])
    sink = WebhookSink(receiver.url, pause=60.0)
    for _ in range(5):
        sink.alert(alert("firing"))
        sink.alert(alert("resolved"))
        clock[0] += 20.0
    assert [body["state"] for body in receiver.bodies] == ["firing", "resolved", "firing", "resolved"]


def test_what_fires_on_after_the_pause_is_told_of(receiver, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gradmon.sinks._notice.time.monotonic", lambda: clock[0])
    sink = WebhookSink(receiver.url, pause=60.0)
    for state in ("firing", "resolved", "firing"):
        sink.alert(alert(state))
    sink.write([])
    assert [body["state"] for body in receiver.bodies] == ["firing", "resolved"]
    clock[0] += 61.0
    sink.write([])
    sink.write([])
    assert [body["state"] for body in receiver.bodies] == ["firing", "resolved", "firing"]


def test_a_message_that_was_not_taken_is_sent_again(receiver, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gradmon.sinks._notice.time.monotonic", lambda: clock[0])
    receiver.answers = [404]
    sink = WebhookSink(receiver.url, pause=60.0)
    with pytest.raises(GradmonError, match="did not take the alert"):
        sink.alert(alert())
    sink.write([])
    assert len(receiver.bodies) == 1
    clock[0] += 61.0
    sink.write([])
    sink.alert(alert("resolved"))
    assert [body["state"] for body in receiver.bodies] == ["firing", "firing", "resolved"]


def test_the_end_of_an_alert_that_was_not_taken_is_sent_again_unless_it_fires_again(receiver, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gradmon.sinks._notice.time.monotonic", lambda: clock[0])
    receiver.answers = [200, 404, 404]
    sink = WebhookSink(receiver.url, pause=60.0)
    for one in (alert(), alert("resolved")):
        with contextlib.suppress(GradmonError):
            sink.alert(one)
    sink.write([])
    assert len(receiver.bodies) == 2
    clock[0] += 61.0
    with pytest.raises(GradmonError, match="did not take the alert"):
        sink.write([])
    sink.alert(alert())  # as they think who were told
    clock[0] += 61.0
    sink.write([])
    assert len(receiver.bodies) == 3
    receiver.answers = [404]
    with pytest.raises(GradmonError, match="did not take the alert"):
        sink.alert(alert("resolved"))
    clock[0] += 61.0
    sink.write([])
    sink.write([])
    assert [body["state"] for body in receiver.bodies] == ["firing", *["resolved"] * 4]


def test_a_redirect_is_not_followed(receiver):
    receiver.answers = [302]
    with pytest.raises(GradmonError, match="did not take the alert step_too_long: HTTP 302"):
        WebhookSink(receiver.url, headers={"Authorization": "Bearer secret"}).alert(alert())
    assert len(receiver.bodies) == 1


@pytest.mark.parametrize(("answers", "posts", "error"), [
    ([500, 503], 3, None),
    ([429], 2, None),
    ([500, 500, 500], 3, "HTTP 500"),
    ([404], 1, "HTTP 404"),
])  # fmt: skip
def test_webhook_asks_again_where_that_may_help(receiver, answers, posts, error):
    receiver.answers = list(answers)
    sink = WebhookSink(receiver.url)
    if error is None:
        sink.alert(alert())
    else:
        with pytest.raises(GradmonError, match=f"127.0.0.1 did not take the alert step_too_long: {error}") as caught:
            sink.alert(alert())
        assert "secret" not in str(caught.value)
    assert len(receiver.bodies) == posts


def test_webhook_of_a_server_that_is_away(receiver):
    url = receiver.url
    receiver.server_close()
    with pytest.raises(GradmonError, match=r"did not take the alert step_too_long: .*refused"):
        WebhookSink(url).alert(alert())


def test_webhook_of_a_server_that_does_not_answer(receiver):
    receiver.pause = 0.5
    with pytest.raises(GradmonError, match=r"did not take the alert step_too_long: .*timed out"):
        WebhookSink(receiver.url, timeout=0.05).alert(alert())


class Mailbox:
    """Keeps the messages that an SMTP server takes."""

    def __init__(self):
        self.mails = []

    async def handle_DATA(self, server, session, envelope):  # noqa: N802 - the library's name
        self.mails.append((envelope, message_from_bytes(envelope.content, policy=policy.default)))
        return "250 OK"


@pytest.fixture
def mailbox():
    """Starts SMTP servers; gives a function that does."""
    running = []

    def start(**options):
        box = Mailbox()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        controller = Controller(box, hostname="127.0.0.1", port=port, **options)
        controller.start()
        running.append(controller)
        return box, port

    yield start
    for controller in running:
        controller.stop()


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """A server's TLS context whose authority is trusted."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


def test_mail_says_what_and_where(mailbox):
    box, port = mailbox()
    to = ["you@example.org", "they@example.org"]
    sink = EmailSink("127.0.0.1", "me@example.org", to, port=port, security="none")
    sink.bind("a run\nBcc: evil@example.org", 0)
    sink.alert(alert())
    sink.alert(alert(severity="info", rule="other"))
    ((envelope, mail),) = box.mails
    assert (envelope.mail_from, envelope.rcpt_tos) == ("me@example.org", to)
    assert mail["Subject"] == "[gradmon] a run Bcc: evil@example.org: step_too_long firing (warning)"
    assert mail["Bcc"] is None
    assert mail["To"] == "you@example.org, they@example.org"
    assert mail["Date"]
    assert mail["Message-ID"]
    assert mail.get_content().splitlines()[:2] == ["step_ratio is 1.4, above 1.", "Remedy: Lower it."]
    sink.close()


def test_mail_with_starttls_and_a_password(mailbox, certificate):
    seen = []

    def authenticate(server, session, envelope, mechanism, data):
        seen.append((data.login, data.password))
        return AuthResult(success=data.password == b"p@ss")

    options = {"tls_context": certificate, "require_starttls": True, "authenticator": authenticate}
    box, port = mailbox(**options)
    spec = f"email:smtp://user:{{}}@localhost:{port}/?from=me@example.org&to=you@example.org"
    make_sink(spec.format("p%40ss")).alert(alert())
    assert seen == [(b"user", b"p@ss")]
    assert len(box.mails) == 1
    login = {"user": "user", "password": "wrong", "port": port, "timeout": 2.0}
    with pytest.raises(GradmonError, match="localhost did not take the alert step_too_long: "):
        EmailSink("localhost", "me@example.org", "you@example.org", **login).alert(alert())


def test_mail_with_tls_from_the_start(mailbox, certificate):
    box, port = mailbox(ssl_context=certificate, server_hostname="localhost")
    sink = EmailSink("localhost", "me@example.org", "you@example.org", port=port, security="tls")
    sink.alert(alert())
    assert len(box.mails) == 1


def test_mail_does_not_trust_a_stranger(mailbox, certificate, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    box, port = mailbox(tls_context=certificate, require_starttls=True)
    with pytest.raises(GradmonError, match="certificate verify failed"):
        EmailSink("localhost", "me@example.org", "you@example.org", port=port).alert(alert())
    assert box.mails == []


def test_a_dead_notifier_never_stops_the_training(caplog):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    sinks = [WebhookSink("http://127.0.0.1:9/"), EmailSink("127.0.0.1", "a@b", "c@d", port=9, security="none")]
    options = {"metrics": ["loss"], "schedule": every(1), "alerts": [Above("loss", 0.0)], "sinks": sinks}
    with caplog.at_level(logging.ERROR, "gradmon"), Monitor(model, optimizer, loss, **options) as monitor:
        for _ in range(3):
            batch = torch.randn(4, 3)
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
        assert monitor.flush(20)
    assert monitor.failures == {"sink WebhookSink": 1, "sink EmailSink": 1}
    assert len(caplog.records) == 2


ADDRESSES = ("me@example.org", "you@example.org")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WebhookSink("ftp://x"), "`url` must be an address that begins with http:// or https://. Got 'ftp://x'."),
        (lambda: WebhookSink(3), "`url` must be an address that begins with http:// or https://. Got 3."),
        (lambda: WebhookSink("http://x/secret token"), "`url` must have no user, blank or control character in it"),
        (lambda: WebhookSink("http://me:secret@x/"), "`url` must have no user, blank or control character in it"),
        (lambda: WebhookSink("http://x", timeout=0), "`timeout` must be a positive number of seconds. Got 0."),
        (lambda: WebhookSink("http://x", least="bad"), '`least` must be "info", "warning" or "critical". Got \'bad\'.'),
        (lambda: WebhookSink("http://x", pause=-1), "`pause` must be a number of seconds of at least 0. Got -1."),
        (lambda: EmailSink("", *ADDRESSES), "`host` must be the name of a mail server. Got ''."),
        (lambda: EmailSink("h", "me", "a@b"), "`sender` must be an address, such as me@example.org. Got 'me'."),
        (lambda: EmailSink("h", "a@b", "a@b\nBcc: c@d"), "`recipients` must be an address, such as me@example.org."),
        (lambda: EmailSink("h", "a@b", []), "`recipients` must be at least one address. Got []."),
        (lambda: EmailSink("h", *ADDRESSES, security="x"), '`security` must be "starttls", "tls" or "none". Got'),
        (lambda: EmailSink("h", *ADDRESSES, port=0), "`port` must be in [1, 65535]. Got 0."),
        (lambda: EmailSink("h", *ADDRESSES, user="u"), "`password` must be given with `user`, and only with it."),
        (lambda: make_sink("email:smtp://u:secret@h/"), "`sinks` must be like email:smtp://USER:PASSWORD@HOST:PORT/?"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        make()
    assert "secret" not in str(caught.value)
