"""What Prometheus would see of a sink."""

import functools
import socketserver
import ssl
import urllib.request

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def stop_at_once(monkeypatch):
    """Have servers look every few milliseconds whether they should stop, not twice a second."""
    serve = functools.partialmethod(socketserver.BaseServer.serve_forever, 0.005)
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", serve)


def fetch(url: str, accept: str = "text/plain", context: ssl.SSLContext | None = None) -> str:
    """The answer to one scrape."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10, context=context) as response:
        return response.read().decode()


def scrape(url, accept="text/plain"):
    """The families of one scrape, by name."""
    parse = openmetrics_families if accept == OPENMETRICS else text_string_to_metric_families
    return {family.name: family for family in parse(fetch(url, accept))}


def samples(url):
    """The values of one scrape, by name and sorted labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in scrape(url).values()
        for sample in family.samples
    }


def value(sink, name, run="default", rank="0", **labels):
    """One value of one scrape."""
    return samples(sink.url)[(name, *sorted({"run": run, "rank": rank, **labels}.items()))]
