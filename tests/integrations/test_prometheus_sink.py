import math
import time
import urllib.error
from types import SimpleNamespace

import prometheus_client
import pytest

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks import RunAware, Sink, make_sink
from gradmon_integrations.sinks import _catalogue
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import samples, scrape, stop_at_once, value

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    known = {"weight_condition": SimpleNamespace(group="step-consistency", meaning="How much h changes.\nRelative.")}
    monkeypatch.setattr(_catalogue, "_metric", known.get)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


@pytest.fixture
def sink():
    sink = PrometheusSink(linger=0)
    yield sink
    sink.close()


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
    assert families["gradmon_layer_weight_condition"].documentation == (
        'How much h changes.\nRelative. (one layer\'s part; layer="other": the sum over the rest)'
    )
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
        ("a:b", "gradmon_a_b"),
        ("alerts", "gradmon_alerts_"),
        ("alerts_total", "gradmon_alerts_total_"),
        ("probe_duration_seconds_sum", "gradmon_probe_duration_seconds_sum_"),
        ("run_info", "gradmon_run_info_"),
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


def test_readings_own_counters_and_probe_duration(sink):
    sink.bind("a", 0)
    fresh = samples(sink.url)
    assert fresh["gradmon_readings_total", ("rank", "0"), ("run", "a")] == 0
    sink.write(
        [
            Reading("monitor_failures", 2.0, 10),
            Reading("sink_errors", 3.0, 10),
            Reading("sink_dropped", 4.0, 10),
            Reading("probe_seconds", 0.02, 10),
            Reading("monitor_overhead", 0.03, 10),
        ]
    )
    sink.write([Reading("monitor_failures", 5.0, 20), Reading("probe_seconds", 0.5, 20)])
    sink.write([Reading("monitor_failures", math.nan, 30), Reading("probe_seconds", math.nan, 30)])
    assert value(sink, "gradmon_readings_total", "a") == 9
    assert value(sink, "gradmon_monitor_failures_total", "a") == 5
    assert value(sink, "gradmon_sink_errors_total", "a") == 3
    assert value(sink, "gradmon_sink_dropped_total", "a") == 4
    assert value(sink, "gradmon_monitor_overhead", "a") == 0.03
    assert value(sink, "gradmon_probe_duration_seconds_count", "a") == 2
    assert value(sink, "gradmon_probe_duration_seconds_sum", "a") == pytest.approx(0.52, rel=1e-12)
    buckets = {
        float(dict(labels)["le"]): seen
        for (name, *labels), seen in samples(sink.url).items()
        if name == "gradmon_probe_duration_seconds_bucket"
    }
    assert (buckets[0.01], buckets[0.03], buckets[0.3], buckets[1.0], buckets[math.inf]) == (0, 1, 1, 2, 2)
    names = {name for name, *_ in samples(sink.url)}
    assert not names & {"gradmon_probe_seconds", "gradmon_monitor_failures", "gradmon_sink_errors"}


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_durations_that_cannot_be_are_left_out(sink, seconds):
    sink.write([Reading("probe_seconds", seconds, 1), Reading("probe_seconds", 0.003, 2)])
    assert value(sink, "gradmon_probe_duration_seconds_sum") == 0.003
    assert value(sink, "gradmon_probe_duration_seconds_bucket", le="0.003") == 1


def test_a_value_that_is_no_number_does_not_break_the_scrape(sink):
    with pytest.raises((TypeError, ValueError)):
        sink.write([Reading("g", "high", 1)])
    sink.write([Reading("g", 2, 1)])
    assert value(sink, "gradmon_g") == 2.0


def test_text_that_utf8_cannot_say(sink):
    sink.bind("run-\udcff", 0)
    sink.describe({"path": "\udcff"})
    sink.write([Reading("g", 1.0, 1, layer="\udc80")])
    assert value(sink, "gradmon_layer_g", "run-?", layer="?") == 1.0


# The run


def test_a_run_starts_and_ends(sink):
    before = time.time()
    sink.bind("a", 0)
    assert before <= value(sink, "gradmon_run_start_timestamp_seconds", "a") <= time.time()
    assert value(sink, "gradmon_run_finished", "a") == 0
    sink.finish(True)
    assert value(sink, "gradmon_run_finished", "a") == 1


def test_a_run_that_failed_is_not_finished(sink):
    sink.bind("a", 0)
    sink.finish(False)
    assert value(sink, "gradmon_run_finished", "a") == 0


def test_a_resumed_run_goes_on_counting(sink):
    sink.bind("a", 0)
    sink.write([Reading("g", 1.0, 1)])
    sink.alert(FIRING)
    sink.finish(True)
    sink.bind("a", 0)
    assert value(sink, "gradmon_run_finished", "a") == 0
    assert value(sink, "gradmon_alerts_firing", "a") == 1
    sink.write([Reading("g", 2.0, 2)])
    sink.alert(FIRING._replace(state="resolved"))
    assert value(sink, "gradmon_g", "a") == 2.0
    assert value(sink, "gradmon_readings_total", "a") == 2
    assert value(sink, "gradmon_alerts_total", "a") == 1
    assert value(sink, "gradmon_alerts_firing", "a") == 0


def test_alerts_of_one_run_do_not_fire_in_the_next(sink):
    sink.bind("a", 0)
    sink.alert(FIRING)
    sink.bind("b", 0)
    assert (value(sink, "gradmon_alerts_firing", "a"), value(sink, "gradmon_alerts_firing", "b")) == (1, 0)


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
    first = PrometheusSink(run="a", linger=0)
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
    with pytest.raises(
        ArgumentError, match=rf"`port` must be free on 127\.0\.0\.1; .* `sibling`.*\. Got {sink.port}\."
    ):
        PrometheusSink(sink.port)


def test_port_not_allowed(monkeypatch):
    def refuse(*_, **__):
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
    [
        lambda s: s.bind("x", 0),
        lambda s: s.describe({}),
        lambda s: s.write([Reading("g", 1.0, 1)]),
        lambda s: s.alert(FIRING),
        lambda s: s.finish(True),
        lambda s: s.sibling("x"),
    ],
    ids=["bind", "describe", "write", "alert", "finish", "sibling"],
)
def test_closed(use):
    sink = PrometheusSink()
    sink.close()
    with pytest.raises(GradmonError, match=r"The sink of http://127\.0\.0\.1:\d+/metrics is closed\."):
        use(sink)
