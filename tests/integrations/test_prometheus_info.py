import pytest

from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import OPENMETRICS, scrape, stop_at_once


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


@pytest.fixture
def sink():
    sink = PrometheusSink(linger=0)
    yield sink
    sink.close()


def infos(sink, accept="text/plain"):
    """The labels of each run, by its name."""
    family = scrape(sink.url, accept)["gradmon_run" if accept == OPENMETRICS else "gradmon_run_info"]
    assert {(sample.name, sample.value) for sample in family.samples} == {("gradmon_run_info", 1.0)}
    return {sample.labels["run"]: sample.labels for sample in family.samples}


@pytest.mark.parametrize("accept", ["text/plain", OPENMETRICS])
def test_what_describes_a_run(sink, accept):
    sink.bind("a", 1)
    sink.describe({"model": "MLP", "parameters": 1000, "learning_rate": 0.1, "passive": False, "seed": 0})
    assert infos(sink, accept) == {
        "a": {
            "run": "a",
            "rank": "1",
            "model": "MLP",
            "parameters": "1000",
            "learning_rate": "0.1",
            "passive": "false",
            "seed": "0",
        }
    }


def test_runs_that_are_described_differently(sink):
    second = sink.sibling("b")
    sink.bind("a", 0)
    sink.describe({"optimizer": "SGD", "momentum": "0.9"})
    second.describe({"optimizer": "AdamW", "betas": "(0.9, 0.999)"})
    assert infos(sink) == {
        "a": {"run": "a", "rank": "0", "optimizer": "SGD", "momentum": "0.9", "betas": ""},
        "b": {"run": "b", "rank": "0", "optimizer": "AdamW", "momentum": "", "betas": "(0.9, 0.999)"},
    }
    second.close()


def test_a_run_described_again(sink):
    sink.bind("a", 0)
    sink.describe({"seed": 0, "old": 1})
    sink.describe({"seed": 1})
    assert infos(sink) == {"a": {"run": "a", "rank": "0", "seed": "1"}}


def test_keys_that_prometheus_would_take_amiss(sink):
    sink.bind("a", 0)
    sink.describe(
        {
            "job": "j",
            "instance": "i",
            "run": "r",
            "rank": 5,
            "le": 1,
            "lr.max": 1,
            "lr-max": 2,
            "1st": 3,
            "__address__": 4,
            "": 6,
            "größe": 7,
        }
    )
    assert infos(sink)["a"] == {
        "run": "a",
        "rank": "0",
        "job_": "j",
        "instance_": "i",
        "run_": "r",
        "rank_": "5",
        "le_": "1",
        "lr_max": "1",
        "lr_max_": "2",
        "_1st": "3",
        "_address__": "4",
        "_": "6",
        "gr__e": "7",
    }


def test_values_are_free_text(sink):
    sink.bind("a", 0)
    said = 'two\nlines, "quoted", back\\slash, größe'
    sink.describe({"note": said})
    assert infos(sink)["a"]["note"] == said


def test_without_a_description_there_is_none(sink):
    sink.bind("a", 0)
    assert "gradmon_run_info" not in scrape(sink.url)
