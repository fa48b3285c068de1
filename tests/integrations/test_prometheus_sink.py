import math
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks import RunAware, Sink, make_sink
from gradmon_integrations.sinks import _catalogue
from gradmon_integrations.sinks.prometheus import PrometheusSink

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    known = {"weight_condition": SimpleNamespace(group="step-consistency", meaning="How much h changes.\nRelative.")}
    monkeypatch.setattr(_catalogue, "_metric", known.get)


@pytest.fixture
def sink():
    sink = PrometheusSink()
    yield sink
    sink.close()


def scrape(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(url):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in scrape(url).values()
        for sample in family.samples
    }


def value(sink, name, run="default", rank="0", **labels):
    return samples(sink.url)[(name, *sorted({"run": run, "rank": rank, **labels}.items()))]


def test_readings_are_gauges(sink):
    sink.write(
        [
            Reading("weight_condition", 3.25, 10),
            Reading("weight_condition", 1.5, 10, layer='a"b\\c.0'),
            Reading("loss", math.nan, 10),
            Reading("noise_scale", math.inf, 10),
        ]
    )
    sink.write([Reading("weight_condition", 3.5, 20)])
    assert value(sink, "gradmon_weight_condition") == 3.5
    assert value(sink, "gradmon_layer_weight_condition", layer='a"b\\c.0') == 1.5
    assert math.isnan(value(sink, "gradmon_loss"))
    assert value(sink, "gradmon_noise_scale") == math.inf
    families = scrape(sink.url)
    assert families["gradmon_weight_condition"].type == "gauge"
    assert families["gradmon_weight_condition"].documentation == "How much h changes.\nRelative."
    assert families["gradmon_layer_weight_condition"].documentation == "How much h changes.\nRelative. (one layer)"
    assert families["gradmon_loss"].documentation == "loss"


def test_step_and_time_of_the_last_probe(sink):
    before = time.time()
    sink.write([Reading("g", 1.0, 10), Reading("h", 1.0)])
    assert before <= value(sink, "gradmon_last_probe_timestamp_seconds") <= time.time()
    assert value(sink, "gradmon_last_step") == 10
    sink.write([Reading("g", 1.0)])
    assert value(sink, "gradmon_last_step") == 10


def test_alerts_are_counted(sink):
    sink.write([Reading("g", 1.0, 1)])
    assert value(sink, "gradmon_alerts_firing") == 0
    sink.alert(FIRING)
    sink.alert(FIRING)
    sink.alert(FIRING._replace(layer=None))
    assert value(sink, "gradmon_alerts_firing") == 2
    sink.alert(FIRING._replace(state="resolved"))
    sink.alert(FIRING._replace(state="resolved", rule="never_fired"))
    assert value(sink, "gradmon_alerts_firing") == 1
    sink.alert(FIRING)
    assert value(sink, "gradmon_alerts_total") == 3
    assert value(sink, "gradmon_alert_ill_conditioned") == 2
    assert value(sink, "gradmon_alert_never_fired") == 0


@pytest.mark.parametrize(
    ("name", "exposed"),
    [
        ("my.grad-norm/total", "gradmon_my_grad_norm_total"),
        ("größe", "gradmon_gr__e"),
        ("alerts", "gradmon_alerts_"),
        ("last_step", "gradmon_last_step_"),
    ],
)
def test_names_are_made_valid_and_kept_apart(sink, name, exposed):
    sink.write([Reading(name, 7.0, 1)])
    assert value(sink, exposed) == 7.0
    assert value(sink, "gradmon_last_step") == 1


def test_names_that_become_the_same_are_kept_apart(sink):
    sink.write([Reading("a.b", 1.0, 1), Reading("a-b", 2.0, 1), Reading("layer_g", 3.0, 1), Reading("g", 4.0, 1, "fc")])
    assert value(sink, "gradmon_a_b") == 1.0
    assert value(sink, "gradmon_a_b_") == 2.0
    assert value(sink, "gradmon_layer_g") == 3.0
    assert value(sink, "gradmon_layer_g_", layer="fc") == 4.0


def test_global_registry_is_left_alone(sink):
    sink.write([Reading("g", 1.0, 1)])
    assert b"gradmon" not in prometheus_client.generate_latest()
    assert not [name for name, *_ in samples(sink.url) if not name.startswith("gradmon_")]


def test_children_are_cached(sink):
    sink.write([Reading("g", 1.0, 1)])
    assert sink._child("g", None) is sink._child("g", None)


# Labels


def test_monitor_gives_the_labels(sink):
    assert isinstance(sink, RunAware)
    sink.bind("mlp-1", 3)
    sink.write([Reading("g", 1.0, 1)])
    assert value(sink, "gradmon_g", "mlp-1", "3") == 1.0


def test_user_labels_win():
    sink = PrometheusSink(run="mine", rank=1)
    sink.bind("mlp-1", 3)
    sink.write([Reading("g", 1.0, 1)])
    assert value(sink, "gradmon_g", "mine", "1") == 1.0
    sink.close()


def test_bound_again_writes_under_the_new_labels(sink):
    sink.bind("a", 0)
    sink.write([Reading("g", 1.0, 1)])
    sink.bind("b", 0)
    sink.write([Reading("g", 2.0, 1)])
    assert (value(sink, "gradmon_g", "a"), value(sink, "gradmon_g", "b")) == (1.0, 2.0)


# Siblings


def test_siblings_share_server_and_gauges():
    first = PrometheusSink(run="a")
    second = first.sibling("b", rank=1)
    assert second.url == first.url
    assert isinstance(second, Sink)
    second.bind("other", 5)
    first.write([Reading("g", 1.0, 1)])
    second.write([Reading("g", 2.0, 7)])
    second.alert(FIRING)
    assert value(first, "gradmon_g", "a") == 1.0
    assert value(first, "gradmon_g", "b", "1") == 2.0
    assert (value(first, "gradmon_last_step", "a"), value(first, "gradmon_last_step", "b", "1")) == (1, 7)
    assert (value(first, "gradmon_alerts_firing", "a"), value(first, "gradmon_alerts_firing", "b", "1")) == (0, 1)
    first.close()
    first.close()
    second.write([Reading("g", 3.0, 8)])
    assert value(second, "gradmon_g", "b", "1") == 3.0
    second.close()
    with pytest.raises(urllib.error.URLError):
        scrape(second.url)


# Server


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


def test_scraped_and_written_from_many_threads():
    first = PrometheusSink(run="0")
    sinks = [first, *(first.sibling(str(i)) for i in range(1, 4))]
    errors = []

    def work(sink):
        try:
            for step in range(50):
                sink.write([Reading(f"m{step}", float(step), step), Reading("g", 1.0, step, layer=str(step))])
                sink.alert(FIRING)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(sink,)) for sink in sinks]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scrape(first.url)
    for thread in threads:
        thread.join()
    assert errors == []
    seen = samples(first.url)
    for i in range(4):
        assert seen["gradmon_m49", ("rank", "0"), ("run", str(i))] == 49
        assert seen["gradmon_layer_g", ("layer", "49"), ("rank", "0"), ("run", str(i))] == 1
    for sink in sinks:
        sink.close()


# Strings and errors


def test_from_a_string():
    sink = make_sink("prometheus:0")
    assert isinstance(sink, PrometheusSink)
    sink.close()
    sink = make_sink("prometheus:0.0.0.0:0")
    assert sink._exporter._server.server_address[0] == "0.0.0.0"
    sink.close()


@pytest.mark.parametrize("spec", ["prometheus", "prometheus:", "prometheus:http", "prometheus:localhost:"])
def test_string_without_port(spec):
    with pytest.raises(ArgumentError, match=r"`port` must be given, as in 'prometheus:9464'\. Got 'prometheus:"):
        make_sink(spec)


@pytest.mark.parametrize("port", [-1, 65536, 1.5, "9464", True, None])
def test_port_out_of_range(port):
    with pytest.raises(ArgumentError, match=r"`port` must be a whole number in \[0, 65535\]\. Got "):
        PrometheusSink(port)


def test_port_taken(sink):
    with pytest.raises(ArgumentError, match=rf"`port` must be free on 127\.0\.0\.1; .* `sibling`\. Got {sink.port}\."):
        PrometheusSink(sink.port)


def test_port_not_allowed(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gradmon_integrations.sinks._exporter.start_http_server", refuse)
    with pytest.raises(ArgumentError, match=r"`port` must be one that this user may listen on\. Got 80\."):
        PrometheusSink(80)


def test_address_of_another_machine():
    with pytest.raises(
        ArgumentError, match=r"`address` must be an address of this machine \(.*\)\. Got '192\.0\.2\.1'"
    ):
        PrometheusSink(address="192.0.2.1")
    with pytest.raises(ArgumentError, match=r"`address` must be a host name or an IP address\. Got ''\."):
        PrometheusSink(address="")


def test_labels_not_accepted(sink):
    with pytest.raises(ArgumentError, match=r"`run` must be a name or None\. Got ''\."):
        PrometheusSink(run="")
    with pytest.raises(ArgumentError, match=r"`rank` must not be negative\. Got -1\."):
        PrometheusSink(rank=-1)
    with pytest.raises(ArgumentError, match=r"`run` must be a name or None\. Got ''\."):
        sink.sibling("")
    with pytest.raises(ArgumentError, match=r"`rank` must not be negative\. Got -1\."):
        sink.sibling("x", rank=-1)


@pytest.mark.parametrize(
    "use",
    [lambda s: s.write([Reading("g", 1.0, 1)]), lambda s: s.alert(FIRING), lambda s: s.sibling("x")],
    ids=["write", "alert", "sibling"],
)
def test_closed(use):
    sink = PrometheusSink()
    sink.close()
    with pytest.raises(GradmonError, match=r"The sink of http://127\.0\.0\.1:\d+/metrics is closed\."):
        use(sink)
