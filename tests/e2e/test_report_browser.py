"""The report in a real browser: at a desk, on a phone, in the dark, on paper, and with scripts switched on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradmon import Monitor, every
from gradmon._reading import Alert, Reading
from gradmon.sinks import JsonlSink
from gradmon_integrations.report.command import COMMAND
from gradmon_integrations.report.palette import DARK, LIGHT
from tests.e2e.browser import browser, opened

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

_NAMELESS = """() => [...document.querySelectorAll(
        'svg:not([aria-hidden]), table, section, nav, article, [role=region]'
    )].filter(one => {
        if (one.matches('table')) return !one.caption?.textContent.trim() || !one.querySelector('th[scope=col]');
        const names = one.getAttribute('aria-label')
            ?? (one.getAttribute('aria-labelledby') ?? '').split(' ')
                .map(id => document.getElementById(id)?.textContent.trim()).join(' ');
        return !names.trim();
    }).map(one => one.outerHTML.slice(0, 120))"""
_EMPTY = """() => [...document.querySelectorAll('figure > svg')].filter(one => {
        const box = one.getBoundingClientRect(), drawn = one.getBBox();
        return box.width < 200 || box.height < 40 || drawn.width < 200 || drawn.height < 20;
    }).map(one => one.querySelector('title').textContent)"""
_OUTSIDE = """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text, path, rect, circle')].filter(part => {
            const one = part.getBoundingClientRect();
            return one.left < box.left - 2 || one.right > box.right + 2
                || one.top < box.top - 2 || one.bottom > box.bottom + 2;
        }).map(part => svg.querySelector('title').textContent + ': ' + part.outerHTML.slice(0, 160));
    })"""
_SMALL = """least => [...document.querySelectorAll('figure > svg text')]
    .filter(one => one.getBoundingClientRect().height < least).map(one => one.textContent)"""
_OVERLAPS = """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text.tick')].map(one => [one.textContent, one.getBoundingClientRect()]);
        return boxes.flatMap(([a, x], i) => boxes.slice(i + 1).filter(([b, y]) =>
            x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 5 && y.top < x.bottom - 5)
            .map(([b]) => svg.querySelector('title').textContent + ': ' + a + ' / ' + b));
    })"""


def _train(path: Path, run: str, gain: float, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(2 if gain == 1 else 8):
        layer = nn.Linear(16, 16)
        nn.init.normal_(layer.weight, std=gain / 4, generator=generator)
        nn.init.zeros_(layer.bias)
        parts += [layer, nn.Tanh()]
    last = nn.Linear(16, 4)
    nn.init.normal_(last.weight, std=0.1, generator=generator)
    nn.init.zeros_(last.bias)
    model = nn.Sequential(*parts, last)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    inputs = torch.randn(640, 16, generator=generator)
    labels = inputs[:, :4].argmax(1)
    with Monitor(model, optimizer, loss, run=run, schedule=every(3), layers=True, sinks=f"jsonl:{path}") as monitor:
        for _ in range(90):
            chosen = torch.randperm(640, generator=generator)[:64]
            optimizer.zero_grad()
            loss(model, (inputs[chosen], labels[chosen])).backward()
            optimizer.step()
            monitor.step((inputs[chosen], labels[chosen]))


def _strange(path: Path) -> None:
    """Long names, gaps, infinities, and what would be markup."""
    hostile = "<img src=x onerror=window.broken=1><script>window.broken=1</script>"
    long = "transformer_with_a_name_without_any_place_to_break." * 4
    sink = JsonlSink(path)
    sink.bind(hostile + long, 0)
    sink.describe({hostile: hostile, "command": long * 3})
    for step in range(1, 500):
        value = math.nan if step % 7 == 0 else math.inf if step % 11 == 0 else 1e-12 * 1.1**step
        reason = hostile if math.isnan(value) else None
        names = ("loss", "noise_ratio", "step_share", "a_metric_of_somebody_else_" * 4)
        sink.write([Reading(name, value, step, reason=reason) for name in names])
        sink.write([Reading("grad_norm", 0.0 if place == 3 else value, step, f"{long}{place}") for place in range(5)])
    sink.alert(Alert(hostile, "critical", "firing", 1.0, 5, long, hostile + long, long, (long,)))
    sink.alert(Alert("step_too_long", "warning", "firing", 1.0, 5, None, hostile, long, (long,)))
    sink.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of a run in order, one in trouble, and one that is strange."""
    folder = tmp_path_factory.mktemp("report")
    _train(folder / "a.jsonl", "fine", 1.0, 0.3)
    _train(folder / "b.jsonl", "rough", 6.0, 0.5)
    _strange(folder / "c.jsonl")
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    output = folder / "report.html"
    assert COMMAND.run(parser.parse_args([str(folder), "-o", str(output)])) == 0
    return output.as_uri()


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_the_screen(running: Any, url: str, size: dict[str, int]) -> None:
    with opened(running, url, viewport=size) as page:
        for _ in ("closed", "open"):
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.querySelectorAll('details[open]').length") > 20


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_drawing_can_be_seen(running: Any, url: str, size: dict[str, int]) -> None:
    with opened(running, url, viewport=size) as page:
        assert page.evaluate("document.querySelectorAll('figure > svg').length") > 30
        assert page.evaluate(_EMPTY) == []
        assert page.evaluate(_OUTSIDE) == []
        assert page.evaluate(_SMALL, 11) == []
        assert page.evaluate(_OVERLAPS) == []


def test_everything_has_a_name(running: Any, url: str) -> None:
    with opened(running, url, viewport=DESKTOP) as page:
        assert page.evaluate(_NAMELESS) == []


def test_a_browser_s_own_tree_of_accessibility_names_the_drawings(running: Any, url: str) -> None:
    with opened(running, url, viewport=DESKTOP) as page:
        count = page.get_by_role("img").count()
        assert count == page.evaluate("document.querySelectorAll('figure > svg').length")
        assert page.get_by_role("img", name="step_ratio over the steps").count() == 1
        assert page.get_by_role("navigation", name="Sections").count() == 1
        assert page.get_by_role("heading", level=1).count() == 1


def test_nothing_is_loaded_and_nothing_is_run(running: Any, url: str) -> None:
    page = running.new_page()
    try:
        requested: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url, wait_until="load")
        assert page.evaluate("window.broken === undefined")
        assert requested == [url]
        assert complaints == []
    finally:
        page.close()


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)], ids=["light", "dark"])
def test_the_colours_follow_the_screen(running: Any, url: str, scheme: str, colours: dict[str, str]) -> None:
    with opened(running, url, viewport=DESKTOP, color_scheme=scheme) as page:
        assert _colour(page, "body", "backgroundColor") == colours["page"]
        assert _colour(page, "body", "color") == colours["ink"]
        assert _colour(page, "figure > svg text.tick", "fill") == colours["quiet"]
        assert _colour(page, "figure > svg path.line.r1", "stroke") == colours["r1"]
        assert _colour(page, "figure > svg rect.band", "fill") == colours["band"]


def test_on_paper_it_is_light_and_keeps_to_the_page(running: Any, url: str) -> None:
    with opened(running, url, viewport={"width": 760, "height": 1075}, color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert _colour(page, "body", "color") == LIGHT["ink"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 760
        assert not page.locator("nav").is_visible()
        assert page.locator("figure > svg").first.is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_keyboard_reaches_the_tables(running: Any, url: str) -> None:
    with opened(running, url, viewport=PHONE) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the verdict"
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('details').open")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('role')") == "region"


def _colour(page: Any, selector: str, name: str) -> str:
    script = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
    parts = page.evaluate(script, [selector, name]).removeprefix("rgb(").removesuffix(")").split(", ")
    return "#" + "".join(f"{int(part):02x}" for part in parts)
