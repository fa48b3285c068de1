"""Runs to watch: files as a monitor writes them, the command, and what it knows of a run."""

import argparse
import math

import pytest

from gradmon import Alert, Reading
from gradmon_integrations.watch.command import COMMAND

FIRING = Alert("ill_conditioned", "warning", "firing", 2e3, 2, None, "weight_condition is 2000.", "Slow down.", ("fc",))
NONFINITE = Alert("nonfinite", "critical", "firing", math.nan, 3, None, "The loss is not finite.", "Clip.")
NOW = 1_700_000_000.0


def probe(sink, step, **more):
    values = {"loss": 2 / step, "weight_condition": 1e3 * step, "learning_rate": 0.1, "sink_errors": 0.0, **more}
    sink.write([Reading(name, value, step) for name, value in values.items()])


def watch(*options):
    parser = argparse.ArgumentParser("gradmon watch")
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args([str(option) for option in options]))


def once(*options, columns=110, monkeypatch=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        return watch("--once", *options)
