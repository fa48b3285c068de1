import contextlib
import http.server
import json
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import pytest

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks import RunAware, Sink
from gradmon_integrations.sinks import pushgateway
from gradmon_integrations.sinks.pushgateway import PushgatewaySink
from tests.integrations.scraping import fetch, samples

PROGRAM = shutil.which("prometheus-pushgateway")
FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def gateway():
    """The address of a real Pushgateway."""
    if PROGRAM is None:
        pytest.skip("prometheus-pushgateway is not installed")
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [PROGRAM, f"--web.listen-address={address}", "--persistence.file="],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, "the Pushgateway ended"
            assert time.monotonic() < deadline, "the Pushgateway did not become ready"
            with contextlib.suppress(OSError):
                fetch(f"http://{address}/-/ready")
                break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def dead():
    """An address at which nobody is."""
    return f"127.0.0.1:{free_port()}"


def pushed(gateway, run):
    """What the gateway has of a run, by name and the labels that are not of the grouping key."""
    found = {}
    for (name, *labels), value in samples(f"http://{gateway}/metrics").items():
        told = dict(labels)
        if told.pop("run", None) == run and name.startswith("gradmon_"):
            kept = sorted(told.items() - {(key, told.get(key)) for key in ("job", "instance", "rank")})
            found[name, *kept] = value
    return found


def groups(gateway):
    with urllib.request.urlopen(f"http://{gateway}/api/v1/metrics", timeout=10) as response:
        return [group["labels"] for group in json.load(response)["data"]]


# With the real program


def test_a_short_run(gateway):
    sink = PushgatewaySink(gateway)
    assert isinstance(sink, Sink)
    assert isinstance(sink, RunAware)
    sink.bind("short", 3)
    sink.describe({"model": "MLP", "job": "x"})
    readings = [Reading("loss", 1.5, 1), Reading("g", math.nan, 1), Reading("h", math.inf, 1)]
    sink.write([*readings, Reading("grad_norm", 2.0, 1, 'a"b/c'), Reading("probe_seconds", 0.5, 1)])
    found = pushed(gateway, "short")
    assert found["gradmon_loss",] == 1.5
    assert math.isnan(found["gradmon_g",])
    assert found["gradmon_h",] == math.inf
    assert found["gradmon_layer_grad_norm", ("layer", 'a"b/c')] == 2.0
    assert found["gradmon_run_info", ("job_", "x"), ("model", "MLP")] == 1
    assert found["gradmon_probe_duration_seconds_sum",] == 0.5
    assert found["gradmon_run_finished",] == 0
    assert {"job": "gradmon", "run": "short", "rank": "3"} in groups(gateway)
    sink.write([Reading("loss", 0.5, 2)])
    sink.alert(FIRING)
    sink.finish(True)
    sink.close()
    sink.close()
    found = pushed(gateway, "short")
    assert (found["gradmon_loss",], found["gradmon_last_step",]) == (0.5, 2)
    assert (found["gradmon_alerts_total",], found["gradmon_alert_ill_conditioned",]) == (1, 1)
    assert found["gradmon_run_finished",] == 1
    assert not [name for name, *_ in found if name.endswith("_created")]


@pytest.mark.parametrize("run", ["with some space", "a/b", "a/b c", "größe", "a+b%c", "x" * 300])
def test_names_of_runs(gateway, run):
    sink = PushgatewaySink(gateway, job="of names")
    sink.bind(run, 0)
    sink.write([Reading("loss", 1.5, 1)])
    sink.close()
    assert pushed(gateway, run)["gradmon_loss",] == 1.5
    assert {"job": "of names", "run": run, "rank": "0"} in groups(gateway)


def test_blanks_in_names_whatever_the_client_library_makes_of_them(monkeypatch):
    asked = []
    monkeypatch.setattr(pushgateway, "default_handler", lambda *request, **more: asked.append((request, more)))
    pushgateway._quoted("http://a+b/metrics/job/c+d/run/e%2Bf", "PUT", timeout=5)
    assert asked == [(("http://a+b/metrics/job/c%20d/run/e%2Bf", "PUT"), {"timeout": 5})]


def test_labels_of_the_users_own(gateway):
    sink = PushgatewaySink(f"http://{gateway}/", job="j", run="mine", rank=2)
    sink.bind("theirs", 0)
    sink.write([Reading("loss", 1.5, 1)])
    sink.close()
    assert {"job": "j", "run": "mine", "rank": "2"} in groups(gateway)
    assert pushed(gateway, "theirs") == {}


def test_two_runs_side_by_side(gateway):
    sinks = [PushgatewaySink(gateway, run=run) for run in ("first", "second")]
    for value, sink in enumerate(sinks):
        sink.describe({f"key{value}": value})
        sink.write([Reading("loss", value, 1)])
        sink.close()
    assert [pushed(gateway, run)["gradmon_loss",] for run in ("first", "second")] == [0, 1]


@pytest.mark.parametrize(("succeeded", "left"), [(True, False), (False, True)])
def test_deleted_when_it_came_to_its_end(gateway, succeeded, left):
    sink = PushgatewaySink(gateway, run=f"deleted {succeeded}", delete_on_finish=True)
    sink.write([Reading("loss", 1.5, 1)])
    assert pushed(gateway, f"deleted {succeeded}")["gradmon_loss",] == 1.5
    sink.finish(succeeded)
    sink.close()
    assert bool(pushed(gateway, f"deleted {succeeded}")) == left


# When it pushes, seen by a gateway of our own


@pytest.fixture
def counting():
    """A gateway that keeps the bodies of the requests it gets: its address, the bodies, and the status it answers."""
    bodies, status = [], [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(b"pushed metrics are invalid")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.005,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", bodies, status
    server.shutdown()
    server.server_close()
    thread.join()


def wait_for(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pushes_no_more_often_than_it_may(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink(address, interval=60)
    for step in range(20):
        sink.write([Reading("loss", step, step)])
        sink.alert(FIRING)
    assert len(bodies) == 1
    sink.close()
    assert len(bodies) == 2
    assert 'gradmon_loss{rank="0",run="default"} 19.0' in bodies[-1]


def test_what_was_put_off_is_pushed_when_it_is_time(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink(address, interval=1.0)
    sink.write([Reading("loss", 1.0, 1)])
    sink.alert(FIRING)
    assert len(bodies) == 1
    wait_for(lambda: len(bodies) == 2)
    assert 'gradmon_alert_ill_conditioned{rank="0",run="default"} 1.0' in bodies[-1]
    sink.close()


def test_no_pause_when_none_is_wanted(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink(address, interval=0)
    for step in range(3):
        sink.write([Reading("loss", step, step)])
    assert len(bodies) == 3
    sink.close()


def test_nothing_is_pushed_after_closing(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink(address, interval=1.0)
    for step in range(2):
        sink.write([Reading("loss", step, step)])
    sink.close()
    assert len(bodies) == 2
    time.sleep(1.3)
    assert len(bodies) == 2


def test_nothing_is_pushed_where_there_was_nothing(counting):
    address, bodies, _ = counting
    PushgatewaySink(address).close()
    assert bodies == []


def test_a_gateway_that_refuses(counting):
    address, bodies, status = counting
    status[0] = 400
    sink = PushgatewaySink(address, interval=60)
    with pytest.raises(GradmonError, match=r"Pushgateway at 127.* failed: .*400: Bad Request pushed metrics are inval"):
        sink.write([Reading("loss", 1.0, 1)])
    status[0] = 200
    sink.write([Reading("loss", 2.0, 2)])
    assert len(bodies) == 1
    sink.close()
    assert 'gradmon_readings_total{rank="0",run="default"} 2.0' in bodies[-1]


def test_a_late_failure_is_told_with_the_next_write(counting):
    address, bodies, status = counting
    sink = PushgatewaySink(address, interval=1.0)
    sink.write([Reading("loss", 1.0, 1)])
    status[0] = 500
    sink.write([Reading("loss", 2.0, 2)])
    wait_for(lambda: sink._late_error is not None)
    status[0] = 200
    with pytest.raises(GradmonError, match=r"500"):
        sink.write([Reading("loss", 3.0, 3)])
    sink.close()
    assert 'gradmon_loss{rank="0",run="default"} 3.0' in bodies[-1]


def test_a_dead_gateway_raises_and_is_not_asked_all_the_time(dead):
    sink = PushgatewaySink(dead, interval=60)
    with pytest.raises(GradmonError, match=rf"The Pushgateway at {dead} failed: .*refused"):
        sink.write([Reading("loss", 1.0, 1)])
    sink.write([Reading("loss", 2.0, 2)])
    with pytest.raises(GradmonError, match=rf"The Pushgateway at {dead} failed: .*refused"):
        sink.close()
    sink.close()


def test_a_gateway_that_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = PushgatewaySink(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
        began = time.monotonic()
        with pytest.raises(GradmonError, match=r"timed out"):
            sink.write([Reading("loss", 1.0, 1)])
        assert 0.3 <= time.monotonic() - began < 5


def test_a_gateway_that_speaks_something_else():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            client, _ = server.accept()
            with client:
                client.recv(100)
                client.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        sink = PushgatewaySink(f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(GradmonError, match=r"failed: "):
            sink.write([Reading("loss", 1.0, 1)])
        thread.join()


def test_written_from_many_threads(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink(address, interval=0.01)
    errors = []

    def work(thread):
        try:
            for step in range(30):
                sink.write([Reading(f"m{thread}", step, step)])
                sink.alert(FIRING)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    assert errors == []
    assert 'gradmon_readings_total{rank="0",run="default"} 120.0' in bodies[-1]


# Strings and errors


def test_from_a_string(counting):
    address, bodies, _ = counting
    sink = PushgatewaySink.from_spec(address)
    sink.bind("a", 0)
    sink.write([Reading("loss", 1.0, 1)])
    assert 'gradmon_loss{rank="0",run="a"} 1.0' in bodies[0]
    sink.close()


@pytest.mark.parametrize(
    "address", ["", ":9091", "host:port", "ftp://host:9091", "http://me:secret@host:9091", "host:99999", None, 9091]
)
def test_not_an_address(address):
    with pytest.raises(
        ArgumentError, match=r"`address` must be host and port, such as 'localhost:9091', or a URL with"
    ):
        PushgatewaySink(address)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"job": ""}, r"`job` must be a name\. Got ''\."),
        ({"run": ""}, r"`run` must be a name or None\. Got ''\."),
        ({"rank": -1}, r"`rank` must not be negative\. Got -1\."),
        ({"layers": -1}, r"`layers` must be a whole number that is not negative\. Got -1\."),
        ({"interval": -1}, r"`interval` must be a number of seconds that is not negative\. Got -1\."),
        ({"interval": math.nan}, r"`interval` must be a number of seconds that is not negative\. Got nan\."),
        ({"timeout": 0}, r"`timeout` must be a positive number of seconds\. Got 0\."),
        ({"timeout": math.inf}, r"`timeout` must be a positive number of seconds\. Got inf\."),
    ],
)
def test_arguments_not_accepted(given, match):
    with pytest.raises(ArgumentError, match=match):
        PushgatewaySink("localhost:9091", **given)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.bind("x", 0),
        lambda s: s.describe({}),
        lambda s: s.write([Reading("g", 1.0, 1)]),
        lambda s: s.alert(FIRING),
        lambda s: s.finish(True),
    ],
    ids=["bind", "describe", "write", "alert", "finish"],
)
def test_closed(counting, use):
    sink = PushgatewaySink(counting[0])
    sink.close()
    with pytest.raises(GradmonError, match=r"The sink of the Pushgateway at 127\.0\.0\.1:\d+ is closed\."):
        use(sink)
