"""Two trainings in processes of their own, watched by the exported set-up on real servers.

One is ill: its alerts reach a webhook, they resolve when it is helped, and then it is killed. One is healthy, and comes
to its end by itself: of it nothing is heard. The story is lived once; each test looks at one thing that happened in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradmon import Reading
from gradmon_integrations.dashboards.__main__ import DASHBOARDS
from gradmon_integrations.sinks.pushgateway import PushgatewaySink
from tests.e2e import servers

pytestmark = pytest.mark.e2e

ILL, HEALTHY, PUSHED, PUSHED_AND_OVER = "ill-1", "healthy-1", "short-1", "short-2"
FIRING = 'ALERTS{alertstate="firing", run="%s"}'
SUBSTITUTES = {"$__rate_interval": "10s", "$__interval": "5s", "$__range": "60s", "$rank": ".*"}


@contextmanager
def trainer(run: str, folder: Path, targets: Path, *flavour: str) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir()
    port = servers.free_port()
    log = (folder / "log").open("w")
    program = Path(__file__).with_name("prometheus_trainer.py")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(program), run, str(port), str(folder), *flavour],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    servers.scrape_too(targets, run, f"127.0.0.1:{port}")
    try:
        yield process
    finally:
        servers.stop(process)
        log.close()


def expressions() -> list[tuple[str, str]]:
    """Of every panel and annotation of every dashboard its title, and the expression with its variables filled in."""
    found = []
    for name, build in DASHBOARDS.items():
        board = json.loads(json.dumps(build()))
        for panel in board["panels"]:
            found += [(f"{name}: {panel['title']}", target["expr"]) for target in panel.get("targets", [])]
        # What annotates is there only while something fires, which is when this is asked.
        found += [(f"{name}: {each['name']}", each["target"]["expr"]) for each in board["annotations"]["list"]]
    filled = []
    for title, expr in found:
        for variable, value in {**SUBSTITUTES, "$run": ILL}.items():
            expr = expr.replace(variable, value)
        filled.append((title, expr))
    return filled


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    port = servers.free_port()
    with servers.webhook(port) as inbox, servers.pushgateway(folder / "pg") as gateway:
        files = servers.quickened(
            folder / "files", webhook_port=port, alertmanager="ALERTMANAGER", pushgateway=gateway.address
        )
        with servers.alertmanager(files / "alertmanager" / "alertmanager.yml", folder / "am") as manager:
            config = files / "prometheus" / "prometheus.yml"
            config.write_text(config.read_text().replace("ALERTMANAGER", manager.address))
            with (
                trainer(ILL, folder / ILL, files, "ill") as ill,
                trainer(HEALTHY, folder / HEALTHY, files) as healthy,
                servers.prometheus(config, folder / "prom") as prometheus,
            ):
                yield lived(SimpleNamespace(), folder, prometheus, inbox, ill, healthy, gateway)


def push(gateway, run, *, finish):
    """A job that is over before anybody could scrape it; its last step was too long."""
    sink = PushgatewaySink(gateway.address)
    sink.bind(run, 0)
    if finish:
        sink.finish(True)
    sink.write([Reading("step_ratio", 5.0, 10), Reading("loss", 1.0, 10)])
    sink.close()


def lived(seen, folder, prometheus, inbox, ill, healthy, gateway):
    """What happens, one thing after the other."""
    seen.prometheus, seen.inbox, seen.folder = prometheus, inbox, folder
    push(gateway, PUSHED, finish=False)
    push(gateway, PUSHED_AND_OVER, finish=True)

    def told(name, status):
        return servers.until(lambda: inbox.alerts(ILL, name, status), f"{name} being {status} at the webhook")

    for process in (ill, healthy):
        assert process.poll() is None, (folder / (ILL if process is ill else HEALTHY) / "log").read_text()
    told("StepTooLong", "firing")
    told("IllConditioned", "firing")

    servers.until(lambda: prometheus.query(f'gradmon_last_step{{run="{HEALTHY}"}}'), "the healthy run's first probe")
    empty = dict(enumerate(expressions()))
    deadline = time.monotonic() + 30
    while empty and time.monotonic() < deadline:
        empty = {key: (title, expr) for key, (title, expr) in empty.items() if not prometheus.query_range(expr)}
        time.sleep(0.5 if empty else 0)
    seen.empty = list(empty.values())
    seen.runs = prometheus.get("/api/v1/label/run/values", **{"match[]": "gradmon_last_step"})["data"]
    seen.info = prometheus.query("gradmon_run_info")
    seen.joined = prometheus.query(
        f'gradmon_loss{{run="{ILL}"}} * on (run, rank) group_left (flavour) gradmon_run_info'
    )
    seen.exemplars = prometheus.get(
        "/api/v1/query_exemplars",
        query="gradmon_probe_duration_seconds_bucket",
        start=f"{time.time() - 120}",
        end=f"{time.time()}",
    )["data"]

    (folder / ILL / "recover").touch()
    told("StepTooLong", "resolved")
    told("IllConditioned", "resolved")

    seen.step = float(prometheus.query(f'gradmon_last_step{{run="{HEALTHY}"}}')[0]["value"][1])
    (folder / HEALTHY / "stop").touch()
    seen.status = healthy.wait(60)
    ended = time.monotonic()
    os.kill(ill.pid, signal.SIGKILL)
    ill.wait(20)
    told("RunStalled", "firing")
    # Long enough for the one that ended to have been noticed as well, had it been taken for a stalled one.
    time.sleep(max(0.0, ended + servers.STALLED_AFTER + 5 - time.monotonic()))
    seen.finished = prometheus.query(f'last_over_time(gradmon_run_finished{{run="{HEALTHY}"}}[5m])')
    return seen


def fired(story, run):
    return {series["metric"]["alertname"] for series in story.prometheus.query(f"last_over_time({FIRING % run}[10m])")}


def test_the_ill_run_fires_at_the_webhook_and_resolves_when_it_is_helped(story):
    for name in ("StepTooLong", "IllConditioned"):
        firing = story.inbox.alerts(ILL, name, "firing")[0]
        assert firing["labels"]["severity"] == "warning"
        assert firing["labels"]["rank"] == "0"
        assert firing["annotations"]["summary"].count(ILL) == 1
        assert "Mostly in layer" in firing["annotations"]["description"]
        assert "<no value>" not in firing["annotations"]["description"]
        assert firing["annotations"]["runbook_url"].startswith("https://")
        assert story.inbox.alerts(ILL, name, "resolved")


def test_a_message_is_about_one_alert_of_one_run(story):
    assert story.inbox.messages
    for message in story.inbox.messages:
        assert len({(alert["labels"]["run"], alert["labels"]["alertname"]) for alert in message["alerts"]}) == 1


def test_what_is_only_worth_a_look_sends_no_message(story):
    told = {alert["labels"]["severity"] for message in story.inbox.messages for alert in message["alerts"]}
    assert "info" not in told


def test_the_killed_run_has_stalled(story):
    assert "RunStalled" in fired(story, ILL)
    alert = story.inbox.alerts(ILL, "RunStalled", "firing")[0]
    assert alert["labels"]["severity"] == "critical"
    assert "the last measurement was" in alert["annotations"]["description"]


def test_the_healthy_run_is_never_heard_of(story):
    assert story.step >= 40
    assert fired(story, HEALTHY) == set()
    assert story.inbox.alerts(HEALTHY) == []


def test_the_end_of_the_healthy_run_was_seen(story):
    assert story.status == 0, (story.folder / HEALTHY / "log").read_text()
    assert [sample["value"][1] for sample in story.finished] == ["1"]


def test_every_panel_of_the_dashboards_had_data(story):
    assert story.empty == []


def test_the_variables_offer_the_runs(story):
    assert story.runs == sorted([ILL, HEALTHY, PUSHED, PUSHED_AND_OVER])


def test_what_describes_a_run_is_there(story):
    told = {sample["metric"]["run"]: sample["metric"]["flavour"] for sample in story.info}
    assert told == {ILL: "ill", HEALTHY: "healthy"}
    assert [sample["metric"]["flavour"] for sample in story.joined] == ["ill"]


def test_what_a_short_job_pushed_has_its_own_labels(story):
    found = story.prometheus.query(f'gradmon_last_step{{run=~"{PUSHED}|{PUSHED_AND_OVER}"}}')
    assert {sample["metric"]["job"] for sample in found} == {"gradmon"}
    assert {sample["metric"]["run"] for sample in found} == {PUSHED, PUSHED_AND_OVER}


def test_a_short_job_that_did_not_come_to_its_end_raises_alerts(story):
    assert fired(story, PUSHED) == {"StepTooLong", "RunStalled"}


def test_a_short_job_that_is_over_raises_none_though_its_numbers_stay(story):
    assert fired(story, PUSHED_AND_OVER) == set()


def test_exemplars_lead_to_steps(story):
    steps = {int(exemplar["labels"]["step"]) for series in story.exemplars for exemplar in series["exemplars"]}
    assert steps
    assert all(step % 4 == 0 or step % 20 == 0 for step in steps)


def test_no_rule_and_no_scrape_has_failed(story):
    groups = story.prometheus.get("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 21
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
