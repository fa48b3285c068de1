"""What is served, as programs other than the client library read it."""

import math
import os
import re
import shutil
import subprocess
import sys

import prometheus_client
import pytest

from gradmon._reading import Alert, Reading
from gradmon.metrics import METRICS
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import OPENMETRICS, fetch, scrape, stop_at_once

OWN = ("learning_rate", "batch_size", "monitor_overhead", "probe_seconds", "monitor_failures", "sink_errors")
RULES = ("nonfinite", "exploding", "ill_conditioned", "update_ratio_out_of_range", "dead_layer", "sink_errors")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


@pytest.fixture
def sink():
    sink = PrometheusSink(layers=3, linger=0)
    yield sink
    sink.close()


def fill(sink):
    """Two probes with everything there is, NaN, infinity and too many layers included."""
    sink.bind("mlp-1", 0)
    sink.describe({"model": "MLP", "learning_rate": 0.1, "hidden.units": 512, "passive": True})
    names = [*METRICS, *OWN, "sink_dropped"]
    for step in (10, 20):
        whole = [Reading(name, 0.125 * step, step) for name in names]
        layered = [Reading(name, 0.5, step, f"layers.{i}") for name in METRICS for i in range(5)]
        sink.write([*whole, *layered, Reading("loss", math.nan, step), Reading("noise_scale", math.inf, step)])
        for rule in RULES:
            sink.alert(Alert(rule, "warning", "firing", 1.0, step, None, "Seen.", "Change it."))
    sink.finish(True)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_about(sink):
    fill(sink)
    text = fetch(sink.url)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_complains_where_there_is_something_wrong():
    text = "# TYPE gradmonLoss counter\ngradmonLoss 1\n"
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode != 0


def test_every_family_has_a_help_text(sink):
    fill(sink)
    families = scrape(sink.url)
    assert len(families) > 2 * len(METRICS)
    assert [name for name, family in families.items() if len(family.documentation) < 15] == []


def test_both_formats_say_the_same(sink):
    fill(sink)
    plain, open_ = (
        {
            (sample.name, *sorted(sample.labels.items())): repr(sample.value)
            for family in scrape(sink.url, accept).values()
            for sample in family.samples
        }
        for accept in ("text/plain", OPENMETRICS)
    )
    assert plain == open_


@pytest.mark.parametrize("accept", ["text/plain", OPENMETRICS])
def test_no_series_of_when_a_series_was_created(sink, accept):
    fill(sink)
    assert "_created" not in fetch(sink.url, accept)
    # What the program itself exports is as it was.
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("own", "A counter of the program.", registry=registry)
    assert b"own_created" in prometheus_client.generate_latest(registry)


def test_some_families_by_name(sink):
    fill(sink)
    names = "gradmon_run_info", "gradmon_loss", "gradmon_readings_total", "gradmon_probe_duration_seconds_count"
    found = fetch(sink.url + "?" + "&".join(f"name[]={name}" for name in names))
    assert {line.split("{")[0] for line in found.splitlines() if not line.startswith("#")} == set(names)


# Exemplars


def exemplars(sink):
    """What exemplars there are, by the sample's name and its bucket."""
    return {
        (sample.name, sample.labels.get("le")): (sample.exemplar.labels, sample.exemplar.value)
        for family in scrape(sink.url, OPENMETRICS).values()
        for sample in family.samples
        if sample.exemplar
    }


def test_exemplars_tell_the_step(sink):
    sink.write([Reading("probe_seconds", 0.02, 324), Reading("loss", 1.0, 324)])
    sink.write([Reading("probe_seconds", 0.5, 325)])
    assert exemplars(sink) == {
        ("gradmon_readings_total", None): ({"step": "325"}, 1.0),
        ("gradmon_probe_duration_seconds_bucket", "0.03"): ({"step": "324"}, 0.02),
        ("gradmon_probe_duration_seconds_bucket", "1.0"): ({"step": "325"}, 0.5),
    }
    assert "# {" not in fetch(sink.url)


def test_without_a_step_there_is_no_exemplar(sink):
    sink.write([Reading("probe_seconds", 0.02), Reading("loss", 1.0)])
    assert exemplars(sink) == {}


def test_units(sink):
    fill(sink)
    units = dict(re.findall(r"^# UNIT (\S+) (\S+)$", fetch(sink.url, OPENMETRICS), re.MULTILINE))
    assert units["gradmon_probe_duration_seconds"] == "seconds"
    assert units["gradmon_last_probe_timestamp_seconds"] == "seconds"


def test_the_programs_own_multiprocess_export_is_left_alone(tmp_path):
    program = """
import os, urllib.request
from gradmon._reading import Reading
from gradmon_integrations.sinks.prometheus import PrometheusSink
sink = PrometheusSink(linger=0)
sink.bind("a", 0)
sink.write([Reading("loss", 1.5, 7), Reading("probe_seconds", 0.5, 7)])
print(urllib.request.urlopen(sink.url, timeout=10).read().decode())
sink.close()
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert 'gradmon_loss{rank="0",run="a"} 1.5' in done.stdout
    assert list(tmp_path.iterdir()) == []
