import math

import pytest

from gradmon._errors import ArgumentError
from gradmon._reading import Reading
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import samples, scrape, stop_at_once, value


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


@pytest.fixture
def sink():
    sink = PrometheusSink(layers=2, linger=0)
    yield sink
    sink.close()


def layers(sink, name):
    return {
        dict(labels)["layer"]: seen
        for (full, *labels), seen in samples(sink.url).items()
        if full == f"gradmon_layer_{name}"
    }


def write(sink, name, values, step=1):
    sink.write([Reading(name, value, step, layer) for layer, value in values.items()])


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("grad_norm", 5.0),  # sqrt(3² + 4²)
        ("weight_condition", 7.0),
        ("step_ratio", 7.0),
        ("update_ratio", 4.0),
        ("of_my_own", math.nan),
    ],
)
def test_the_rest_is_one(sink, name, rest):
    write(sink, name, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    found = layers(sink, name)
    assert (found["a"], found["b"]) == (1.0, 2.0)
    assert found.pop("other") == pytest.approx(rest, rel=1e-12, nan_ok=True)
    assert found.keys() == {"a", "b"}


def test_layers_keep_their_places(sink):
    write(sink, "grad_norm", {"a": 1.0, "b": 2.0, "c": 3.0})
    write(sink, "grad_norm", {"c": 30.0, "b": 20.0, "a": 10.0}, 2)
    assert layers(sink, "grad_norm") == {"a": 10.0, "b": 20.0, "other": 30.0}


def test_the_rest_counts_what_came_in_another_write(sink):
    write(sink, "grad_norm", {"a": 1.0, "b": 2.0, "c": 3.0})
    write(sink, "grad_norm", {"d": 4.0})
    assert layers(sink, "grad_norm")["other"] == 5.0


@pytest.mark.parametrize("name", ["grad_norm", "weight_condition", "update_ratio"])
@pytest.mark.parametrize("values", [{"c": math.nan, "d": 4.0}, {"c": 4.0, "d": math.nan}])
def test_nan_in_the_rest_is_not_hidden(sink, name, values):
    write(sink, name, {"a": 1.0, "b": 2.0, **values})
    assert math.isnan(layers(sink, name)["other"])


@pytest.mark.parametrize("name", ["grad_norm", "weight_condition", "update_ratio"])
def test_infinity_in_the_rest_is_not_hidden(sink, name):
    write(sink, name, {"a": 1.0, "b": 2.0, "c": math.inf, "d": 4.0})
    assert layers(sink, name)["other"] == math.inf


def test_the_norm_of_the_rest_does_not_overflow(sink):
    write(sink, "grad_norm", {"a": 1.0, "b": 2.0, "c": 3e200, "d": 4e200})
    assert layers(sink, "grad_norm")["other"] == pytest.approx(5e200, rel=1e-12)


def test_series_that_are_not_shown_are_counted_once(sink):
    for step in range(3):
        write(sink, "grad_norm", {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, step)
        write(sink, "step_ratio", {"a": 0.1, "b": 0.2, "c": 0.7}, step)
    assert value(sink, "gradmon_dropped_series_total") == 3


def test_a_layer_with_the_name_of_the_rest(sink):
    write(sink, "grad_norm", {"other": 3.0, "a": 1.0})
    assert layers(sink, "grad_norm") == {"other": 3.0, "a": 1.0}
    assert value(sink, "gradmon_dropped_series_total") == 0
    write(sink, "grad_norm", {"other": 3.0, "a": 1.0, "b": 2.0, "c": 4.0}, 2)
    assert layers(sink, "grad_norm") == {"other": 5.0, "a": 1.0, "b": 2.0}
    write(sink, "grad_norm", {"other": 30.0, "c": 40.0}, 3)
    write(sink, "grad_norm", {"other": 9.0}, 4)
    assert layers(sink, "grad_norm")["other"] == 41.0  # sqrt(9² + 40²)


def test_no_layer_by_itself():
    with_none = PrometheusSink(layers=0, linger=0)
    write(with_none, "grad_norm", {"a": 3.0, "b": 4.0})
    assert layers(with_none, "grad_norm") == {"other": 5.0}
    with_none.close()


def test_each_run_has_its_own_layers(sink):
    second = sink.sibling("second")
    write(sink, "grad_norm", {"a": 1.0, "b": 2.0})
    write(second, "grad_norm", {"x": 3.0, "y": 4.0})
    assert value(second, "gradmon_layer_grad_norm", "second", layer="y") == 4.0
    assert value(second, "gradmon_dropped_series_total", "second") == 0
    second.close()


def test_64_layers_unless_told():
    sink = PrometheusSink(linger=0)
    write(sink, "grad_norm", {f"layer{i}": 1.0 for i in range(80)})
    found = layers(sink, "grad_norm")
    assert len(found) == 65
    assert found["other"] == 4.0
    sink.close()


def test_help_says_what_the_rest_is(sink):
    write(sink, "update_ratio", {"a": 1.0})
    text = scrape(sink.url)["gradmon_layer_update_ratio"].documentation
    assert text.endswith('(one layer; layer="other": the largest of the rest)')


@pytest.mark.parametrize("given", [-1, 1.5, True, None])
def test_not_a_number_of_layers(given):
    with pytest.raises(ArgumentError, match=r"`layers` must be a whole number that is not negative\. Got "):
        PrometheusSink(layers=given)
