"""Every metric: what it needs, how it is computed, what it means and what to do when it is bad."""

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
from gradmon.metrics import gradient, input_sweep, per_example, step, weight_sweep
from gradmon.metrics._metric import Metric as Metric
from gradmon.metrics._metric import Value as Value

_EXAMPLES = (PerExampleGradients,)
_STEP, _BATCH, _SOURCES, _HEALTH = "step-consistency", "batch-dissonance", "variance-sources", "health"
_SHORTER = "Lower the learning rate, add normalisation or residual connections, or warm up longer."
_LARGER = "Raise the batch size, or accumulate gradients over more micro-batches."
_DATA = "Raise the batch size; look at labels, and at groups of examples that contradict each other."

_ALL = (
    Metric(
        "loss", (BatchGradient,), gradient.loss, "low", "-", _HEALTH,
        "The loss of the batch at the weights before the step.",
        "Look at which of the metrics below changed first.",
    ),
    Metric(
        "grad_norm", (BatchGradient,), gradient.grad_norm, "middle", "-", _HEALTH,
        "The length of the batch gradient.",
        "Exploding: lower the learning rate or clip. Vanishing: change the initialisation or add normalisation.",
        layers=gradient.grad_norm_layers,
    ),
    Metric(
        "param_norm", (BatchGradient,), gradient.param_norm, "middle", "-", _HEALTH,
        "The length of the weight vector.",
        "Growing without end: add weight decay.",
    ),
    Metric(
        "update_ratio", (Step,), step.update_ratio, "middle", "-", _HEALTH,
        "The length of one step relative to the weights; about 1e-3 is usual.",
        "Above 1e-1 lower the learning rate; below 1e-6 raise it.",
        layers=lambda taken: taken.layer_update_ratios,
    ),
    Metric(
        "sharpness", (Curvature,), weight_sweep.sharpness, "low", "Rayleigh-Ritz", _HEALTH,
        "The largest curvature of the loss, from below.",
        _SHORTER,
    ),
    Metric(
        "stability", (Curvature,), weight_sweep.stability, "low", "gradient descent on a quadratic", _HEALTH,
        "Learning rate times sharpness over 2; above 1 plain SGD is past the edge of stability.",
        _SHORTER,
    ),
    Metric(
        "weight_condition", (WeightSweep,), weight_sweep.weight_condition, "low", "Nelson 2022, 2.5", _STEP,
        "The relative change of the gradient per relative change of the weights, at worst.",
        _SHORTER,
        layers=weight_sweep.condition_layers,
    ),
    Metric(
        "weight_cosine", (WeightSweep,), weight_sweep.weight_cosine, "high", "Nelson 2022, 4.1", _STEP,
        "How far a small move of the weights turns the gradient; 1 is not at all.",
        _SHORTER,
    ),
    Metric(
        "weight_diversity", (WeightSweep,), weight_sweep.weight_diversity, "low", "Nelson 2022, 4.2", _STEP,
        "Whether the gradients at nearby weights add up; 1/n is best.",
        _SHORTER,
        costly=True,
    ),
    Metric(
        "weight_coherence", (WeightSweep,), weight_sweep.weight_coherence, "high", "Nelson 2022, 4.3", _STEP,
        "Whether the gradients at nearby weights are the gradient here; about 1 is best.",
        _SHORTER,
    ),
    Metric(
        "step_condition", (StepPair,), step.step_condition, "low", "Nelson 2022, 2.5 (i != j)", _STEP,
        "The condition number along the step that was really taken, onto the next batch.",
        _SHORTER,
        layers=step.condition_layers,
    ),
    Metric(
        "scale_ratio", (ScaledSweep,), weight_sweep.scale_ratio, "none", "gradmon", _STEP,
        "The condition number at a tenth of the radius over that at the radius: 1 is smooth, 3 is kinked.",
        "Nothing: it tells how to read weight_condition.",
        on_demand=True,
    ),
    Metric(
        "input_condition", (InputSweep,), input_sweep.input_condition, "low", "Nelson 2022, 3.4", _BATCH,
        "The relative change of an example's gradient per relative change of its input, at worst.",
        "Scale the inputs, augment, or regularise: near-identical examples pull in different directions.",
        costly=True,
    ),
    Metric(
        "gradient_rank", _EXAMPLES, per_example.gradient_rank, "low", "Nelson 2022, 3.7", _BATCH,
        "How many directions the examples pull in, relative to pure noise; 1 is noise.",
        _DATA,
    ),
    Metric(
        "input_gradient_rank", (InputGradients,), per_example.input_gradient_rank, "low", "Nelson 2022, 3.7", _BATCH,
        "The same for the gradients with respect to the inputs (shattered gradients).",
        "Add residual connections or normalisation: depth shatters the gradient.",
    ),
    Metric(
        "gradient_confusion", _EXAMPLES, per_example.gradient_confusion, "low", "Nelson 2022, 3.11", _BATCH,
        "How much the two most contrary micro-batches contradict each other; 1 is exactly opposite.",
        _DATA,
    ),
    Metric(
        "gradient_diversity", _EXAMPLES, per_example.gradient_diversity, "low", "Nelson 2022, 3.12", _BATCH,
        "Whether the micro-batches' gradients add up; 1/n where they agree, 1 where they are orthogonal.",
        _LARGER,
    ),
    Metric(
        "gradient_coherence", _EXAMPLES, per_example.gradient_coherence, "high", "Nelson 2022, 3.13", _BATCH,
        "How much an average step helps each example; 1 where they agree, 1/B where they are orthogonal.",
        _LARGER,
    ),
    Metric(
        "noise_scale", _EXAMPLES, per_example.noise_scale, "low", "McCandlish et al. 2018", _BATCH,
        "The batch size at which signal and noise are equally strong.",
        _LARGER,
    ),
    Metric(
        "gradient_snr", (GradientMoments,), per_example.gradient_snr, "high", "arXiv 2510.00236", _BATCH,
        "The median signal-to-noise ratio of one coordinate of one example's gradient.",
        _LARGER,
    ),
    Metric(
        "step_share", (StepPair,), step.step_share, "none", "Nelson 2022, objective 2", _SOURCES,
        "The step's part of what changes the gradient from one step to the next.",
        "Near 1 the learning rate is the lever.",
        layers=step.pair_step_layers,
    ),
    Metric(
        "batch_share", (StepPair,), step.batch_share, "none", "Nelson 2022, objective 2", _SOURCES,
        "The batch's part of what changes the gradient from one step to the next.",
        "Near 1 the batch size is the lever.",
        layers=step.batch_layers,
    ),
    Metric(
        "step_ratio", (Step,), step.step_ratio, "low", "Nelson 2022, objective 2", _SOURCES,
        "How much of the gradient one step destroys; above 1 the step is too long.",
        "Lower the learning rate.",
        layers=step.step_layers,
    ),
    Metric(
        "noise_ratio", _EXAMPLES, per_example.noise_ratio, "low", "McCandlish et al. 2018", _SOURCES,
        "noise_scale over the batch size; above 1 the gradient is more noise than signal.",
        _LARGER,
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every built-in metric by name."""

OWN: dict[str, str] = {
    "learning_rate": "The optimizer's learning rate; the largest, if its parameter groups have different ones.",
    "batch_size": "How many examples the batch had.",
    "probe_seconds": "How long the monitor looked, in seconds.",
    "monitor_overhead": "The monitor's time over the training's, over the last 200 steps; 0.03 is 3 %.",
    "monitor_failures": "How often something failed inside the monitor, so far.",
    "sink_errors": "How often a sink failed, so far.",
    "sink_dropped": "How many readings were dropped because a sink was too slow, so far.",
}
"""What a monitor says with every probe beside the metrics, and what it means."""
