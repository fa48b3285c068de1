"""The dashboard of one run: is its gradient to be trusted, why not, and what is to be changed?"""

from __future__ import annotations

from gradmon_integrations.dashboards._board import Row, board, variable
from gradmon_integrations.dashboards._limits import LIMITS, STALLED, Limit, told
from gradmon_integrations.dashboards._panels import heatmap, lines, number, override, table, timeline
from gradmon_integrations.dashboards._query import Json, Query

_CHOSEN = '{run="$run", rank=~"$rank"}'
_SHARES = "A layer's part, from 0 to 1, of the change of the gradient"


def run_dashboard() -> Json:
    """The dashboard as Grafana's JSON."""
    return board(
        "gradmon-run",
        "gradmon: run",
        "One run: loss and norms, the two sources of the gradient's variance, and what each layer has to do with them.",
        variables=[
            variable("run", "Run", "label_values(gradmon_last_step, run)", multi=False),
            variable("rank", "Rank", 'label_values(gradmon_last_step{run="$run"}, rank)', multi=True),
        ],
        rows=[_glance(), _health(), _sources(), _step(), _batch(), _layers(), _monitor()],
    )


def _each(name: str, legend: str = "") -> Query:
    """A reading of the whole model, one line a rank."""
    return Query(f"gradmon_{name}{_CHOSEN}", f"{legend} {{{{rank}}}}".strip() if legend else "rank {{rank}}")


def _over_ranks(name: str, how: str = "avg") -> Query:
    return Query(f"{how}(gradmon_{name}{_CHOSEN})", name)


def _metric(name: str, title: str, *, log: bool = False, unit: str = "none", width: int = 8) -> Json:
    """A chart of one metric."""
    return lines(title, told(name), _each(name), unit=unit, log=log, limit=LIMITS.get(name), width=width)


def _glance() -> Row:
    silence = Query(f"max(time() - run_rank:gradmon_last_probe_timestamp_seconds:max{_CHOSEN})", instant=True)
    return Row(
        "At a glance",
        [
            number("Step", "The newest optimizer step that was measured.", _over_ranks("last_step", "max")),
            number(
                "Since the last measurement",
                "Healthy: up to some times the schedule's interval. In colour where RunStalled fires.",
                silence,
                unit="s",
                limit=STALLED,
            ),
            number(
                "Alerts firing",
                "Alerts that fire in the training process now, over all ranks. Healthy: 0.",
                _over_ranks("alerts_firing", "sum"),
                limit=Limit("warning", above=1.0),
            ),
            number("Loss now", told("loss"), _over_ranks("loss"), decimals=4),
            number("Step ratio", told("step_ratio"), _over_ranks("step_ratio", "max"), limit=LIMITS["step_ratio"]),
            number("Noise ratio", told("noise_ratio"), _over_ranks("noise_ratio", "max"), limit=LIMITS["noise_ratio"]),
            number(
                "Weight condition",
                told("weight_condition"),
                _over_ranks("weight_condition", "max"),
                limit=LIMITS["weight_condition"],
            ),
            number(
                "Overhead now",
                "gradmon's part of the training's time. Healthy: below 25 %, or the budget that was given.",
                _over_ranks("monitor_overhead", "max"),
                unit="percentunit",
                limit=LIMITS["monitor_overhead"],
            ),
            timeline(
                "Alerts of the process",
                "Each rule that has fired, and when. Healthy: nothing in colour. What to do: the runbook of the alert.",
                Query('{__name__=~"gradmon_alert_.+", run="$run", rank=~"$rank"}', "{{__name__}} rank {{rank}}"),
                rename=("gradmon_alert_(.*)", "$1"),
                states={"0": {"text": "quiet", "color": "green"}, "1": {"text": "firing", "color": "red"}},
                width=16,
            ),
            table(
                "What this run is",
                "What the run said of itself when it began.",
                Query(f"gradmon_run_info{_CHOSEN}", instant=True, table=True),
                columns={"run": "Run", "rank": "Rank", "model": "Model", "parameters": "Parameters"},
                hidden=["Time", "Value", "__name__", "job", "instance"],
                width=8,
                height=9,
            ),
        ],
    )


def _health() -> Row:
    return Row(
        "Loss and norms",
        [
            _metric("loss", "Loss"),
            lines(
                "Gradient norm",
                told("grad_norm"),
                _each("grad_norm"),
                Query(f"run_rank:gradmon_grad_norm:median1h{_CHOSEN}", "median of an hour, rank {{rank}}"),
                log=True,
                limit=LIMITS["grad_norm"],
            ),
            _metric("update_ratio", "Update ratio", log=True),
            _metric("param_norm", "Weight norm"),
            _metric("sharpness", "Sharpness", log=True),
            _metric("stability", "Stability"),
        ],
    )


def _sources() -> Row:
    on_the_right = override("learning rate", custom__axisPlacement="right", unit="none")
    return Row(
        "Where the variance comes from: the step, or the batch",
        [
            lines(
                "The two sources",
                f"Averages over the ranks. {told('step_share')}\n\n{told('batch_share')}",
                _over_ranks("step_share"),
                _over_ranks("batch_share"),
                unit="percentunit",
                bounds=(0, 1),
                stacked=True,
            ),
            _metric("step_ratio", "Step ratio: is the step too long?"),
            _metric("noise_ratio", "Noise ratio: is the batch too small?", log=True),
            lines(
                "The knobs: batch size and learning rate, against the noise scale",
                f"The batch size should not be far below the noise scale. {told('noise_scale')}",
                _over_ranks("noise_scale"),
                Query(f"avg(gradmon_batch_size{_CHOSEN})", "batch_size"),
                Query(f"max(gradmon_learning_rate{_CHOSEN})", "learning rate"),
                log=True,
                width=24,
                overrides=[on_the_right],
            ),
        ],
    )


def _step() -> Row:
    conditions = ("weight_condition", "step_condition")
    return Row(
        "Step-consistency: does the gradient survive the step?",
        [
            lines(
                "Condition numbers",
                "\n\n".join(told(name) for name in conditions),
                *(_each(name, name) for name in conditions),
                log=True,
                limit=LIMITS["weight_condition"],
            ),
            lines(
                "Does the gradient at nearby weights agree?",
                "\n\n".join(told(name) for name in ("weight_cosine", "weight_coherence", "weight_diversity")),
                *(_each(name, name) for name in ("weight_cosine", "weight_coherence", "weight_diversity")),
            ),
            _metric("scale_ratio", "Smooth or kinked?"),
        ],
    )


def _batch() -> Row:
    ranks = ("gradient_rank", "input_gradient_rank")
    sums = ("gradient_diversity", "gradient_coherence")
    return Row(
        "Batch-dissonance: do the examples agree?",
        [
            _metric("gradient_confusion", "Confusion"),
            lines("Ranks, relative to noise", "\n\n".join(map(told, ranks)), *(_each(name, name) for name in ranks)),
            lines("Diversity and coherence", "\n\n".join(map(told, sums)), *(_each(name, name) for name in sums)),
            _metric("gradient_snr", "Signal-to-noise ratio of a coordinate", log=True, width=12),
            _metric("input_condition", "Input condition", log=True, width=12),
        ],
    )


def _layers() -> Row:
    def shares(name: str) -> Query:
        return Query(f"max by (layer) (gradmon_layer_{name}{_CHOSEN})", "{{layer}}")

    def powers(name: str) -> Query:
        return Query(f"log10(max by (layer) (gradmon_layer_{name}{_CHOSEN}) > 0)", "{{layer}}")

    return Row(
        "Layers (of monitors with layers=True)",
        [
            heatmap(
                "Gradient norm by layer, as a power of ten",
                "Healthy: rows of similar colour that change slowly. A gap is a gradient of exactly zero: DeadLayer.",
                powers("grad_norm"),
            ),
            heatmap(
                "Update ratio by layer, as a power of ten",
                "Healthy: about -3 in every row. The layers whose rows stand out need another learning rate.",
                powers("update_ratio"),
            ),
            heatmap(
                "Share of the weight condition by layer",
                f"{_SHARES} along the worst perturbation. Healthy: no row holds nearly all of it for long.",
                shares("weight_condition"),
                unit="percentunit",
            ),
            heatmap(
                "Share of the step's change by layer",
                f"{_SHARES} by the step. Healthy: no row holds nearly all of it while step_ratio is high.",
                shares("step_ratio"),
                unit="percentunit",
            ),
        ],
    )


def _monitor() -> Row:
    took = f"sum by (le) (rate(gradmon_probe_duration_seconds_bucket{_CHOSEN}[$__rate_interval]))"
    counters = {
        "monitor_failures_total": "probes that failed",
        "sink_errors_total": "writes that failed",
        "sink_dropped_total": "readings dropped",
        "dropped_series_total": "layers beyond the cap",
    }
    return Row(
        "The monitor itself",
        [
            lines(
                "Overhead",
                "gradmon's part of the training's time. Healthy: below 25 %, or the budget that was given.",
                _each("monitor_overhead"),
                unit="percentunit",
                limit=LIMITS["monitor_overhead"],
            ),
            lines(
                "Duration of a probe",
                "Half of the probes are shorter than the median, one in twenty is longer than the 95th percentile. "
                "Healthy: steady. Points are single probes with their steps, where Prometheus stores exemplars.",
                Query(f"histogram_quantile(0.5, {took})", "median", exemplar=True),
                Query(f"histogram_quantile(0.95, {took})", "95th percentile"),
                unit="s",
            ),
            lines(
                "Readings",
                "How many readings arrive. Healthy: as steady as the training.",
                Query(f"sum(rate(gradmon_readings_total{_CHOSEN}[$__rate_interval]))", "readings"),
                unit="cps",
            ),
            lines(
                "What went wrong in the monitor",
                "Counts since the start. Healthy: 0. The training is not affected; its log says what happened.",
                *(Query(f"sum(gradmon_{name}{_CHOSEN})", legend) for name, legend in counters.items()),
                unit="short",
                width=12,
            ),
            lines(
                "Alerts that began to fire",
                "In the training process, since the start; also those gone before the next scrape. Healthy: few.",
                Query(f"sum(gradmon_alerts_total{_CHOSEN})", "alerts"),
                unit="short",
                width=12,
            ),
        ],
    )
