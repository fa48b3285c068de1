import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks import Sink, make_sink
from gradmon_integrations.sinks import _catalogue
from gradmon_integrations.sinks._catalogue import metric_group, metric_meaning
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    known = {
        "weight_condition": SimpleNamespace(group="step-consistency"),
        "gradient_rank": SimpleNamespace(group="batch-dissonance"),
    }
    monkeypatch.setattr(_catalogue, "_metric", known.get)


def events(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(logdir, tag):
    return [(event.step, event.value) for event in events(logdir).Scalars(tag)]


def texts(logdir, tag):
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events(logdir).Tensors(f"{tag}/text_summary")
    ]


def test_tags_are_grouped(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(
        [
            Reading("weight_condition", 3.25, 10),
            Reading("gradient_rank", 0.5, 10),
            Reading("probe_seconds", 0.125, 10),
            Reading("weight_condition", 1.5, 10, layer="blocks.0.fc"),
        ]
    )
    sink.write([Reading("weight_condition", 3.5, 20)])
    sink.close()
    assert set(events(tmp_path).Tags()["scalars"]) == {
        "step-consistency/weight_condition",
        "batch-dissonance/gradient_rank",
        "gradmon/probe_seconds",
        "layer-weight_condition/blocks.0.fc",
    }
    assert scalars(tmp_path, "step-consistency/weight_condition") == [(10, 3.25), (20, 3.5)]
    assert scalars(tmp_path, "layer-weight_condition/blocks.0.fc") == [(10, 1.5)]


def test_nan_and_infinity_are_written(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([Reading("g", math.nan, 1, reason="zero gradient")])
    sink.write([Reading("g", math.inf, 2)])
    sink.close()
    (_, first), (_, second) = scalars(tmp_path, "gradmon/g")
    assert math.isnan(first)
    assert second == math.inf


def test_without_steps_the_writes_are_counted(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for _ in range(3):
        sink.write([Reading("g", 1.0), Reading("h", 2.0)])
    sink.alert(FIRING._replace(step=None))
    sink.close()
    assert [step for step, _ in scalars(tmp_path, "gradmon/g")] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "gradmon/h")] == [1, 2, 3]
    assert [step for step, _ in texts(tmp_path, "alerts/ill_conditioned")] == [3]


def test_alert_is_markdown_text_and_readable_at_once(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.alert(FIRING)
    sink.alert(FIRING._replace(state="resolved", step=20, layer=None, remedy=""))
    assert texts(tmp_path, "alerts/ill_conditioned") == [
        (
            10,
            "**firing** (warning) in `fc`, value 12.5\n\n12.5 is above 10.\n\n**Remedy:** Lower the learning rate.",
        ),
        (20, "**resolved** (warning), value 12.5\n\n12.5 is above 10."),
    ]
    sink.close()


def test_from_a_string(tmp_path):
    sink = make_sink(f"tensorboard:{tmp_path}/run")
    assert isinstance(sink, TensorBoardSink)
    assert isinstance(sink, Sink)
    assert sink.logdir == f"{tmp_path}/run"
    sink.close()


def test_importing_the_sink_does_not_import_tensorboard():
    program = "import sys, gradmon_integrations.sinks.tensorboard; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("logdir", ["", None, 3])
def test_no_directory(logdir):
    with pytest.raises(ArgumentError, match=r"`logdir` must be the path of a directory\. Got (''|None|3)\."):
        TensorBoardSink(logdir)


def test_directory_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"`logdir` must be the path of a directory\. Got the file .*/file\."):
        TensorBoardSink(tmp_path / "file")


@pytest.mark.parametrize("seconds", [0, -1])
def test_flush_secs_not_positive(tmp_path, seconds):
    with pytest.raises(ArgumentError, match=rf"`flush_secs` must be positive\. Got {seconds}\."):
        TensorBoardSink(tmp_path, flush_secs=seconds)


def test_closed(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.close()
    sink.close()
    with pytest.raises(GradmonError, match=r"The sink of .* is closed\."):
        sink.write([Reading("g", 1.0, 1)])
    with pytest.raises(GradmonError, match=r"The sink of .* is closed\."):
        sink.alert(FIRING)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_core_names_a_group_for_each_of_its_metrics(monkeypatch):
    monkeypatch.undo()
    from gradmon.metrics import METRICS

    groups = {"step-consistency", "batch-dissonance", "variance-sources", "health"}
    assert {metric_group(name) for name in METRICS} == groups
    assert all(metric_meaning(name) for name in METRICS)
    assert metric_group("probe_seconds") == "gradmon"
    assert metric_meaning("probe_seconds") == ""
