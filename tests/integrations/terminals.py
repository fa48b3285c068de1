"""What the scenes in a terminal share."""

import io
import math

from gradmon import Alert, Reading
from gradmon_integrations.sinks.terminal import TerminalSink

REMEDY = "Lower the learning rate; if that does not help, change the initialisation or add normalisation."
FIRING = Alert(
    "ill_conditioned", "warning", "firing", 2e3, 5, None, "weight_condition is 2000, above 1000.", REMEDY, ("0", "2")
)
RESOLVED = FIRING._replace(state="resolved", message="weight_condition is 20, not above 1000.", step=9)
NUMBERS = {"step_ratio": 0.02, "noise_ratio": 1.5, "grad_norm": 0.4, "monitor_overhead": 0.031, "gradient_rank": 0.2}


def opened(run="mlp-1", rank=0, **options):
    sink = TerminalSink(**{"refresh": 0, **options})
    sink.bind(run, rank)
    return sink


def probe(sink, step, condition=20.0):
    named = {"loss": 2.3 * math.exp(-step / 20), "weight_condition": condition, **NUMBERS}
    sink.write([Reading(name, value, step) for name, value in named.items()])


def titles(text):
    return [line for line in text.splitlines() if line.startswith("── gradmon")]


def panel_is_last(text, rows=4):
    return text.splitlines()[-rows - 1 :][0].startswith("── gradmon")


def told(**options):
    file = io.StringIO()
    sink = TerminalSink(file=file, **options)
    sink.bind("mlp-1", options.pop("rank", 0))
    return sink, file
