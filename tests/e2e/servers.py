"""Real servers on free loopback ports, each stopped by its own process object, and the files they run on."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from gradmon_integrations.assets import RUNBOOK_URL, export

T = TypeVar("T")


class Server(NamedTuple):
    """A server that answers.

    Attributes:
        address: Host and port.
        url: The same as a URL, without a path.
    """

    address: str
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The JSON that it answers."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=20) as response:
            return json.load(response)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query; for Prometheus."""
        answer = self.get("/api/v1/query", query=expr)
        found = answer["data"]["result"]
        return [{"metric": {}, "value": found}] if answer["data"]["resultType"] == "scalar" else found

    def query_range(self, expr: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The series of a range query that ends now; for Prometheus."""
        now = time.time()
        answer = self.get("/api/v1/query_range", query=expr, start=f"{now - seconds}", end=f"{now}", step="1")
        return answer["data"]["result"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def until(seen: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """Ask again until the answer is true; fail, saying for what, when that takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := seen()):
        if time.monotonic() > deadline:
            pytest.fail(f"{seconds:.0f} seconds have passed without {what}")
        time.sleep(0.25)
    return found


@contextmanager
def started(name: str, arguments: Sequence[str], folder: Path) -> Iterator[Server]:
    """A program that answers at ``/-/ready``; skipped where it is not installed, stopped in the end."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    for _ in range(3):
        address = f"127.0.0.1:{free_port()}"
        with log.open("w") as output:
            command = [program, f"--web.listen-address={address}", *arguments]
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            if until(lambda process=process, address=address: _state(process, address), f"{name} being ready") == "up":
                yield Server(address, f"http://{address}")
                return
            assert "address already in use" in log.read_text(), log.read_text()[-3000:]
        finally:
            stop(process)
    pytest.fail(f"{name} did not get a port: others took it three times")


def _state(process: subprocess.Popen[Any], address: str) -> str | None:
    """Whether a server is up or down, or None as long as it is neither."""
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as response:
            answers = response.status == 200
    except OSError:
        answers = False
    # Somebody else may have taken the port: then it answers, and our own process ends in a moment.
    time.sleep(0.3 if answers else 0)
    if process.poll() is not None:
        return "down"
    return "up" if answers else None


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, by force if it does not want to."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)


@contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Server]:
    """A Prometheus that keeps its data in a folder."""
    arguments = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--enable-feature=exemplar-storage",
    ]
    with started("prometheus", arguments, folder) as server:
        yield server


@contextmanager
def alertmanager(config: Path, folder: Path) -> Iterator[Server]:
    """An Alertmanager that keeps its data in a folder."""
    arguments = [
        f"--config.file={config}",
        f"--storage.path={folder / 'data'}",
        "--cluster.listen-address=",
    ]
    with started("prometheus-alertmanager", arguments, folder) as server:
        yield server


@contextmanager
def pushgateway(folder: Path) -> Iterator[Server]:
    """A Pushgateway."""
    # Debian's keeps what was pushed for the next one to be started, unless it is given a file of its own.
    with started("prometheus-pushgateway", [f"--persistence.file={folder / 'data'}"], folder) as server:
        yield server


class Inbox:
    """What Alertmanager told a webhook."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def alerts(self, run: str, name: str | None = None, status: str | None = None) -> list[dict[str, Any]]:
        """The alerts of one run in all messages so far."""
        return [
            alert
            for message in list(self.messages)
            for alert in message["alerts"]
            if alert["labels"]["run"] == run
            and name in (None, alert["labels"]["alertname"])
            and status in (None, alert["status"])
        ]


@contextmanager
def webhook(port: int) -> Iterator[Inbox]:
    """A receiver of Alertmanager's messages on a thread of this process."""
    inbox = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            inbox.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """The messages are what matters."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield inbox
        finally:
            server.shutdown()
            thread.join()


STALLED_AFTER = 8
"""Seconds; see `quickened`."""


def quickened(folder: Path, *, webhook_port: int = 5001, alertmanager: str = "", pushgateway: str = "") -> Path:
    """The exported files, with the waiting taken out and the addresses put in; all else is as it is shipped.

    - RunStalled after 8 seconds of silence: ``--run-stalled-after 8``;
    - ``for:`` and ``keep_firing_for:`` of every alert: 1s;
    - scraping and evaluating every second; Alertmanager groups for 0 seconds, and tells changes after 1 second;
    - no pause between two messages about the same alert is changed: each must come once.

    Args:
        folder: Where to write.
        webhook_port: Of the receiver of the messages.
        alertmanager: Its address.
        pushgateway: Its address; empty to scrape none.

    Returns:
        The folder.
    """
    export(folder, force=False, runbook_url=RUNBOOK_URL, stalled_after=STALLED_AFTER)
    _edit(folder / "prometheus" / "alert_rules.yml", {r"(for): \d+m": r"\1: 1s"})
    _edit(
        folder / "prometheus" / "prometheus.yml",
        {
            r"_interval: 15s": "_interval: 1s",
            r"127\.0\.0\.1:9093": alertmanager or "127.0.0.1:9",
            r"127\.0\.0\.1:9091": pushgateway or "127.0.0.1:9",
        },
    )
    _edit(
        folder / "alertmanager" / "alertmanager.yml",
        {
            r"group_wait: \d+s": "group_wait: 0s",
            r"group_interval: \d+m": "group_interval: 1s",
            r"127\.0\.0\.1:5001": f"127.0.0.1:{webhook_port}",
        },
    )
    _edit(folder / "prometheus" / "targets" / "gradmon.yml", {r'"127\.0\.0\.1:9464"': ""})
    return folder


def scrape_too(folder: Path, name: str, address: str) -> None:
    """Add a target, as somebody who starts a run would."""
    (folder / "prometheus" / "targets" / f"{name}.yml").write_text(f'- targets: ["{address}"]\n')


def _edit(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text()
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{pattern} is not in {path}"
    path.write_text(text)
