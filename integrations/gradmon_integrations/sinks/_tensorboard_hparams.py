"""A run as a row of TensorBoard's HParams tab, in the run's own directory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gradmon._reading import Reading
from gradmon_integrations.sinks._tensorboard_tags import LATEST

ALERTS = "alerts"

# TensorBoard takes the columns from one of the runs, whichever it finds first. So the metrics are the same in every
# run, and so are the hyperparameters that all runs have.
_METRICS = (
    "loss",
    "grad_norm",
    "update_ratio",
    "step_ratio",
    "noise_ratio",
    "weight_condition",
    "gradient_confusion",
    "monitor_overhead",
)
_HPARAMS: dict[str, str] = {
    "model": "DATA_TYPE_STRING",
    "parameters": "DATA_TYPE_FLOAT64",
    "optimizer": "DATA_TYPE_STRING",
    "learning_rate": "DATA_TYPE_FLOAT64",
    "momentum": "DATA_TYPE_FLOAT64",
    "betas": "DATA_TYPE_STRING",
    "weight_decay": "DATA_TYPE_FLOAT64",
}

# The tab shows only the first five columns unasked: at first those that differ, then by name. What differs from run to
# run is not known while one of them is written, but what hardly ever does is.
_SELDOM = frozenset(
    {"version", "torch", "device", "schedule", "mask", "seed", "passive", "derivative", "parameters"}
    | {"betas", "eps", "dampening", "nesterov", "amsgrad", "decoupled_weight_decay", "centered", "momentum_decay"}
)

# How torch carries a step out, not what the step is.
_LEFT_OUT = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})

Info = Mapping[str, str | int | float | bool]


class Latest:
    """The last finite value of each metric that has a column."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def see(self, readings: Iterable[Reading]) -> None:
        """Take what is newer."""
        for reading in readings:
            if reading.layer is None and reading.name in _METRICS and math.isfinite(reading.value):
                self._values[f"{LATEST}/{reading.name}"] = reading.value

    def news(self, alerts: int) -> dict[str, float]:
        """What has changed since the last call, by tag.

        Args:
            alerts: How many alerts began to fire so far.

        Returns:
            The tags and their values.
        """
        self._values[f"{LATEST}/{ALERTS}"] = float(alerts)
        news = {tag: value for tag, value in self._values.items() if self._told.get(tag) != value}
        self._told |= news
        return news


def experiment(info: Info) -> list[Any]:
    """The columns, as a list of one value for an event."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    api: Any = api_pb2
    own = {name: _data_type(value) for name, value in _plain(info).items()}
    found = api.Experiment(
        hparam_infos=[
            api.HParamInfo(name=name, type=api.DataType.Value(kind), differs=name not in _SELDOM)
            for name, kind in (_HPARAMS | own).items()
        ],
        metric_infos=[
            api.MetricInfo(name=api.MetricName(tag=f"{LATEST}/{name}"), display_name=name)
            for name in (*_METRICS, ALERTS)
        ],
        time_created_secs=time.time(),
    )
    data: Any = plugin_data_pb2
    return [_value(metadata.EXPERIMENT_TAG, data.HParamsPluginData(experiment=found))]


def session_start(info: Info) -> list[Any]:
    """What the run is, as a list of one value for an event."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data: Any = plugin_data_pb2
    start = data.SessionStartInfo(start_time_secs=time.time())
    for name, value in _plain(info).items():
        # In this order: True is an int as well.
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    return [_value(metadata.SESSION_START_INFO_TAG, data.HParamsPluginData(session_start_info=start))]


def session_end(succeeded: bool) -> list[Any]:
    """How the run ended, as a list of one value for an event."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    api: Any = api_pb2
    data: Any = plugin_data_pb2
    status = api.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    end = data.SessionEndInfo(status=status, end_time_secs=time.time())
    return [_value(metadata.SESSION_END_INFO_TAG, data.HParamsPluginData(session_end_info=end))]


def _plain(info: Info) -> dict[str, str | int | float | bool]:
    """What the tab can show: a number that is not finite would leave it empty, for all runs."""
    known = {name: info[name] for name in _HPARAMS if name in info} | dict(info)
    return {
        name: value if isinstance(value, str) or math.isfinite(value) else str(value)
        for name, value in known.items()
        if name not in _LEFT_OUT
    }


def _data_type(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "DATA_TYPE_BOOL"
    return "DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64"


def _value(tag: str, data: Any) -> Any:
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import metadata

    summary: Any = summary_pb2
    return summary.Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
