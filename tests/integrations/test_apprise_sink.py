"""Alerts by apprise, to a server on this machine."""

import json
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gradmon import ArgumentError, GradmonError
from gradmon._reading import Alert
from gradmon.sinks import make_sink
from gradmon_integrations.sinks.apprise import AppriseSink

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, when its services are loaded
    apprise = pytest.importorskip("apprise")
    apprise.Apprise().add("json://localhost")


def alert(state="firing", severity="critical"):
    return Alert("nonfinite", severity, state, 1.0, 30, None, "The loss is inf.", "Lower it.")


@pytest.fixture
def server():
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            """Be quiet."""

    running = HTTPServer(("127.0.0.1", 0), Handler)
    running.bodies = bodies
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_alerts_arrive(server):
    sink = make_sink(f"apprise:json://127.0.0.1:{server.server_port}/")
    sink.bind("mlp", 0)
    sink.write([])
    sink.alert(alert())
    sink.alert(alert("resolved"))
    sink.alert(alert(severity="info"))
    assert [body["type"] for body in server.bodies] == ["failure", "success"]
    assert server.bodies[0]["title"] == "[gradmon] mlp: nonfinite firing (critical)"
    assert server.bodies[0]["message"].startswith("The loss is inf.\nRemedy: Lower it.")
    sink.close()


def test_a_service_that_is_away(server):
    server.server_close()
    with pytest.raises(GradmonError, match="A service of apprise did not take the alert nonfinite"):
        AppriseSink(f"json://127.0.0.1:{server.server_port}/").alert(alert())


def test_wrong_addresses():
    with pytest.raises(
        ArgumentError, match=r"`urls` must be addresses that apprise knows\. Got another one, number 2\."
    ):
        AppriseSink(["json://localhost", "nonsense:secret"])
    with pytest.raises(ArgumentError, match=r"`urls` must be at least one address\. Got \[\]\."):
        AppriseSink([])


def test_without_apprise(monkeypatch):
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(GradmonError, match=r'AppriseSink needs apprise .*: pip install "gradmon\[apprise\]"'):
        AppriseSink("json://localhost")
