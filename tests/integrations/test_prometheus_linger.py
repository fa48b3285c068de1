"""Closing waits until what a run ended with has been scraped, where there is somebody who scrapes."""

import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from gradmon._errors import ArgumentError
from gradmon._reading import Reading
from gradmon_integrations.sinks import _prometheus_scrapes
from gradmon_integrations.sinks.prometheus import PrometheusSink
from tests.integrations.scraping import fetch, stop_at_once

LONG = 30.0
"""Far longer than any of these tests takes, unless it waits to no purpose."""
MARGIN = 10.0
FINISHED = 'gradmon_run_finished{rank="0",run="a"} 1.0'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    stop_at_once(monkeypatch)


def seconds_to_close(sink):
    began = time.monotonic()
    sink.close()
    return time.monotonic() - began


def started(linger):
    sink = PrometheusSink(linger=linger)
    sink.bind("a", 0)
    sink.write([Reading("loss", 1.0, 1)])
    return sink


def test_where_nobody_scrapes_nobody_waits():
    sink = started(LONG)
    sink.finish(True)
    assert seconds_to_close(sink) < MARGIN


def test_where_the_run_was_not_said_to_have_ended_nobody_waits():
    sink = started(LONG)
    fetch(sink.url)
    assert seconds_to_close(sink) < MARGIN


@pytest.mark.parametrize("succeeded", [True, False])
def test_waits_for_one_more_scrape(succeeded):
    sink = started(LONG)
    fetch(sink.url)
    sink.write([Reading("loss", 0.25, 2)])
    sink.finish(succeeded)
    closing = threading.Thread(target=sink.close)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()
    last = fetch(sink.url)
    closing.join(MARGIN)
    assert not closing.is_alive()
    assert (FINISHED in last) == succeeded
    assert 'gradmon_loss{rank="0",run="a"} 0.25' in last
    with pytest.raises(urllib.error.URLError):
        fetch(sink.url)


def test_a_scrape_between_the_end_and_closing_is_enough():
    sink = started(LONG)
    sink.finish(True)
    assert FINISHED in fetch(sink.url)
    assert seconds_to_close(sink) < MARGIN


@pytest.mark.parametrize(("linger", "least"), [(0.4, 0.4), (0, 0)])
def test_waits_no_longer_than_it_is_told_to(linger, least):
    sink = started(linger)
    fetch(sink.url)
    sink.finish(True)
    assert least <= seconds_to_close(sink) < MARGIN


def test_a_scraper_that_went_away_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(_prometheus_scrapes, "_FORGOTTEN", 0.05)
    sink = started(LONG)
    fetch(sink.url)
    sink.finish(True)
    time.sleep(0.1)
    assert seconds_to_close(sink) < MARGIN


@pytest.mark.parametrize(("method", "path"), [("GET", "/favicon.ico"), ("OPTIONS", "/metrics"), ("POST", "/metrics")])
def test_what_is_no_scrape_does_not_count(method, path):
    sink = started(LONG)
    request = urllib.request.Request(sink.url.replace("/metrics", path), method=method)
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as refused:
        refused.close()
    sink.finish(True)
    assert seconds_to_close(sink) < MARGIN


def test_a_scrape_that_nobody_took_in_does_not_count():
    class Broken:
        """A client that went away: what is sent to it is never asked for again."""

        def write(self, status, headers):
            self.status = status

    scrapes = _prometheus_scrapes.Scrapes(lambda environ, start: [b"one", b"two"])
    scrapes.expect()
    request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}
    parts = iter(scrapes(request, Broken().write))
    assert next(parts) == b"one"
    assert not scrapes.wait(0)
    assert list(parts) == [b"two"]
    assert scrapes.wait(0)


def test_a_scrape_from_before_the_end_does_not_count():
    scrapes = _prometheus_scrapes.Scrapes(lambda environ, start: [b"one"])
    request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}
    early = scrapes(request, lambda *_: None)
    scrapes.expect()
    assert list(early) == [b"one"]
    assert scrapes.expected()
    assert list(scrapes(request, lambda *_: None)) == [b"one"]
    assert not scrapes.expected()


def test_answers_tell_their_length():
    sink = started(0)
    with urllib.request.urlopen(sink.url, timeout=10) as response:
        assert int(response.headers["Content-Length"]) == len(response.read())
    sink.close()


def test_of_siblings_only_the_last_waits():
    first = started(LONG)
    second = first.sibling("b")
    second.bind("b", 0)
    fetch(first.url)
    first.finish(True)
    assert seconds_to_close(first) < MARGIN
    second.finish(True)
    closing = threading.Thread(target=second.close)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()
    assert FINISHED in fetch(first.url)
    closing.join(MARGIN)
    assert not closing.is_alive()


def test_an_interrupted_wait_still_stops_the_server(monkeypatch):
    sink = started(LONG)
    fetch(sink.url)
    sink.finish(True)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(sink._exporter.scrapes, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sink.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", sink.port), timeout=10)


@pytest.mark.parametrize("given", [-1.0, float("nan"), float("inf")])
def test_not_a_time_to_linger(given):
    with pytest.raises(ArgumentError, match=r"`linger` must be a number of seconds that is not negative\. Got "):
        PrometheusSink(linger=given)
