"""The report on real runs, their alerts, verdicts and layers: what it says is what the files say."""

from __future__ import annotations

import math
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gradmon._reading import Alert, Reading
from gradmon.sinks import read_runs
from gradmon_integrations.display.states import number
from gradmon_integrations.report.episodes import by_rule, episodes_of
from tests.integrations.report_files import course, firing, page_of, resolved, train, write
from tests.integrations.report_pages import Page


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of real runs: one in order, one in trouble."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "fine.jsonl", "fine", 1.0, 0.3)
    train(folder / "rough.jsonl", "rough", 6.0, 0.5)
    return folder / "fine.jsonl", folder / "rough.jsonl"


@pytest.fixture(scope="module")
def both(real: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("both"), *real)


# What the page says of real runs


def test_every_metric_of_real_runs_is_drawn_with_its_numbers(real: tuple[Path, Path], both: Page) -> None:
    for path in real:
        (log,) = read_runs(path)
        values: dict[str, list[float]] = {}
        for reading in log.readings:
            if reading.layer is None and math.isfinite(reading.value):
                values.setdefault(reading.name, []).append(reading.value)
        for name in ("loss", "grad_norm", "step_ratio", "weight_condition", "gradient_confusion", "learning_rate"):
            (entry,) = [one.text for one in both.figure(name).all("li") if one.text.startswith(f"{log.run}: ")]
            low, high = min(values[name]), max(values[name])
            if low < high:
                middle = number(statistics.median(values[name]))
                assert f", median {middle}, from {number(low)} to {number(high)}." in entry, name


def test_the_numbers_behind_a_drawing_are_those_of_the_file(real: tuple[Path, Path], both: Page) -> None:
    head, *rows = both.table("step_ratio, ")
    assert head == ["step", "fine", "rough"]
    for place, path in enumerate(real, start=1):
        written = {r.step: r.value for r in read_runs(path)[0].readings if r.name == "step_ratio" and r.layer is None}
        assert len(rows) == len(written)
        assert all(row[place] == number(written[int(row[0])]) for row in rows)


def test_real_alerts_are_told_with_their_steps_reasons_and_remedies(real: tuple[Path, Path], both: Page) -> None:
    (log,) = read_runs(real[1])
    began = [alert for alert in log.alerts if alert.state == "firing" and alert.rule == "step_too_long"]
    assert began, "the run in trouble raised no alert"
    section = both.by_id("alerts").text
    assert f"step_too_long, step {began[0].step} to " in section
    assert began[0].message in section
    assert began[0].remedy in section
    for row in both.table("Alerts of rough")[1:]:
        assert [row[0], row[2]] in [[a.rule, str(a.step)] for a in log.alerts if a.state == "firing"]


def test_the_verdicts_tell_the_runs_apart(both: Page) -> None:
    fine, rough = both.all("article")
    assert "bad" in rough.classes
    assert "In trouble" in rough.text
    assert "What to change: " in rough.text
    assert "bad" not in fine.classes
    assert "In trouble" not in fine.text
    assert "end finished" in fine.text


def test_settings_are_compared(both: Page) -> None:
    rows = {row[0]: row[1:] for row in both.table("What was set")}
    assert rows["gain (differs)"] == ["1.0", "6.0"]
    assert rows["learning_rate (differs)"] == ["0.3", "0.5"]
    assert rows["model"] == ["Sequential", "Sequential"]
    marked = [row.all("th")[0].text for row in both.all("tr", "marked")]
    assert marked
    assert all(name.endswith(" (differs)") for name in marked)


def test_equal_numbers_of_different_types_do_not_differ(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{run}.jsonl", course("loss", [1.0]), run=run, info={"weight_decay": decay, "depth": depth})
        for run, decay, depth in [("a", 0, 2), ("b", 0.0, 3)]
    ]
    _, *rows = page_of(tmp_path, *files).table("What was set: 1 of 2 differ")
    assert {row[0]: row[1:] for row in rows} == {"depth (differs)": ["2", "3"], "weight_decay": ["0", "0.0"]}


def test_the_best_end_has_a_star(real: tuple[Path, Path], both: Page) -> None:
    ends = []
    for path in real:
        losses = [r.value for r in read_runs(path)[0].readings if r.name == "loss"]
        ends.append(statistics.median(losses[-5:]))
    row = next(row for row in both.table("At the end") if row[0] == "loss")
    assert row[1:] == [f"★ {number(end)}" if end == min(ends) else number(end) for end in ends]


def test_layers_have_heat_maps_and_a_table(real: tuple[Path, Path], both: Page) -> None:
    (log,) = read_runs(real[0])
    newest = {(r.name, r.layer): r.value for r in log.readings if r.layer is not None}
    head, *rows = both.table("Newest numbers of the layers of fine")
    assert [row[0] for row in rows] == ["0", "2", "4"]
    for row in rows:
        for name, cell in zip(head[1:], row[1:], strict=True):
            assert cell == number(newest[name, row[0]])
    names = [svg.all("title")[0].text for svg in both.by_id("layers").all("svg")]
    for run in ("fine", "rough"):
        assert f"grad_norm of each layer of {run}" in names
        assert f"Each layer's part of step_share of {run}" in names


def test_what_watching_cost(real: tuple[Path, Path], both: Page) -> None:
    rows = {row[0]: row[1:] for row in both.table("What the monitor cost")}
    readings = [read_runs(path)[0].readings for path in real]
    overheads = [[r.value for r in held if r.name == "monitor_overhead"] for held in readings]
    assert rows["its time over the training's, median"] == [
        f"{number(100 * statistics.median(held))} %" for held in overheads
    ]
    assert rows["failures inside the monitor"] == ["0", "0"]
    assert rows["steps looked at"] == ["30", "30"]


def test_the_two_sources_are_drawn_as_areas(both: Page) -> None:
    for run in ("fine", "rough"):
        (figure,) = [one for one in both.by_id("sources").all("figure") if one.all("h4")[0].text == run]
        assert len(figure.all("path", "step-area")) == len(figure.all("path", "batch-area")) >= 1


def test_every_drawing_is_well_formed_xml(both: Page) -> None:
    drawings = re.findall(r"<svg .*?</svg>", both.source, flags=re.DOTALL)
    assert len(drawings) == len(both.all("svg"))
    for drawing in drawings:
        ET.fromstring(drawing)


# Alerts and verdicts


def test_alerts_are_paired_by_rule_and_layer() -> None:
    found = episodes_of(
        [
            firing("dead_layer", 3, layer="a"),
            firing("dead_layer", 4, layer="b"),
            resolved("dead_layer", 6, layer="a"),
            firing("dead_layer", 8, layer="a"),
            resolved("exploding", 9, severity="critical"),
        ]
    )
    assert [(one.alert.rule, one.alert.layer, one.start, one.end, one.over) for one in found] == [
        ("dead_layer", "a", 3, 6, True),
        ("dead_layer", "b", 4, None, False),
        ("dead_layer", "a", 8, None, False),
        ("exploding", None, None, 9, True),
    ]
    critical, dead = by_rule(found)
    assert (critical.rule, dead.rule) == ("exploding", "dead_layer")
    assert dead.layers == ("a", "b")
    assert (critical.firing, dead.firing) == (False, True)
    assert [one.steps for one in found] == [
        "step 3 to 6",
        "step 4 to the end",
        "step 8 to the end",
        "before the file begins to 9",
    ]


def test_an_alert_that_fires_again_after_a_resume_goes_on() -> None:
    (one,) = episodes_of([firing("confused", 5), firing("confused", 7), resolved("confused", 9)])
    assert (one.start, one.end) == (5, 9)


def test_a_flapping_alert_is_told_in_one_line(tmp_path: Path) -> None:
    alerts = [change(rule_step) for rule_step in range(1, 200, 2) for change in (_on, _off)]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("loss", [3.0, 2.0, 1.0]), alerts))
    assert "confused, 100 times, first at step 1; none still firing at the end." in page.by_id("alerts").text
    assert len(page.by_id("alerts").all("rect", "bar")) == 100


def _on(step: int) -> Alert:
    return firing("confused", step)


def _off(step: int) -> Alert:
    return resolved("confused", step + 1)


def test_many_episodes_do_not_make_a_table_without_end(tmp_path: Path) -> None:
    alerts = [firing("dead_layer", 1, layer=f"layers.{place}") for place in range(300)]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("loss", [3.0, 2.0, 1.0]), alerts))
    assert len(page.table("Alerts of mine, the first 100 of 300")) == 101
    assert "and 296 more" in page.by_id("alerts").text
    assert "And 299 others of this kind." in page.by_id("verdict").text


_FALLING = [8.0, 7.8, 7.6, 7.4, 7.2, 7.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0]
_GOOD = [*course("loss", _FALLING), *course("step_ratio", [0.1] * 12)]


@pytest.mark.parametrize(
    ("alerts", "ended", "word"),
    [
        ([], True, "Healthy"),
        ([firing("overhead_high", 3, severity="info")], True, "Healthy"),
        ([firing("sink_errors", 3)], True, "Healthy"),
        ([], False, "To be watched"),
        ([firing("batch_too_noisy", 3, severity="info")], True, "To be watched"),
        ([firing("step_too_long", 3), resolved("step_too_long", 5)], True, "To be watched"),
        ([firing("step_too_long", 3)], True, "In trouble"),
        ([firing("exploding", 3, severity="critical")], None, "In trouble"),
    ],
)
def test_the_verdict_follows_the_alerts(tmp_path: Path, alerts: list[Alert], ended: bool | None, word: str) -> None:
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", _GOOD, alerts, ended=ended))
    assert page.all("span", "badge")[0].text.endswith(word)


# Layers


def test_dead_and_missing_cells_of_a_heat_map(tmp_path: Path) -> None:
    readings = [
        *course("grad_norm", [1.0, 1.0, 1.0, 1.0], layer="whole"),
        *course("grad_norm", [0.0, 0.0, 0.0, 0.0], layer="dead"),
        *course("grad_norm", [100.0, math.nan, math.nan, 100.0], layer="gaps"),
    ]
    figure = page_of(tmp_path, write(tmp_path / "a.jsonl", readings)).figure("grad_norm of each layer")
    assert len(figure.all("path", "zero")) == 1
    # Two boxes of the highest shade, with the gap between them, and the legend's.
    boxes = [one.attributes["d"].count("M") for one in figure.all("path", "h7")]
    assert sorted(boxes) == [1, 2]
    assert "Cells with an outline only: exactly 0." in figure.text
    assert "2 of 12 not available (empty cells)." in figure.text


def test_a_sparse_schedule_leaves_no_stripes(tmp_path: Path) -> None:
    steps = [1, 2, 3, *range(10, 310, 10)]
    readings = [Reading("grad_norm", 1.0, step, "only") for step in steps]
    figure = page_of(tmp_path, write(tmp_path / "a.jsonl", readings)).figure("grad_norm of each layer")
    cells = [one for one in figure.all("path", "cell") if "zero" not in one.classes]
    assert cells[0].attributes["d"].count("M") == 1, "one box from the first step to the last"


def test_of_many_layers_the_largest_are_drawn_in_the_models_order(tmp_path: Path) -> None:
    readings = [Reading("grad_norm", float(place % 100 + 1), 1, f"layers.{place}") for place in range(300)]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings))
    figure = page.figure("grad_norm of each layer")
    assert "64 of 300 layers are shown: those with the largest numbers." in figure.text
    rows = [row[0] for row in page.table("grad_norm of each layer, ")[1:]]
    assert len(rows) == 64
    places = [int(row.removeprefix("layers.")) for row in rows]
    assert places == sorted(places)
    assert min(place % 100 for place in places) >= 78
    assert len(page.table("Newest numbers of the layers of mine, the first 200 of 300")) == 201
