"""An exporter as a source of `gradmon watch`."""

import base64
import http.server
import re
import threading
from contextlib import closing, contextmanager

import pytest

from gradmon import Alert, Reading
from gradmon._errors import ArgumentError, GradmonError
from gradmon.metrics import OWN
from gradmon_integrations.sinks.prometheus import PrometheusSink
from gradmon_integrations.watch.exporter import ExporterSource
from gradmon_integrations.watch.runs import SourceError
from tests.integrations.watched import NONFINITE, NOW, once, probe


@contextmanager
def serving(text, wanted=None):
    """A server of what `text["served"]` holds; `wanted`: the Authorization it asks for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = wanted is None or self.headers.get("Authorization") == wanted
            found = self.path == "/metrics" and allowed
            self.send_response(200 if found else 401 if not allowed else 404)
            self.end_headers()
            self.wfile.write(text["served"].encode() if found else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


SERVED = """\
# TYPE gradmon_loss gauge
gradmon_loss{{run="mlp",rank="0"}} {loss}
# TYPE gradmon_step_ratio gauge
gradmon_step_ratio{{run="mlp",rank="0"}} 2.5
# TYPE gradmon_learning_rate gauge
gradmon_learning_rate{{run="mlp",rank="0"}} 0.1
# TYPE gradmon_layer_grad_norm gauge
gradmon_layer_grad_norm{{run="mlp",rank="0",layer="fc"}} 2.5
# TYPE gradmon_alert_step_too_long gauge
gradmon_alert_step_too_long{{run="mlp",rank="0"}} {firing}
# TYPE gradmon_alerts_firing gauge
gradmon_alerts_firing{{run="mlp",rank="0"}} {firing}
# TYPE gradmon_last_step gauge
gradmon_last_step{{run="mlp",rank="0"}} {step}
# TYPE gradmon_last_probe_timestamp_seconds gauge
gradmon_last_probe_timestamp_seconds{{run="mlp",rank="0"}} 1.7e9
# TYPE gradmon_run_start_timestamp_seconds gauge
gradmon_run_start_timestamp_seconds{{run="mlp",rank="0"}} 1.699999e9
# TYPE gradmon_run_finished gauge
gradmon_run_finished{{run="mlp",rank="0"}} {finished}
# TYPE gradmon_run_info gauge
gradmon_run_info{{run="mlp",rank="0",model="Net",optimizer="Adam",device=""}} 1
# TYPE gradmon_sink_errors_total counter
gradmon_sink_errors_total{{run="mlp",rank="0"}} 3
# TYPE gradmon_probe_duration_seconds histogram
gradmon_probe_duration_seconds_bucket{{run="mlp",rank="0",le="+Inf"}} 3
gradmon_probe_duration_seconds_sum{{run="mlp",rank="0"}} 3
gradmon_probe_duration_seconds_count{{run="mlp",rank="0"}} 3
# TYPE python_info gauge
python_info{{version="3"}} 1
"""


def served(step=10, loss=0.5, firing=0, finished=0):
    return SERVED.format(step=step, loss=loss, firing=firing, finished=finished)


def test_an_exporter_look_by_look():
    text = {"served": served(firing=1)}
    with serving(text) as url:
        source = ExporterSource(url)
        (run,) = source.read()
        assert (run.label, run.step, run.began, run.newest) == ("mlp", 10, 1.699999e9, 1.7e9)
        assert run.info == {"model": "Net", "optimizer": "Adam"}
        assert set(run.history.series) == {"loss", "step_ratio", "learning_rate", "sink_errors"}
        (alert,) = run.history.active
        assert (alert.rule, alert.severity, alert.step, alert.value) == ("step_too_long", "warning", None, 2.5)
        assert "lower the learning rate from 0.1" in alert.remedy
        assert run.state(NOW + 5, 600) == ("running", True)
        source.read()
        assert len(run.history.series["loss"]) == 1
        text["served"] = served(step=20, loss="NaN")
        source.read()
        assert [reading.step for reading in run.history.series["loss"]] == [10, 20]
        assert run.history.active == []
        text["served"] = served(step=30, firing=1)
        source.read()
        assert [alert.step for alert in run.history.active] == [30]
        text["served"] = served(step=30, finished=1)
        source.read()
        assert run.state(NOW + 60, 600) == ("finished", True)
        text["served"] = ""
        source.read()
        assert run.lost == "no longer served"
        text["served"] = served(step=1).replace("1.699999e9", "1.7e9")
        (run,) = source.read()
        assert [reading.step for reading in run.history.series["loss"]] == [1]
        assert run.lost == ""
    (run,) = source.read()
    assert run.state(NOW, 600) == ("out of reach: [Errno 111] Connection refused", False)


def test_the_exporter_of_the_sink(capsys):
    sink = PrometheusSink(0, linger=0)
    try:
        sink.bind("mlp", 0)
        for step in (1, 2):
            probe(sink, step, step_ratio=1.5, probe_seconds=0.1)
        sink.alert(Alert("step_too_long", "warning", "firing", 1.5, 2, None, "step_ratio is 1.5.", "Lower."))
        assert once(sink.url) == 0
        assert once(sink.url.removesuffix("/metrics")) == 0
        sink.alert(NONFINITE)
        assert once(sink.url) == 3
    finally:
        sink.close()
    text = capsys.readouterr().out
    assert re.search(r"^mlp +running +2 ", text, re.MULTILINE)
    assert re.search(r"^  loss +low +1 ", text, re.MULTILINE)
    assert "! step_too_long step_ratio now 1.5." in " ".join(text.split())
    shown = {row.split()[0] for row in text.splitlines() if row.startswith("  ")}
    assert shown & OWN.keys() == {"learning_rate"}


def test_a_password_in_the_address(capsys):
    wanted = f"Basic {base64.b64encode(b'me:secret').decode()}"
    with serving({"served": served()}, wanted) as url:
        assert once(url.replace("//", "//me:secret@")) == 0
        assert "secret" not in "".join(capsys.readouterr())
        with pytest.raises(GradmonError, match="cannot be read: Unauthorized"):
            once(url)


@pytest.mark.parametrize("text", ["<html>", 'a{b="c"', ""])
def test_something_else_is_served(text):
    with serving({"served": text}) as url, pytest.raises(SourceError, match=r"serves no run|cannot be read"):
        ExporterSource(url).read()


def test_nobody_answers():
    with serving({"served": ""}) as url:
        pass
    with pytest.raises(GradmonError, match=r"http://127.0.0.1:\d+/metrics cannot be read: .*refused"):
        once(url)


@pytest.mark.parametrize("url", ["ftp://host/x", "http://", "://"])
def test_addresses_that_are_none(url):
    with pytest.raises(ArgumentError, match="`SOURCE` must be a file, a directory or an address such as http://"):
        once(url)


def test_numbers_that_come_later_under_the_same_step_are_shown():
    """Those that compare with the next batch are those of the probe before until it has come."""
    with closing(PrometheusSink(0)) as sink:
        sink.bind("mlp", 0)
        source = ExporterSource(sink.url)
        for step in (5, 10):
            sink.write([Reading("loss", 1.0 / step, step)])
            (run,) = source.read()
            sink.write([Reading("batch_share", step / 20, step)])
            (run,) = source.read()
            assert run.history.newest("batch_share") == Reading("batch_share", step / 20, step)
        assert run.history.values("batch_share") == [0.25, 0.5]
        assert run.history.values("loss") == [0.2, 0.1]
