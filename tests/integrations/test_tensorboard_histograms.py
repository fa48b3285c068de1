import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmon._reading import Reading
from gradmon_integrations.sinks.tensorboard import TensorBoardSink


def histograms(logdir, name):
    accumulator = EventAccumulator(str(logdir), size_guidance={"histograms": 0})
    accumulator.Reload()
    tag = f"layers/{name}"
    if tag not in accumulator.Tags()["histograms"]:
        return []
    return [(event.step, event.histogram_value) for event in accumulator.Histograms(tag)]


def of_layers(name, values, step):
    return [Reading(name, value, step, layer=f"l{i}") for i, value in enumerate(values)]


def test_a_histogram_counts_the_layers(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([*of_layers("grad_norm", [1.0, 1.0, 2.0, 5.0], 3), Reading("grad_norm", 9.0, 3)])
    sink.close()
    ((step, found),) = histograms(tmp_path, "grad_norm")
    assert (step, found.num, found.min, found.max, found.sum) == (3, 4, 1.0, 5.0, 9.0)
    # Bins with their right-hand limits, the first of them empty, to tell where the second begins.
    assert found.bucket_limit == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert found.bucket == [0, 2, 1, 0, 1]


def test_one_metric_has_one_in_so_many_writes(tmp_path):
    sink = TensorBoardSink(tmp_path, histogram_every=3)
    for step in range(1, 9):
        sink.write(of_layers("grad_norm", [1.0, 2.0, 3.0, 4.0], step))
        if step in (2, 3):
            sink.write(of_layers("weight_condition", [0.1, 0.2, 0.3, 0.4], step))
    sink.close()
    assert [step for step, _ in histograms(tmp_path, "grad_norm")] == [1, 3, 5, 8]
    assert [step for step, _ in histograms(tmp_path, "weight_condition")] == [2]


def test_the_default_is_every_ten_writes(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 25):
        sink.write(of_layers("grad_norm", [1.0, 2.0, 3.0, 4.0], step))
    sink.close()
    assert [step for step, _ in histograms(tmp_path, "grad_norm")] == [1, 11, 21]


def test_few_layers_have_none(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(of_layers("grad_norm", [1.0, 2.0, 3.0], 1))
    sink.write(of_layers("update_ratio", [1.0, 2.0, 3.0, math.nan, math.inf], 1))
    sink.close()
    assert histograms(tmp_path, "grad_norm") == []
    assert histograms(tmp_path, "update_ratio") == []


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 6,
        [1.0] * 6,
        [1.0, 1.0, 1.0, 1.0 + 1e-15],
        [1e-300, 2e-300, 1e-310, 0.0],
        [3e38, 1e-38, 1.0, -3e38],
        [0.5] * 200 + [math.nan],
    ],
)
def test_no_values_are_too_hard(tmp_path, values):
    sink = TensorBoardSink(tmp_path)
    sink.write(of_layers("grad_norm", values, 1))
    sink.close()
    ((_, found),) = histograms(tmp_path, "grad_norm")
    assert sum(found.bucket) == sum(math.isfinite(value) for value in values)
    assert list(found.bucket_limit) == sorted(found.bucket_limit)
