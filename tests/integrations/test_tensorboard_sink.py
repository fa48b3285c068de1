import math
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2

from gradmon._errors import ArgumentError, GradmonError
from gradmon._reading import Alert, Reading
from gradmon.sinks import Sink, make_sink
from gradmon.sinks.base import EndAware, InfoAware, RunAware
from gradmon_integrations.sinks import _tensorboard_events
from gradmon_integrations.sinks._catalogue import metric_group, metric_meaning, metric_remedy
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")


def events(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def raw_events(logdir):
    (path,) = logdir.glob("events.*")
    return [event_pb2.Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]


def scalars(logdir, tag):
    return [(event.step, event.value) for event in events(logdir).Scalars(tag)]


def texts(logdir, tag):
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events(logdir).Tensors(f"{tag}/text_summary")
    ]


def test_it_can_all_that_a_monitor_asks_for(tmp_path):
    sink = TensorBoardSink(tmp_path)
    assert isinstance(sink, Sink)
    assert isinstance(sink, RunAware)
    assert isinstance(sink, InfoAware)
    assert isinstance(sink, EndAware)
    sink.close()


def test_tags_are_grouped(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(
        [
            Reading("weight_cosine", 3.25, 10),
            Reading("gradient_rank", 0.5, 10),
            Reading("learning_rate", 0.25, 10),
            Reading("batch_size", 32.0, 10),
            Reading("probe_seconds", 0.125, 10),
            Reading("sink_dropped", 0.0, 10),
            Reading("my_metric", 7.0, 10),
            Reading("weight_condition", 1.5, 10, layer="blocks.0.fc"),
        ]
    )
    sink.write([Reading("weight_cosine", 3.5, 20)])
    sink.close()
    assert set(events(tmp_path).Tags()["scalars"]) == {
        "step-consistency/weight_cosine",
        "batch-dissonance/gradient_rank",
        "health/learning_rate",
        "health/batch_size",
        "monitor/probe_seconds",
        "monitor/sink_dropped",
        "gradmon/my_metric",
        "layer-weight_condition/blocks.0.fc",
    }
    assert scalars(tmp_path, "step-consistency/weight_cosine") == [(10, 3.25), (20, 3.5)]
    assert scalars(tmp_path, "layer-weight_condition/blocks.0.fc") == [(10, 1.5)]


def test_what_varies_by_decades_has_its_logarithm_beside_it(tmp_path):
    sink = TensorBoardSink(tmp_path)
    values = [1000.0, 0.0, -2.0, math.nan, math.inf]
    for step, value in enumerate(values):
        sink.write([Reading("weight_condition", value, step)])
    names = ["step_condition", "input_condition", "noise_scale", "sharpness"]
    sink.write([Reading(name, 0.01, 5) for name in names])
    sink.close()
    found = [value for _, value in scalars(tmp_path, "step-consistency/log10_weight_condition")]
    assert found == pytest.approx([3.0, math.nan, math.nan, math.nan, math.inf], nan_ok=True)
    for name in names:
        assert scalars(tmp_path, f"{metric_group(name)}/log10_{name}") == [(5, pytest.approx(-2.0))]


def test_nan_and_infinity_are_written(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([Reading("g", math.nan, 1, reason="zero gradient")])
    sink.write([Reading("g", math.inf, 2)])
    sink.write([Reading("g", 1e300, 3)])
    sink.close()
    (_, first), (_, second), (_, third) = scalars(tmp_path, "gradmon/g")
    assert math.isnan(first)
    assert second == math.inf
    assert third == math.inf


def test_a_step_is_one_event_however_many_readings_it_has(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([Reading(f"a{i}", float(i), 2) for i in range(100)] + [Reading("step_share", 0.5, 1)])
    sink.close()
    numbers = [
        event
        for event in raw_events(tmp_path)
        if any(value.WhichOneof("value") == "simple_value" for value in event.summary.value)
    ]
    assert [(event.step, len(event.summary.value)) for event in numbers] == [(2, 100), (1, 1)]


def test_the_first_value_of_a_tag_says_what_it_means(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        sink.write([Reading("weight_condition", 3.0, step), Reading("weight_condition", 1.0, step, layer="fc")])
    sink.close()
    tag = "step-consistency/weight_condition"
    meaning = events(tmp_path).SummaryMetadata(tag).summary_description
    assert metric_meaning("weight_condition") in meaning
    assert metric_remedy("weight_condition") in meaning
    values = [value for event in raw_events(tmp_path) for value in event.summary.value if value.tag == tag]
    assert [bool(value.metadata.summary_description) for value in values] == [True, False]


def test_without_steps_the_writes_are_counted(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for _ in range(3):
        sink.write([Reading("g", 1.0), Reading("h", 2.0)])
    sink.alert(FIRING._replace(step=None))
    sink.close()
    assert [step for step, _ in scalars(tmp_path, "gradmon/g")] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "gradmon/h")] == [1, 2, 3]
    assert [step for step, _ in texts(tmp_path, "alerts/ill_conditioned")] == [3]


def test_readings_are_on_disk_before_the_sink_is_closed(tmp_path):
    sink = TensorBoardSink(tmp_path, flush_secs=1)
    sink.write([Reading("g", 1.0, 1)])
    sink.alert(FIRING)
    assert scalars(tmp_path, "gradmon/g") == [(1, 1.0)]
    sink.close()


def test_other_ranks_have_directories_of_their_own(tmp_path):
    for rank in (0, 1, 2):
        sink = TensorBoardSink(tmp_path / "run")
        sink.bind("run", rank)
        sink.write([Reading("g", float(rank), 1)])
        sink.close()
    assert scalars(tmp_path / "run", "gradmon/g") == [(1, 0.0)]
    assert scalars(tmp_path / "run" / "rank-1", "gradmon/g") == [(1, 1.0)]
    assert scalars(tmp_path / "run" / "rank-2", "gradmon/g") == [(1, 2.0)]


def test_from_a_string(tmp_path):
    sink = make_sink(f"tensorboard:{tmp_path}/run")
    assert isinstance(sink, TensorBoardSink)
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


def test_directory_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=rf"`logdir` must be .* written \({os.strerror(20)}\)\. Got .*/file/run\."):
        TensorBoardSink(tmp_path / "file" / "run")


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "10"])
def test_flush_secs_not_positive(tmp_path, seconds):
    with pytest.raises(ArgumentError, match=rf"`flush_secs` must be positive\. Got {seconds!r}\."):
        TensorBoardSink(tmp_path, flush_secs=seconds)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_histogram_every_not_positive(tmp_path, every):
    with pytest.raises(ArgumentError, match=rf"`histogram_every` must be a positive whole number\. Got {every}\."):
        TensorBoardSink(tmp_path, histogram_every=every)


def test_closed(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([Reading("g", 1.0, 1)])
    sink.close()
    sink.close()
    for call in (
        lambda: sink.write([Reading("g", 1.0, 1)]),
        lambda: sink.alert(FIRING),
        lambda: sink.describe({"model": "Linear"}),
        lambda: sink.finish(True),
    ):
        with pytest.raises(GradmonError, match=r"The sink of .* is closed\."):
            call()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_sink_that_is_never_used_leaves_no_file(tmp_path):
    TensorBoardSink(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_the_core_names_a_group_for_each_of_its_readings():
    from gradmon.metrics import METRICS, OWN
    from gradmon.preflight.page import MEANINGS

    groups = {"step-consistency", "batch-dissonance", "variance-sources", "health"}
    assert {metric_group(name) for name in METRICS} == groups
    assert {metric_group(name) for name in OWN} == {"health", "monitor"}
    assert all(metric_meaning(name) for name in (*METRICS, *OWN, *MEANINGS))
    assert all(metric_remedy(name) for name in METRICS)
    assert metric_group("my_metric") == "gradmon"
    assert metric_meaning("my_metric") == ""
    assert metric_remedy("my_metric") == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_directory_that_was_away_is_taken_up_again(tmp_path, monkeypatch):
    clock = [1000.0]
    clocks = SimpleNamespace(time=time.time, monotonic=lambda: clock[0])
    monkeypatch.setattr(_tensorboard_events, "time", clocks)
    logdir = tmp_path / "run"
    others = set(threading.enumerate())
    sink = TensorBoardSink(logdir)
    sink.alert(FIRING)
    shutil.rmtree(logdir)
    writing = set(threading.enumerate()) - others
    with pytest.raises(OSError, match="No such file"):
        sink.alert(FIRING._replace(step=11))
    # TensorBoard's thread hands its error over before it dies of it, which must not fall into the next test.
    for thread in writing:
        thread.join(timeout=10)
    with pytest.raises(GradmonError, match=r"The event file in .*/run failed, and is not tried again yet\."):
        sink.alert(FIRING._replace(step=12))
    assert not logdir.exists()
    clock[0] += 61.0
    sink.write([Reading("g", 1.0, 13)])
    sink.alert(FIRING._replace(step=13))
    assert scalars(logdir, "gradmon/g") == [(13, 1.0)]
    sink.close()
