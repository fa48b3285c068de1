import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT64, DATA_TYPE_STRING, Status

from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

INFO = {"model": "Sequential", "parameters": 1000, "learning_rate": 0.5, "seed": 3, "passive": False, "foreach": True}


@pytest.fixture
def sink(tmp_path):
    sink = TensorBoardSink(tmp_path)
    yield sink
    sink.close()


def loaded(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def said(logdir):
    return loaded(logdir).PluginTagToContent(metadata.PLUGIN_NAME)


def latest(logdir, name):
    return [(event.step, event.value) for event in loaded(logdir).Scalars(f"latest/{name}")]


def experiment(logdir):
    return metadata.parse_experiment_plugin_data(said(logdir)[metadata.EXPERIMENT_TAG])


def test_the_run_has_a_row(sink, tmp_path):
    sink.describe(INFO | {"depth": 4, "note": "first"})
    start = metadata.parse_session_start_info_plugin_data(said(tmp_path)[metadata.SESSION_START_INFO_TAG])
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    del found["passive"]
    assert found == {
        "model": "Sequential",
        "parameters": 1000.0,
        "learning_rate": 0.5,
        "seed": 3.0,
        "depth": 4.0,
        "note": "first",
    }
    assert start.hparams["passive"].WhichOneof("kind") == "bool_value"
    # One row a run, also where two runs have the same hyperparameters.
    assert start.group_name == ""


def test_the_columns_have_types_and_those_that_may_differ_come_first(sink, tmp_path):
    sink.describe(INFO | {"depth": 4})
    columns = {column.name: column for column in experiment(tmp_path).hparam_infos}
    assert columns["learning_rate"].type == DATA_TYPE_FLOAT64
    assert columns["model"].type == DATA_TYPE_STRING
    assert columns["passive"].type == DATA_TYPE_BOOL
    assert columns["depth"].differs
    assert columns["learning_rate"].differs
    assert not columns["seed"].differs
    assert "foreach" not in columns


def test_the_columns_do_not_depend_on_the_optimizer_that_one_run_has(tmp_path):
    columns = []
    for name, own in (("sgd", {"momentum": 0.9}), ("adamw", {"betas": "(0.9, 0.999)"})):
        sink = TensorBoardSink(tmp_path / name)
        sink.describe(INFO | own)
        sink.close()
        found = experiment(tmp_path / name)
        columns.append(
            ({(one.name, one.type) for one in found.hparam_infos}, [one.name.tag for one in found.metric_infos])
        )
    assert columns[0] == columns[1]


def test_what_is_not_finite_does_not_empty_the_tab(sink, tmp_path):
    sink.describe({"clip": math.inf, "learning_rate": math.nan})
    start = metadata.parse_session_start_info_plugin_data(said(tmp_path)[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["clip"].string_value == "inf"
    assert start.hparams["learning_rate"].string_value == "nan"
    types = {column.name: column.type for column in experiment(tmp_path).hparam_infos}
    assert types["clip"] == types["learning_rate"] == DATA_TYPE_STRING


def test_every_metric_of_the_columns_is_written_last_finite_values_first(sink, tmp_path):
    sink.describe(INFO)
    names = [one.display_name for one in experiment(tmp_path).metric_infos if one.display_name != "alerts"]
    assert {"loss", "step_ratio", "weight_condition", "noise_ratio"} <= set(names)
    sink.write([Reading(name, 1.0, 1) for name in names])
    sink.write([Reading(name, 2.0, 2) for name in names] + [Reading("loss", 9.0, 2, layer="fc")])
    sink.write([Reading(name, math.nan if name == "loss" else math.inf, 3) for name in names])
    sink.alert(Alert("nonfinite", "critical", "firing", math.nan, 3, None, "m", "r"))
    sink.alert(Alert("nonfinite", "critical", "resolved", 1.0, 4, None, "m", "r"))
    sink.finish(True)
    sink.close()
    for name in names:
        assert latest(tmp_path, name) == [(1, 1.0), (3, 2.0)]
    assert latest(tmp_path, "alerts") == [(1, 0.0), (3, 1.0)]


def test_values_are_there_while_the_run_goes_on(sink, tmp_path):
    sink.describe(INFO)
    for step in range(1, 13):
        sink.write([Reading("loss", float(step), step)])
    sink.alert(Alert("nonfinite", "critical", "firing", 1.0, 12, None, "m", "r"))
    assert latest(tmp_path, "loss") == [(1, 1.0), (11, 11.0)]


@pytest.mark.parametrize(("succeeded", "status"), [(True, "STATUS_SUCCESS"), (False, "STATUS_FAILURE")])
def test_how_it_ended(sink, tmp_path, succeeded, status):
    sink.describe(INFO)
    assert metadata.SESSION_END_INFO_TAG not in said(tmp_path)
    sink.write([Reading("loss", 1.0, 5)])
    sink.finish(succeeded)
    end = metadata.parse_session_end_info_plugin_data(said(tmp_path)[metadata.SESSION_END_INFO_TAG])
    assert Status.Name(end.status) == status


def test_closed_without_an_end_the_last_values_are_there_all_the_same(sink, tmp_path):
    sink.describe(INFO)
    for step in (1, 2, 3):
        sink.write([Reading("loss", float(step), step)])
    sink.close()
    assert latest(tmp_path, "loss") == [(1, 1.0), (3, 3.0)]
    assert metadata.SESSION_END_INFO_TAG not in said(tmp_path)


def test_without_a_description_there_is_no_row(sink, tmp_path):
    sink.write([Reading("loss", 1.0, 1)])
    sink.finish(True)
    sink.close()
    assert loaded(tmp_path).Tags()["scalars"] == ["health/loss"]
    with pytest.raises(KeyError, match="hparams"):
        said(tmp_path)
