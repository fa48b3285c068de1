"""Probes: each looks at a scene and produces one kind of evidence."""

from __future__ import annotations

from gradmon._evidence import (
    BatchGradient,
    Curvature,
    GradientMoments,
    InputGradients,
    InputSweep,
    PerExampleGradients,
    ScaledSweep,
    Step,
    StepPair,
    WeightSweep,
)
from gradmon.probes.gradient import batch_gradient
from gradmon.probes.gradient import gradient_evidence as gradient_evidence
from gradmon.probes.input_sweep import input_sweep
from gradmon.probes.memory import Memory as Memory
from gradmon.probes.passive import LISTENED as LISTENED
from gradmon.probes.passive import PassiveProbe as PassiveProbe
from gradmon.probes.per_example import gradient_moments, input_gradients, per_example
from gradmon.probes.scene import EXHAUSTED as EXHAUSTED
from gradmon.probes.scene import Probe
from gradmon.probes.scene import Scene as Scene
from gradmon.probes.step import across as across
from gradmon.probes.step import is_plain as is_plain
from gradmon.probes.step import step, step_pair
from gradmon.probes.step import step_evidence as step_evidence
from gradmon.probes.watch import Keep as Keep
from gradmon.probes.watch import StepWatch as StepWatch
from gradmon.probes.watch import Taken as Taken
from gradmon.probes.watch import learning_rates as learning_rates
from gradmon.probes.weight_sweep import curvature, scaled_sweep, weight_sweep

PROBES: dict[type, Probe] = {
    BatchGradient: batch_gradient,
    WeightSweep: weight_sweep,
    ScaledSweep: scaled_sweep,
    Curvature: curvature,
    InputSweep: input_sweep,
    PerExampleGradients: per_example,
    GradientMoments: gradient_moments,
    InputGradients: input_gradients,
    Step: step,
    StepPair: step_pair,
}
"""How each kind of evidence is gathered."""
