"""The drawings of a report: bands, axes, gaps, thinning and colours."""

from __future__ import annotations

import math
import re
import time
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmon._reading import Reading
from gradmon_integrations.display.states import limits, number
from gradmon_integrations.report.drawing import shortened
from gradmon_integrations.report.lines import BOTTOM, LEFT, RIGHT, TOP, Line, line_chart
from gradmon_integrations.report.metrics import healthy
from gradmon_integrations.report.palette import DARK, LIGHT
from gradmon_integrations.report.scale import Scale, is_logarithmic, span
from gradmon_integrations.report.series import MOST_POINTS, Point, Series, drawn
from tests.integrations.report_files import course, firing, page_of, resolved, write

# Bands, limits and axes


def shapes(markup: str, kind: str) -> list[ET.Element]:
    return [one for one in ET.fromstring(markup).iter() if kind in one.get("class", "").split()]


def test_the_healthy_band_ends_at_the_limit() -> None:
    series = Series.of(course("step_ratio", [0.1, 0.5, 1.5, 0.2]))
    markup = line_chart("k", "step_ratio", "d", [Line("a", "r0", series, (1, 4))], limits("step_ratio"), (1, 4))
    (band,), (limit,), (line,) = shapes(markup, "band"), shapes(markup, "limit"), shapes(markup, "line")
    places = [tuple(map(float, place.split())) for place in line.get("d", "")[1:].split("L")]
    heights = [y for _, y in places]
    # Straight lines: 1 lies as far between 0.5 and 1.5 as its height between theirs.
    assert float(band.get("y", "")) == pytest.approx((heights[1] + heights[2]) / 2, abs=0.1)
    assert limit.get("d", "").startswith(f"M{LEFT} {band.get('y')}")
    assert [x for x, _ in places] == pytest.approx([LEFT + i * (RIGHT - LEFT) / 3 for i in range(4)], abs=0.1)
    assert "alert above 1" in "".join(ET.fromstring(markup).itertext())


def test_a_limit_far_away_does_not_crush_the_numbers() -> None:
    series = Series.of(course("weight_condition", [2.0, 3.0, 2.5]))
    markup = line_chart(
        "k", "weight_condition", "d", [Line("a", "r0", series, (1, 3))], limits("weight_condition"), (1, 3)
    )
    assert not shapes(markup, "limit")
    (band,) = shapes(markup, "band")
    assert (float(band.get("y", "")), float(band.get("height", ""))) == (TOP, BOTTOM - TOP)


def test_an_axis_is_logarithmic_for_norms_and_condition_numbers() -> None:
    assert is_logarithmic("grad_norm", [1.0, 2.0])
    assert is_logarithmic("weight_condition", [])
    assert is_logarithmic("loss", [0.01, 2.0])
    assert not is_logarithmic("loss", [0.1, 2.0])
    assert not is_logarithmic("loss", [0.0, 2.0])
    assert not is_logarithmic("weight_cosine", [-1.0, 1.0])


def test_bands_in_words() -> None:
    assert healthy("step_ratio") == "Healthy: up to 1."
    assert healthy("update_ratio") == "Healthy: from 1e-8 to 0.1."
    assert healthy("grad_norm") == "Healthy: at least 1e-7. Judged by its own past as well: exploding."
    assert healthy("param_norm") == ""


def test_an_alert_on_a_metric_has_a_bar_over_its_drawing(tmp_path: Path) -> None:
    alerts = [firing("step_too_long", 2), resolved("step_too_long", 4), firing("batch_too_noisy", 3, severity="info")]
    readings = [*course("step_ratio", [0.1, 2, 3, 0.1, 0.1]), *course("loss", [5, 4, 3, 2, 1])]
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings, alerts))
    (bar,) = page.figure("step_ratio").all("rect", "bar")
    assert bar.text == "mine: step_too_long, step 2 to 4"
    start, width = float(bar.attributes["x"]), float(bar.attributes["width"])
    assert (start, width) == pytest.approx((LEFT + (RIGHT - LEFT) / 4, (RIGHT - LEFT) / 2), abs=0.1)
    assert not page.figure("loss").all("rect", "bar")


_numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(_numbers, min_size=1, max_size=20), st.booleans(), st.lists(_numbers, max_size=2))
def test_a_scale_keeps_the_order_and_stays_inside(values: list[float], log: bool, bounds: list[float]) -> None:
    scale = span(values, bounds, log=log, start=200.0, end=30.0)
    places = [scale.place(value) for value in sorted(values)]
    assert all(30.0 <= place <= 200.0 for place in places)
    assert all(after <= before for before, after in pairwise(places))
    ticks = scale.ticks()
    assert all(scale.holds(tick) for tick in ticks)
    assert 1 <= len(ticks) <= 12
    assert len({number(tick) for tick in ticks}) == len(ticks)


@settings(deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e12))
def test_ticks_are_round_and_few(low: float, ratio: float) -> None:
    for log in (False, True):
        ticks = Scale(low, low * ratio, 0.0, 1.0, log).ticks()
        assert 2 <= len(ticks) <= 9, ticks


# Gaps, infinities and thinning


def test_missing_numbers_are_gaps_and_counted_by_reason(tmp_path: Path) -> None:
    values = [1.0, math.nan, math.nan, 2.0, 3.0, math.nan, 1.5]
    readings = course("weight_condition", values, reason="rounding")
    readings[5] = readings[5]._replace(reason="zero gradient")
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings))
    figure = page.figure("weight_condition")
    assert "3 of 7 not available: rounding (2), zero gradient (1) (crosses at the lower edge)." in figure.text
    assert len(figure.all("circle", "dot")) == 4
    assert len([one for one in figure.all("path", "line") if not one.within("figcaption")]) == 1, (
        "only 2.0 to 3.0 joined"
    )
    (gap,) = figure.all("path", "gap")
    assert gap.attributes["d"].count("M") == 2 * 3
    assert [row[1] for row in page.table("weight_condition, ")[1:]].count("not available") == 3


def test_a_number_of_long_ago_does_not_speak_for_the_end(tmp_path: Path) -> None:
    readings = course("step_ratio", [0.5, 0.4, math.nan], reason="zero gradient")
    readings += course("update_ratio", [math.nan, math.nan, 1e-3])
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", readings))
    (lost,), (kept,) = (page.figure(name).all("li") for name in ("step_ratio", "update_ratio"))
    assert lost.text == "mine: last 0.4 at step 2, median 0.45, from 0.4 to 0.5. no number at the end"
    assert kept.text == "mine: last 0.001. ✓ within limits at the end"


def test_one_reason_is_not_counted_twice(tmp_path: Path) -> None:
    values = [math.nan] * 17 + [1.0] * 183
    page = page_of(tmp_path, write(tmp_path / "a.jsonl", course("weight_condition", values, reason="rounding")))
    assert "17 of 200 not available: rounding (crosses" in page.figure("weight_condition").text


def test_infinities_are_triangles_and_counted(tmp_path: Path) -> None:
    readings = course("noise_ratio", [1.0, math.inf, 2.0, -math.inf, 3.0])
    figure = page_of(tmp_path, write(tmp_path / "a.jsonl", readings)).figure("noise_ratio")
    assert "2 of 5 infinite (triangles at the edge)." in figure.text
    up, down = figure.all("path", "dot")
    assert f" {TOP}L" in up.attributes["d"]
    assert f" {BOTTOM}L" in down.attributes["d"]


def test_infinities_count_in_the_median(tmp_path: Path) -> None:
    readings = course("noise_ratio", [math.inf, 3.0, math.inf, 5.0, math.nan, math.inf], reason="batch of one")
    (entry,) = page_of(tmp_path, write(tmp_path / "a.jsonl", readings)).figure("noise_ratio").all("li")
    assert entry.text.startswith("mine: last inf, median inf, from 3 to inf.")


def test_zeros_on_a_logarithmic_axis_are_told(tmp_path: Path) -> None:
    readings = course("grad_norm", [1.0, 0.0, 100.0])
    figure = page_of(tmp_path, write(tmp_path / "a.jsonl", readings)).figure("grad_norm")
    assert "1 of 3 not above 0, which a logarithmic axis shows at its lower edge." in figure.text


_values = st.lists(st.floats(-1e3, 1e3) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=1500)


@settings(max_examples=60, deadline=None)
@given(_values, st.integers(4, MOST_POINTS), st.integers(1, 50))
def test_thinning_keeps_the_extremes_the_ends_and_the_order(values: list[float], most: int, stride: int) -> None:
    series = Series(tuple(Point(place * stride, value) for place, value in enumerate(values)))
    shown = drawn(series, most)
    points = [point for piece in shown.pieces for point in piece]
    finite = [point for point in series.points if math.isfinite(point.value)]
    assert len(points) == shown.points <= most
    assert set(points) <= set(finite)
    assert [point.step for point in points] == sorted({point.step for point in points})
    assert shown.thinned == (len(points) < len(finite))
    if finite:
        assert (points[0], points[-1]) == (finite[0], finite[-1])
        assert min(p.value for p in points) == min(p.value for p in finite)
        assert max(p.value for p in points) == max(p.value for p in finite)
    assert bool(shown.missing) == any(math.isnan(value) for value in values)
    assert bool(shown.infinite) == any(math.isinf(value) for value in values)


def test_a_spike_survives_a_hundred_thousand_readings_in_a_page_of_reasonable_size(tmp_path: Path) -> None:
    values = [math.sin(step / 500) + 2 for step in range(100_000)]
    values[54_321] = 50.0
    readings = [
        Reading(name, value * factor, step)
        for step, value in enumerate(values, start=1)
        for name, factor in (("loss", 1.0), ("step_ratio", 0.1))
    ]
    path = write(tmp_path / "long.jsonl", readings)
    began = time.process_time()
    page = page_of(tmp_path, path)
    assert time.process_time() - began < 30
    assert len(page.source) < 300_000
    figure = page.figure("loss")
    drawn_points, total = re.search(
        r"(\d+) of (\d+) points drawn; the lowest and highest are kept\.", figure.text
    ).groups()  # type: ignore[union-attr]
    assert int(total) == 100_000
    assert int(drawn_points) <= MOST_POINTS
    (line,) = [one for one in figure.all("path", "line") if not one.within("figcaption")]
    places = [tuple(map(float, place.split())) for place in line.attributes["d"][1:].split("L")]
    assert len(places) == int(drawn_points)
    x, _ = min(places, key=lambda place: place[1])
    assert x == pytest.approx(LEFT + (RIGHT - LEFT) * 54_321 / 99_999, abs=0.1)
    assert "from 1 to 50" in figure.text
    assert "loss, 40 of 100000 steps" in figure.text


# Colours


def contrast(first: str, second: str) -> float:
    """The ratio of luminances as WCAG 2.1 defines it."""
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_measure_of_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_can_be_told_from_what_is_behind_them(colours: dict[str, str]) -> None:
    assert LIGHT.keys() == DARK.keys()
    backgrounds = ["page", "paper"]
    pairs = [
        (text, behind) for text in ("ink", "quiet", "link", "good", "note", "bad", "info") for behind in backgrounds
    ]
    pairs += [("limit", "paper"), ("limit", "band"), ("quiet", "band"), ("ink", "differs"), ("quiet", "differs")]
    pairs += [("ink", "step"), ("ink", "batch")]
    pairs += [(f"r{place}", behind) for place in range(8) for behind in ("paper", "band")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_shades_grow_steadily(colours: dict[str, str]) -> None:
    lights = [_luminance(colours[f"h{place}"]) for place in range(8)]
    assert lights == sorted(lights, reverse=colours is LIGHT)
    ratios = [contrast(colours[f"h{place}"], colours[f"h{place + 1}"]) for place in range(7)]
    assert min(ratios) > 1.15, ratios


def test_long_names_lose_their_middle() -> None:
    for most in range(3, 30):
        short = shortened("transformer.h.11.mlp.c_fc", most)
        assert len(short) == min(most, 25)
        assert most >= 25 or ("…" in short and short.startswith("t"))


def test_the_name_of_a_limit_does_not_cover_what_is_drawn() -> None:
    for ends in ([0.9, 0.9, 1.1], [1.1, 0.9, 0.9]):
        values = [ends[0]] * 10 + [ends[1]] * 10 + [ends[2]] * 10
        series = Series.of(course("step_ratio", values))
        lines = [
            Line("a", "r0", series, (1, 30)),
            Line("b", "r1", Series.of(course("step_ratio", [0.1] * 30)), (1, 30)),
        ]
        markup = line_chart("k", "step_ratio", "d", lines, limits("step_ratio"), (1, 30))
        (name,) = shapes(markup, "limit-name")
        right, base = float(name.get("x", "")), float(name.get("y", ""))
        for dot in shapes(markup, "dot"):
            x, y = float(dot.get("cx", "")), float(dot.get("cy", ""))
            assert not (right - 110 < x < right and base - 12 < y < base + 3), (ends, x, y)


def test_crosses_and_triangles_do_not_cover_the_numbers() -> None:
    series = Series.of(course("loss", [1.0, math.nan, math.inf, 0.0, 2.0]))
    markup = line_chart("k", "loss", "d", [Line("a", "r0", series, (1, 5))], (), (1, 5))
    heights = [float(dot.get("cy", "")) for dot in shapes(markup, "dot") if dot.tag.endswith("circle")]
    assert len(heights) == 3
    assert TOP + 10 < min(heights) < max(heights) < BOTTOM - 8


def test_a_short_run_beside_a_long_one_keeps_its_cells(tmp_path: Path) -> None:
    for run, steps in (("short", range(1, 31)), ("long", range(1, 301, 10))):
        readings = [Reading("grad_norm", 10.0**place, step, "only") for place, step in enumerate(steps)]
        write(tmp_path / f"{run}.jsonl", readings, run=run)
    page = page_of(tmp_path, tmp_path)
    (svg,) = [one for one in page.all("svg") if one.text.startswith("grad_norm of each layer of short")]
    cells = [one.attributes["d"].count("M") for one in svg.all("path", "cell")]
    # Seven of the 72 columns for a tenth of the steps, each of another shade; and the legend.
    assert sum(cells) == 7 + 8


def test_bars_of_many_runs_do_not_cover_each_other(tmp_path: Path) -> None:
    for place in range(12):
        write(
            tmp_path / f"{place:02}.jsonl",
            course("step_ratio", [2.0] * 4),
            [firing("step_too_long", 2)],
            run=f"r{place}",
        )
    bars = page_of(tmp_path, tmp_path).figure("step_ratio").all("rect", "bar")
    places = sorted((float(bar.attributes["y"]), float(bar.attributes["height"])) for bar in bars)
    assert len(places) == 12
    assert all(y + height <= below + 0.1 for (y, height), (below, _) in pairwise(places))
    assert places[0][0] >= 0
    assert places[-1][0] + places[-1][1] < TOP
