"""The Prometheus rules: promtool's own checks and tests, and that they say what the rules in the process say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gradmon.alerts import Above, Below, Outside, default_rules
from gradmon_integrations import dashboards

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

FOLDER = Path(dashboards.__file__).parent / "files" / "prometheus"
DOCS = Path(__file__).parents[2] / "docs"
TESTS = ("alert_rules_test.yml", "run_stalled_test.yml")


def loaded(name):
    return yaml.safe_load((FOLDER / name).read_text())


def rules(name):
    return [rule for group in loaded(name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alert_rules.yml")}
PROCESS = {rule.name: rule for rule in default_rules()}


def camel(rule):
    return {"nonfinite": "NonFinite"}.get(rule) or "".join(word.capitalize() for word in rule.split("_"))


def promtool(*arguments):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    return subprocess.run([program, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "recording_rules.yml", "alert_rules.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", *TESTS),
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments):
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_promtool_notices_a_rule_that_does_not_fire(tmp_path):
    for path in FOLDER.glob("*.yml"):
        (tmp_path / path.name).write_text(path.read_text().replace("gradmon_step_ratio > 1", "gradmon_step_ratio > 2"))
    done = promtool("test", "rules", str(tmp_path / "alert_rules_test.yml"))
    assert done.returncode != 0
    assert "alertname: StepTooLong" in done.stdout + done.stderr


def test_amtool_is_content():
    program = shutil.which("amtool")
    if program is None:
        pytest.skip("amtool is not installed")
    path = FOLDER.parent / "alertmanager" / "alertmanager.yml"
    done = subprocess.run([program, "check-config", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("severity", "receiver"), [("info", "dashboard-only"), ("warning", "training"), ("critical", "training")]
)
def test_who_is_told(severity, receiver):
    program = shutil.which("amtool")
    if program is None:
        pytest.skip("amtool is not installed")
    path = FOLDER.parent / "alertmanager" / "alertmanager.yml"
    arguments = ["config", "routes", "test", f"--config.file={path}", "alertname=X", f"severity={severity}"]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [receiver]


def test_every_rule_of_the_process_has_its_alert_and_the_other_way_round():
    assert {camel(name) for name in PROCESS} | {"RunStalled"} == set(ALERTS)


@pytest.mark.parametrize("name", sorted(PROCESS))
def test_an_alert_is_as_severe_as_its_rule_and_listens_to_it(name):
    alert = ALERTS[camel(name)]
    assert alert["labels"]["severity"] == PROCESS[name].severity
    assert f"gradmon_alert_{name} > 0" in alert["expr"]


@pytest.mark.parametrize("name", sorted(name for name in PROCESS if isinstance(PROCESS[name], Above | Below | Outside)))
def test_the_limits_are_those_of_the_process(name):
    rule = PROCESS[name]
    found = re.findall(rf"gradmon_{rule.metric} ([<>]) (\S+)", ALERTS[camel(name)]["expr"])
    expected = {
        Above: lambda: {(">", rule.limit)},
        Below: lambda: {("<", rule.limit)},
        Outside: lambda: {(">", rule.high), ("<", rule.low)},
    }[type(rule)]()
    assert {(sign, float(number)) for sign, number in found} == expected


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_an_alert_says_what_who_and_where_to_read_on(name):
    told = ALERTS[name]["annotations"]
    assert set(told) == {"summary", "description", "runbook_url"}
    assert "$labels.run" in told["summary"]
    assert "$labels.rank" in told["description"]
    assert re.search(r"\$value|query", told["description"])
    page, anchor = told["runbook_url"].split("#")
    assert camel(anchor) == name
    assert page.endswith("/docs/alerts.md")
    assert re.search(rf"^## {anchor}$", (DOCS / "alerts.md").read_text(), re.MULTILINE)


def test_the_runbook_has_no_other_rules():
    headings = re.findall(r"^## (\w+)$", (DOCS / "alerts.md").read_text(), re.MULTILINE)
    assert sorted(map(camel, headings)) == sorted(ALERTS)


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_of_every_alert_there_is_a_case_that_fires_and_one_that_stays_quiet(name):
    fires, quiet = 0, 0
    for group in (group for file in TESTS for group in loaded(file)["tests"]):
        for case in group.get("alert_rule_test", []):
            if case["alertname"] == name:
                fires += bool(case["exp_alerts"])
                quiet += not case["exp_alerts"]
        for case in group.get("promql_expr_test", []):
            fires += f'alertname="{name}"' in case["expr"] and bool(case["exp_samples"])
    assert fires
    assert quiet


def test_every_recorded_number_is_tested():
    asked = {case["expr"] for group in loaded(TESTS[0])["tests"] for case in group.get("promql_expr_test", [])}
    # Those of RunStalled are tested with it.
    recorded = {rule["record"] for rule in rules("recording_rules.yml") if "timestamp" not in rule["record"]}
    assert recorded == asked


def test_no_alert_outlives_the_end_of_its_run():
    assert [name for name, alert in ALERTS.items() if "finished" not in alert["expr"]] == []
