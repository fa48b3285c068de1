"""A real TensorBoard over a real training's event files, looked at with a real browser.

With ``GRADMON_SCREENSHOTS`` set to a directory, the pictures of docs/tensorboard.md are made there.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradmon import Monitor, every
from gradmon_integrations.sinks.tensorboard import TensorBoardSink
from tests.e2e.browser import browser, opened
from tests.e2e.servers import until

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

SIZE = {"width": 1500, "height": 1150}
# For what TensorBoard draws on a busy machine, in milliseconds.
PATIENCE = 60_000


def train(logdir, name, depth, gain, rate, steps=60):
    """A short training; weights that are `gain` times too large make it ill-conditioned."""
    generator = torch.Generator().manual_seed(1)
    widths = [16, *[32] * depth]
    hidden = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=gain / inputs**0.5, generator=generator)
        hidden += [linear, nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)
    truth = torch.randn(16, 4, generator=generator)

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    sinks = [TensorBoardSink(logdir / name, histogram_every=2)]
    with Monitor(
        model,
        optimizer,
        loss,
        metrics="all",
        schedule=every(4),
        layers=True,
        run=name,
        hparams={"depth": depth},
        sinks=sinks,
    ) as monitor:
        for _ in range(steps):
            inputs = torch.randn(24, 16, generator=generator)
            batch = inputs, (inputs @ truth).argmax(1)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
        assert monitor.failures == {}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a TensorBoard that has loaded both runs."""
    logdir = tmp_path_factory.mktemp("tensorboard") / "runs"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(logdir, "healthy", 5, 1.0, 0.02)
        train(logdir, "ill-conditioned", 8, 4.0, 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false"]
    address = f"http://127.0.0.1:{port}"
    # In the directory above: TensorBoard shows the path that it is given, and so do the pictures.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=logdir.parent, **quiet) as server:
        try:
            runs = {}
            for _ in range(240):
                assert server.poll() is None, "TensorBoard has ended"
                try:
                    runs = fetched(f"{address}/data/plugin/scalars/tags")
                except (urllib.error.URLError, ConnectionError):
                    runs = {}
                if len(runs) == 2:
                    break
                time.sleep(0.5)
            assert set(runs) == {"healthy", "ill-conditioned"}
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


def fetched(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def picture(page, name):
    directory = os.environ.get("GRADMON_SCREENSHOTS")
    if directory:
        page.wait_for_timeout(4000)
        page.screenshot(path=str(Path(directory) / name))


def test_custom_scalars_have_charts_with_data(chromium, url):
    layout = fetched(f"{url}/data/plugin/custom_scalars/layout")
    categories = [category["title"] for category in layout["category"]]
    assert categories == ["health", "two sources", "step-consistency", "batch-dissonance", "layers"]
    charts = [chart for category in layout["category"] for chart in category["chart"]]
    for chart in charts:
        for tag in chart["multiline"]["tag"]:
            query = urllib.parse.urlencode({"run": "ill-conditioned", "tag": tag})
            assert fetched(f"{url}/data/plugin/custom_scalars/scalars?{query}")["tag_to_events"], chart["title"]
    with opened(chromium, f"{url}/#custom_scalars", viewport=SIZE) as page:
        for category in categories:
            page.get_by_text(category, exact=True).first.wait_for(timeout=PATIENCE)
        for category in layout["category"][:2]:
            for chart in category["chart"]:
                page.get_by_text(chart["title"], exact=True).first.wait_for(timeout=PATIENCE)
        # Below a chart is the number of series in it: here one a run.
        page.get_by_text("Matches (2)").nth(len(layout["category"][0]["chart"]) - 1).wait_for(timeout=PATIENCE)
        picture(page, "tensorboard-charts.png")


def test_time_series_are_drawn(chromium, url):
    with opened(chromium, f"{url}/?forceSVG=true#timeseries", viewport=SIZE) as page:
        page.locator("card-view", has_text="batch-dissonance/gradient_coherence").first.wait_for(timeout=PATIENCE)
        page.locator("metrics-tag-filter-component input").fill("log10_weight_condition|health/loss")
        for tag in ("health/loss", "step-consistency/log10_weight_condition"):
            paths = page.locator("card-view", has_text=tag).first.locator("svg path")

            def drawn(paths=paths):
                lines = paths.evaluate_all("paths => paths.map(path => path.getAttribute('d') || '')")
                return len([line for line in lines if line.count("L") >= 5]) >= 2

            until(drawn, f"the lines of {tag}")


def test_the_alerts_are_a_table(chromium, url):
    with opened(chromium, f"{url}/#text&tagFilter=alerts%2Flog%7C%5Erun", viewport=SIZE) as page:
        page.get_by_text("alerts/log/text_summary").first.wait_for(timeout=PATIENCE)
        # TensorBoard puts each text into a table of one cell.
        rows = page.locator("table table tr")
        header = rows.filter(has_text="severity").first
        header.wait_for(timeout=PATIENCE)
        assert header.locator("th").all_inner_texts() == [
            *("step", "state", "severity", "rule", "value", "message", "remedy", "layers")
        ]
        row = rows.filter(has_text="ill_conditioned").first
        row.wait_for(timeout=PATIENCE)
        assert row.locator("td").nth(1).inner_text() == "firing"
        assert "lower the learning rate" in row.locator("td").nth(6).inner_text().lower().replace("\n", " ")
        rows.filter(has_text="learning_rate").nth(1).wait_for(timeout=PATIENCE)
        picture(page, "tensorboard-alerts.png")


def test_the_runs_are_rows_of_the_hparams_tab(chromium, url):
    with opened(chromium, f"{url}/#hparams", viewport={"width": 2100, "height": 700}) as page:
        page.get_by_text("Trial ID").first.wait_for(timeout=PATIENCE)
        for text in ("healthy", "ill-conditioned", "depth", "learning_rate", "0.020000", "0.050000", "step_ratio"):
            page.get_by_text(text, exact=True).first.wait_for(timeout=PATIENCE, state="attached")
        picture(page, "tensorboard-hparams.png")


def test_layers_have_histograms(chromium, url):
    with opened(chromium, f"{url}/#histograms", viewport=SIZE) as page:
        page.get_by_text("layers/grad_norm").first.wait_for(timeout=PATIENCE)
        page.locator("vz-histogram-timeseries path").first.wait_for(state="attached", timeout=PATIENCE)
        picture(page, "tensorboard-layers.png")
