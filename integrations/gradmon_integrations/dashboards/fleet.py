"""The dashboard of all runs: which of them needs a look?"""

from __future__ import annotations

from gradmon_integrations.dashboards._board import Row, board, variable
from gradmon_integrations.dashboards._limits import LIMITS, STALLED, Limit, told
from gradmon_integrations.dashboards._panels import lines, number, override, table, thresholds_of
from gradmon_integrations.dashboards._query import Json, Query

_CHOSEN = '{run=~"$run"}'
_ACTIVE = 'ALERTS{alertstate="firing", run=~"$run"}'
_SILENCE = f"time() - run_rank:gradmon_last_probe_timestamp_seconds:max{_CHOSEN}"
_ENDED = (
    f"run_rank:gradmon_finished_probe_timestamp_seconds:max{_CHOSEN}"
    f" >= run_rank:gradmon_last_probe_timestamp_seconds:max{_CHOSEN}"
)
_TO_RUN = {
    "title": "Open this run",
    "url": "/d/gradmon-run?var-datasource=${datasource}&var-run=${__data.fields.Run}&var-rank=${__data.fields.Rank}",
}


def fleet_dashboard() -> Json:
    """The dashboard as Grafana's JSON."""
    return board(
        "gradmon-fleet",
        "gradmon: all runs",
        "All runs that report to Prometheus: which are alive or stalled, what is firing, what monitoring costs.",
        variables=[variable("run", "Run", "label_values(gradmon_last_step, run)", multi=True)],
        rows=[_counts(), _runs(), _compared(), _cost()],
    )


def _counts() -> Row:
    problem = Limit("warning", above=1.0)
    return Row(
        "At a glance",
        [
            number(
                "Runs that report",
                "Runs of which Prometheus scrapes numbers, and that have not come to their end.",
                Query(
                    f"count(count by (run) (gradmon_last_step{_CHOSEN} unless gradmon_run_finished == 1)) or vector(0)"
                ),
                width=6,
            ),
            number(
                "Runs with alerts",
                "Runs for which a rule fires in the training process now. Healthy: 0.",
                Query(f"count(run:gradmon_alerts_firing:sum{_CHOSEN} > 0) or vector(0)"),
                limit=problem,
                width=6,
            ),
            number(
                "Stalled or killed",
                "Processes that have measured nothing for too long and did not say that they had ended. Healthy: 0.",
                Query('count(ALERTS{alertname="RunStalled", alertstate="firing", run=~"$run"}) or vector(0)'),
                limit=Limit("critical", above=1.0),
                width=6,
            ),
            number(
                "Came to their end",
                "Processes that came to their end by themselves within the last two hours.",
                Query(f"count({_ENDED}) or vector(0)"),
                width=6,
            ),
        ],
    )


def _runs() -> Row:
    def newest(name: str) -> Query:
        return Query(f"max by (run, rank) (gradmon_{name}{_CHOSEN})", instant=True, table=True)

    def column(title: str, name: str) -> Json:
        held = thresholds_of(LIMITS[name])
        color = {"custom__cellOptions": {"type": "color-text"}}
        return override(title, thresholds=held["thresholds"], color=held["color"], **color)

    asked = {"Step": "last_step", "Loss": "loss", "Step ratio": "step_ratio", "Noise ratio": "noise_ratio"}
    asked |= {"Weight condition": "weight_condition", "Alerts": "alerts_firing"}
    silence = thresholds_of(STALLED)
    letters = {f"Value #{chr(ord('A') + number)}": title for number, title in enumerate([*asked, "Silent for"])}
    return Row(
        "Runs and alerts",
        [
            table(
                "Runs",
                "One line a process; click a run to open it. Healthy: nothing in colour. A run of which only the last "
                "column is filled is gone.",
                *(newest(name) for name in asked.values()),
                Query(_SILENCE, instant=True, table=True),
                columns={"run": "Run", "rank": "Rank", **letters},
                hidden=["Time"],
                overrides=[
                    override("Run", links=[_TO_RUN]),
                    *(column(title, name) for title, name in asked.items() if name in LIMITS),
                    override("Silent for", unit="s", thresholds=silence["thresholds"], color=silence["color"]),
                ],
                width=14,
                height=10,
            ),
            table(
                "Active alerts",
                "What fires in Prometheus. Healthy: empty. What to do: the runbook, under the alert's name.",
                Query(f"max by (alertname, severity, run, rank) ({_ACTIVE})", instant=True, table=True),
                columns={"alertname": "Alert", "severity": "Severity", "run": "Run", "rank": "Rank"},
                hidden=["Time", "Value"],
                overrides=[override("Run", links=[_TO_RUN])],
                width=10,
                height=10,
            ),
        ],
    )


def _compared() -> Row:
    return Row(
        "Runs compared",
        [
            lines("Loss", told("loss"), Query(f"run:gradmon_loss:avg{_CHOSEN}", "{{run}}")),
            lines(
                "Step ratio",
                f"Largest over the ranks. {told('step_ratio')}",
                Query(f"run:gradmon_step_ratio:max{_CHOSEN}", "{{run}}"),
                limit=LIMITS["step_ratio"],
            ),
            lines(
                "Noise ratio",
                f"Largest over the ranks. {told('noise_ratio')}",
                Query(f"run:gradmon_noise_ratio:max{_CHOSEN}", "{{run}}"),
                log=True,
                limit=LIMITS["noise_ratio"],
            ),
        ],
    )


def _cost() -> Row:
    return Row(
        "Alerts and overhead",
        [
            lines(
                "Alerts firing in Prometheus",
                "How many processes each alert fires for. Healthy: none.",
                Query(f"count by (alertname) ({_ACTIVE})", "{{alertname}}"),
                unit="short",
            ),
            lines(
                "Alerts that began to fire",
                "In the training processes, in the last hour. Healthy: few; many mean a run at its limits.",
                Query(f"sum by (run) (increase(gradmon_alerts_total{_CHOSEN}[1h]))", "{{run}}"),
                unit="short",
            ),
            lines(
                "Overhead",
                "gradmon's part of the training's time, largest over the ranks. Healthy: below 25 %, or the budget.",
                Query(f"run:gradmon_monitor_overhead:max{_CHOSEN}", "{{run}}"),
                unit="percentunit",
                limit=LIMITS["monitor_overhead"],
            ),
        ],
    )
