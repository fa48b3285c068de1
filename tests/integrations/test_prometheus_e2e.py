"""A Prometheus that scrapes a sink."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import pytest

from gradmon._reading import Alert, Reading
from gradmon.metrics import METRICS
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import stop_at_once

PROGRAM = shutil.which("prometheus")
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed")]
FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


class Prometheus:
    """A server that scrapes one target every second."""

    def __init__(self, directory, target):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.url = f"http://127.0.0.1:{server.getsockname()[1]}"
        scrape = {"job_name": "gradmon", "static_configs": [{"targets": [target]}]}
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, what, **parameters):
        """The data that an endpoint of the API answers with; None while the server is not ready."""
        query = urllib.parse.urlencode(parameters)
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}", timeout=10) as answer,
        ):
            return json.load(answer)["data"]

    def wait_for(self, query):
        """The first non-empty result of a query."""
        deadline = time.monotonic() + 60
        while True:
            data = self.ask("query", query=query)
            if data and data["result"]:
                return data["result"]
            assert self.process.poll() is None, "Prometheus ended"
            assert time.monotonic() < deadline, f"{query} stays empty"
            time.sleep(0.1)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A sink and the server that scrapes it."""
    stop_at_once(monkeypatch)
    sink = PrometheusSink(linger=30)
    server = Prometheus(tmp_path, f"127.0.0.1:{sink.port}")
    try:
        yield sink, server
    finally:
        server.process.terminate()
        server.process.wait(30)
        sink.close()


def test_a_run_from_its_start_to_its_end(watched):
    sink, server = watched
    sink.bind("mlp-1", 0)
    sink.describe({"model": "MLP", "job": "nightly"})
    sink.write([Reading("loss", 2.5, 324), Reading("grad_norm", 1.5, 324, "fc"), Reading("probe_seconds", 0.02, 324)])
    sink.alert(FIRING)
    (loss,) = server.wait_for("gradmon_loss")
    labels = {"run": "mlp-1", "rank": "0", "job": "gradmon", "instance": f"127.0.0.1:{sink.port}"}
    assert loss["metric"] == {"__name__": "gradmon_loss", **labels}
    assert loss["value"][1] == "2.5"
    (layer,) = server.wait_for("gradmon_layer_grad_norm")
    assert layer["metric"]["layer"] == "fc"
    (named,) = server.wait_for("gradmon_loss * on (run, rank) group_left (model, job_) gradmon_run_info")
    assert (named["metric"]["model"], named["metric"]["job_"]) == ("MLP", "nightly")
    assert server.wait_for("gradmon_alert_ill_conditioned > 0")
    (middle,) = server.wait_for("histogram_quantile(0.5, gradmon_probe_duration_seconds_bucket)")
    assert 0.01 <= float(middle["value"][1]) <= 0.03
    (known,) = server.ask("metadata", metric="gradmon_loss")["gradmon_loss"]
    assert (known["type"], known["help"]) == ("gauge", METRICS["loss"].meaning)
    # What the run ended with is there although the sink was closed at once.
    sink.write([Reading("loss", 0.125, 400)])
    sink.finish(True)
    closing = threading.Thread(target=sink.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    (last,) = server.wait_for("last_over_time(gradmon_loss[1m])")
    assert last["value"][1] == "0.125"
    (finished,) = server.wait_for("last_over_time(gradmon_run_finished[1m])")
    assert finished["value"][1] == "1"


def test_exemplars_reach_prometheus(watched):
    sink, server = watched
    sink.bind("mlp-1", 0)
    sink.write([Reading("probe_seconds", 0.02, 324)])
    server.wait_for("gradmon_readings_total == 1")
    now = time.time()
    found = server.ask("query_exemplars", query='{run="mlp-1"}', start=now - 600, end=now + 600)
    kept = {series["seriesLabels"]["__name__"]: series["exemplars"][0] for series in found}
    assert kept["gradmon_readings_total"]["labels"] == {"step": "324"}
    assert kept["gradmon_probe_duration_seconds_bucket"]["labels"] == {"step": "324"}
    assert float(kept["gradmon_probe_duration_seconds_bucket"]["value"]) == 0.02
