"""The demo's two runs: their names, its options, and what monitors say of a healthy and of an ill-conditioned run."""

import math
from types import SimpleNamespace

from gradmon import Reading
from gradmon.alerts import default_rules
from gradmon_integrations.demo.runs import RECIPES
from gradmon_integrations.display.history import History

NAMES = [recipe.name for recipe in RECIPES]
HEALTHY = {"weight_condition": 20.0, "step_ratio": 0.02, "noise_ratio": 1.5, "step_share": 1e-3, "update_ratio": 1e-3}
ILL = {"weight_condition": 2e3, "step_ratio": 1.4, "noise_ratio": math.inf, "step_share": 0.9, "update_ratio": 1e-3}


def told(numbers, losses=(2.3, 2.2, 2.1, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)):
    """What a monitor with the default rules makes of a loss that goes this way while the other numbers stay."""
    history, rules = History(), default_rules()
    for step, loss in enumerate(losses, start=1):
        readings = [Reading(name, value, step) for name, value in {"loss": loss, **numbers}.items()]
        history.write(readings)
        for alert in [rule(reading) for reading in readings for rule in rules]:
            if alert is not None:
                history.alert(alert)
    return history


def demo_options(logdir, **changed):
    options = {"prometheus_port": 0, "seed": 0, "mask": 0.05, "every": 1, "steps": 1, "batch_size": 8, "plain": True}
    return SimpleNamespace(logdir=logdir, **{**options, **changed})
