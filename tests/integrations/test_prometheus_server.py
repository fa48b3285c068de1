"""The server of the sink: where it listens, when it stops, and many threads at once."""

import itertools
import socket
import sys
import threading
import time

import pytest

from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import OPENMETRICS, samples, scrape, stop_at_once, value

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


@pytest.fixture
def sink():
    sink = PrometheusSink(linger=0)
    yield sink
    sink.close()


def test_close_frees_the_port_and_ends_the_thread():
    sink = PrometheusSink()
    port = sink.port
    scrape(sink.url)
    sink.close()
    sink.close()
    assert not sink._exporter._thread.is_alive()
    again = PrometheusSink(port)
    assert again.port == port
    again.close()


def test_url_tells_the_real_port(sink):
    assert sink.port > 0
    assert sink.url == f"http://127.0.0.1:{sink.port}/metrics"


def test_listens_on_loopback_only_unless_told(sink):
    assert sink._exporter._server.server_address[0] == "127.0.0.1"
    everywhere = PrometheusSink(address="0.0.0.0")
    assert everywhere._exporter._server.server_address[0] == "0.0.0.0"
    assert everywhere.url == f"http://127.0.0.1:{everywhere.port}/metrics"
    everywhere.close()


def test_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    sink = PrometheusSink(address="::1", run="x")
    sink.write([Reading("g", 1.0, 1)])
    assert sink.url == f"http://[::1]:{sink.port}/metrics"
    assert value(sink, "gradmon_g", "x") == 1.0
    sink.close()


@pytest.fixture
def hasty():
    """Threads that take turns fifty times as often as they usually do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 50)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
def test_scraped_and_written_from_many_threads():
    first = PrometheusSink(run="0", linger=0)
    sinks = [first, *(first.sibling(str(i)) for i in range(1, 4))]
    errors, enough = [], threading.Event()

    def work(sink):
        try:
            for round_ in itertools.count():
                step = round_ % 50
                # "last" comes late, so that a scrape has much to do between the two that must be the same.
                names = ["first", f"m{step}", *(["last"] if round_ >= 50 else [])]
                sink.write([*(Reading(name, round_, round_) for name in names), Reading("g", 1.0, step, str(step))])
                sink.describe({f"key{step}": step})
                sink.alert(FIRING)
                if round_ >= 50 and enough.is_set():
                    break
                time.sleep(0.001)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(sink,), daemon=True) for sink in sinks]
    for thread in threads:
        thread.start()
    seen_twice = []
    for accept in ["text/plain", OPENMETRICS] * 10:
        families = scrape(first.url, accept)
        if "gradmon_last" in families:
            one, other = (
                {sample.labels["run"]: sample.value for sample in families[name].samples}
                for name in ("gradmon_first", "gradmon_last")
            )
            seen_twice += [(one[run], other[run]) for run in other]
    enough.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert seen_twice
    assert [pair for pair in seen_twice if pair[0] != pair[1]] == []
    seen = samples(first.url)
    for i in range(4):
        assert seen["gradmon_m49", ("rank", "0"), ("run", str(i))] % 50 == 49
        assert seen["gradmon_layer_g", ("layer", "49"), ("rank", "0"), ("run", str(i))] == 1
        assert seen["gradmon_alerts_total", ("rank", "0"), ("run", str(i))] == 1
    for sink in sinks:
        sink.close()
