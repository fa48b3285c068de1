"""The Grafana dashboards: their structure, and that they ask only for what there is."""

from __future__ import annotations

import copy
import itertools
import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradmon import METRICS, Alert, Reading
from gradmon.alerts import Above, Below, Outside, default_rules
from gradmon.metrics import OWN
from gradmon_integrations.dashboards import _limits
from gradmon_integrations.dashboards.__main__ import DASHBOARDS, FOLDER, text
from gradmon_integrations.sinks.prometheus import PrometheusSink

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

BOARDS = {name: json.loads((FOLDER / name).read_text()) for name in DASHBOARDS}
DOCS = Path(__file__).parents[2] / "docs"
RULES = FOLDER.parents[1] / "prometheus" / "recording_rules.yml"
TARGET = {"job", "instance"}
ALERT = {"alertname", "alertstate", "severity", "run", "rank"} | TARGET
WORDS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN"}
LABELS = r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"


def exported():
    """The labels of every series that the exporter shows, by its name: from a scrape of one that has had everything."""
    sink = PrometheusSink()
    try:
        sink.bind("run", 0)
        sink.describe({"model": "MLP", "parameters": 10})
        readings = [Reading(name, 1.0, 1) for name in [*METRICS, *OWN]]
        layered = [Reading(name, 1.0, 1, layer="fc") for name, metric in METRICS.items() if metric.layers]
        sink.write([*readings, *layered])
        for rule in default_rules():
            sink.alert(Alert(rule.name, rule.severity, "firing", 1.0, 1, None, "", ""))
        with urllib.request.urlopen(sink.url, timeout=10) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    finally:
        sink.close()
    return {sample.name: set(sample.labels) | TARGET for family in families for sample in family.samples}


def recorded():
    """The labels of what the recording rules make."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    grouped = {rule["record"]: re.match(r"\w+ by \(([^)]*)\)", rule["expr"])[1] for rule in rules}
    return {name: set(re.split(r",\s*", labels)) for name, labels in grouped.items()}


@pytest.fixture(scope="module")
def known():
    return {**exported(), **recorded(), "ALERTS": ALERT}


def unknown(expr, known):
    """The metrics, and the labels of the metrics, that an expression names and that there are not."""
    bad, labels, names = [], set(), set()
    for name, held in re.findall(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}", expr):
        chosen = {name} if name else set()
        for label, pattern in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', held):
            if label == "__name__":
                chosen = {each for each in known if re.fullmatch(pattern, each)}
                bad += [] if chosen else [pattern]
            else:
                bad += [f"{each}: {label}" for each in chosen & set(known) if label not in known[each]]
        names |= chosen
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", " ", expr)
    for _, group in re.findall(LABELS, bare):
        labels |= {label for label in re.split(r",\s*", group) if label}
    bare = re.sub(LABELS, " ", bare)
    names |= set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?![\w:]*\s*\()", bare)) - WORDS
    bad += [name for name in names if name not in known]
    available = set().union(*(known.get(name, set()) for name in names))
    return sorted(bad) + sorted(labels - available)


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board):
    return [(panel, target) for panel in panels(board) for target in panel["targets"]]


def overlaps(board):
    """The pairs of panels that lie on one another, and those that stick out."""
    placed = [(panel["id"], panel["gridPos"]) for panel in board["panels"]]
    wrong = [(one,) for one, at in placed if at["x"] < 0 or at["x"] + at["w"] > 24]
    for (one, a), (two, b) in itertools.combinations(placed, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        if not beside and not (a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]):
            wrong.append((one, two))
    return wrong


boards = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_file_is_what_the_builder_makes(name):
    assert (FOLDER / name).read_text() == text(DASHBOARDS[name]), "run python -m gradmon_integrations.dashboards"


@boards
def test_ids_are_unique(board):
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@boards
def test_panels_lie_beside_each_other(board):
    assert overlaps(board) == []


def test_panels_that_overlap_are_found():
    board = copy.deepcopy(BOARDS["gradmon-run.json"])
    first, second = panels(board)[:2]
    second["gridPos"]["x"] = first["gridPos"]["x"] + first["gridPos"]["w"] - 1
    assert (first["id"], second["id"]) in overlaps(board)


@boards
def test_every_panel_says_what_it_means_and_in_which_unit(board):
    for panel in panels(board):
        assert len(panel["title"]) > 3, panel["id"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)


@boards
def test_charts_say_what_is_healthy(board):
    charts = [panel for panel in panels(board) if panel["type"] in ("timeseries", "heatmap", "state-timeline")]
    assert [panel["title"] for panel in charts if "Healthy" not in panel["description"]] == []


@boards
def test_every_expression_asks_for_what_there_is(board, known):
    wrong = [(panel["title"], bad) for panel, query in queries(board) if (bad := unknown(query["expr"], known))]
    assert wrong == []


@boards
def test_annotations_and_variables_ask_for_what_there_is(board, known):
    for annotation in board["annotations"]["list"]:
        assert (
            unknown(annotation["target"]["expr"].replace('"rule", "$1", "__name__", "gradmon_alert_(.+)"', '""'), known)
            == []
        )
    for variable in board["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
        assert unknown(selector, known) == []
        assert label in known["gradmon_last_step"]


@boards
def test_legends_name_labels_of_their_series(board, known):
    for panel, query in queries(board):
        for label in re.findall(r"\{\{(\w+)\}\}", query["legendFormat"]):
            names = re.findall(r"[a-z_]+:gradmon\w+:\w+|gradmon_\w+|ALERTS", query["expr"])
            assert label == "__name__" or all(label in known[name] for name in names if name in known), panel["title"]


@pytest.mark.parametrize(
    ("expr", "bad"),
    [
        ("gradmon_los", ["gradmon_los"]),
        ('gradmon_loss{runs="a"}', ["gradmon_loss: runs"]),
        ("max by (layer) (gradmon_loss)", ["layer"]),
        ('{__name__=~"gradmon_alarm_.+"}', ["gradmon_alarm_.+"]),
        ('rate(gradmon_readings{run="a"}[5m])', ["gradmon_readings"]),
        ("time() - run_rank:gradmon_last_probe:max > 1e3", ["run_rank:gradmon_last_probe:max"]),
        ("sum by (le) (rate(gradmon_probe_duration_seconds_bucket[$__rate_interval])) or vector(0)", []),
    ],
)
def test_expressions_that_ask_for_what_there_is_not_are_found(expr, bad, known):
    assert unknown(expr, known) == bad


def test_every_metric_has_its_place():
    asked = " ".join(query["expr"] for _, query in queries(BOARDS["gradmon-run.json"]))
    assert [name for name in METRICS if not re.search(rf"\bgradmon_{name}\b", asked)] == []


def test_limits_are_those_of_the_rules():
    expected = {}
    for rule in default_rules():
        if isinstance(rule, Above):
            expected[rule.metric] = _limits.Limit(rule.severity, above=rule.limit)
        elif isinstance(rule, Below):
            expected[rule.metric] = _limits.Limit(rule.severity, below=rule.limit)
        elif isinstance(rule, Outside):
            expected[rule.metric] = _limits.Limit(rule.severity, above=rule.high, below=rule.low)
    assert expected == _limits.LIMITS


@pytest.mark.parametrize("metric", sorted(_limits.LIMITS))
def test_panels_have_their_thresholds_at_the_limits(metric):
    limit = _limits.LIMITS[metric]
    asked = re.compile(rf"\bgradmon_{metric}(\{{|:max)")
    charts = [
        panel
        for board in BOARDS.values()
        for panel, query in queries(board)
        if panel["type"] in ("timeseries", "stat") and asked.search(query["expr"])
    ]
    assert charts
    for panel in charts:
        steps = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert steps == [None, *(value for value in (limit.below, limit.above) if value is not None)], panel["title"]


def test_condition_numbers_have_a_logarithmic_axis():
    for panel, query in queries(BOARDS["gradmon-run.json"]):
        if panel["type"] == "timeseries" and re.search(r"_(condition|scale|norm)\{|noise_ratio", query["expr"]):
            scale = panel["fieldConfig"]["defaults"]["custom"]["scaleDistribution"]["type"]
            assert scale == ("linear" if "param_norm" in query["expr"] else "log"), panel["title"]


def test_alerts_are_annotations():
    for board in BOARDS.values():
        asked = [annotation["target"]["expr"] for annotation in board["annotations"]["list"]]
        assert any("ALERTS{" in expr for expr in asked)
        assert any("gradmon_alert_" in expr for expr in asked)


def test_the_rules_ask_for_what_there_is(known):
    rules = [
        rule
        for path in RULES.parent.glob("*_rules.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    asked = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]
    for rule in rules:
        text = rule.get("annotations", {}).get("description", "")
        asked += [(rule["alert"], expr.replace("%q", '"x"')) for expr in re.findall(r'with printf "([^"]*)"', text)]
    assert len(asked) >= len(rules) + 8
    assert [(name, bad) for name, expr in asked if (bad := unknown(expr, known))] == []


@pytest.mark.parametrize("page", ["alerts.md", "monitoring.md"])
def test_the_pages_name_series_that_there_are(page, known):
    named = set(re.findall(r"\bgradmon_[a-z_]+\b(?![<*])", (DOCS / page).read_text()))
    assert named
    shown = {name.removesuffix("_bucket") for name in known} | {"gradmon_alert_", "gradmon_layer_"}
    assert sorted(named - shown) == []


def test_what_can_be_chosen():
    names = {name: [v["name"] for v in board["templating"]["list"]] for name, board in BOARDS.items()}
    assert names == {"gradmon-run.json": ["datasource", "run", "rank"], "gradmon-fleet.json": ["datasource", "run"]}
    assert all("${datasource}" in json.dumps(panel) for board in BOARDS.values() for panel in panels(board))


def test_links_lead_to_a_dashboard_that_there_is():
    uids = {board["uid"] for board in BOARDS.values()}
    led = set(re.findall(r"/d/([\w-]+)", json.dumps(list(BOARDS.values()))))
    assert led == {"gradmon-run"}
    assert led <= uids
    assert len(uids) == len(BOARDS)
