"""The command that writes the set-up of Prometheus, Alertmanager and Grafana to a directory."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from gradmon._errors import ArgumentError
from gradmon.cli import Command

RUNBOOK_URL = "https://github.com/gradmon/gradmon/blob/main/docs/alerts.md"
"""The page that has a heading for each alert."""

STALLED_AFTER = 600
"""After how many seconds without a measurement a run counts as stalled."""

ASSETS = {
    "prometheus/prometheus.yml": "Prometheus: what to scrape, which rules, which Alertmanager",
    "prometheus/targets/gradmon.yml": "the addresses of the training processes",
    "prometheus/recording_rules.yml": "what dashboards and alerts share",
    "prometheus/alert_rules.yml": "one alert for each of gradmon's rules, and RunStalled",
    "prometheus/alert_rules_test.yml": "promtool's tests of them: when each fires, and when not",
    "prometheus/run_stalled_test.yml": "the same for RunStalled",
    "alertmanager/alertmanager.yml": "Alertmanager: one message for each run and alert, to a webhook",
    "grafana/dashboards/gradmon-fleet.json": "dashboard: all runs",
    "grafana/dashboards/gradmon-run.json": "dashboard: one run",
    "grafana/provisioning/datasources/gradmon.yml": "Grafana: where Prometheus is",
    "grafana/provisioning/dashboards/gradmon.yml": "Grafana: where the dashboards are",
}
"""What there is, by its path in the directory."""

_LEAST_WINDOW = 7200
_WINDOWS = 4  # a stalled run is remembered for this many times the silence that makes it one
_LONGEST = 86400
_SHORTEST = 60  # a recorded number may be a minute old


def rendered(runbook_url: str = RUNBOOK_URL, stalled_after: int = STALLED_AFTER) -> Iterator[tuple[str, str]]:
    """Every file, with what it is to hold.

    Args:
        runbook_url: The page with a heading for each alert.
        stalled_after: After how many seconds without a measurement a run counts as stalled.

    Yields:
        The path in the directory, and the text.
    """
    window = max(_LEAST_WINDOW, _WINDOWS * stalled_after)
    # The times of run_stalled_test.yml are one minute before, and some minutes after.
    times = {f"{STALLED_AFTER + shift}s": f"{max(0, stalled_after + shift)}s" for shift in (-60, 180, 420)}
    threshold = {f'"value": {STALLED_AFTER:.1f}\n': f'"value": {stalled_after:.1f}\n'}
    replaced = {
        "alert_rules.yml": {f":max > {STALLED_AFTER}\n": f":max > {stalled_after}\n"},
        "recording_rules.yml": {"[2h]": f"[{_duration(window)}]"},
        "gradmon-fleet.json": threshold,
        "gradmon-run.json": threshold,
        "run_stalled_test.yml": {f"eval_time: {old}": f"eval_time: {new}" for old, new in times.items()},
    }
    folder = files("gradmon_integrations.dashboards") / "files"
    for path in ASSETS:
        text = folder.joinpath(path).read_text(encoding="utf-8").replace(RUNBOOK_URL, runbook_url)
        # In one pass: what has been put in is not replaced once more.
        if known := replaced.get(path.rpartition("/")[2]):
            text = re.sub("|".join(map(re.escape, known)), lambda found, known=known: known[found[0]], text)
        yield path, text


def export(directory: Path, *, force: bool, runbook_url: str, stalled_after: int) -> None:
    """Write every file, or none of them where one is in the way.

    Args:
        directory: Where to; it and what is in it are created.
        force: Whether files that exist are replaced.
        runbook_url: The page with a heading for each alert.
        stalled_after: After how many seconds without a measurement a run counts as stalled.

    Raises:
        ArgumentError: A file exists already, or the directory cannot be written.
    """
    held = [(directory / path, text) for path, text in rendered(runbook_url, stalled_after)]
    if not force and (there := [path for path, _ in held if path.exists()]):
        raise ArgumentError("DIR", "hold none of the files yet, unless --force is given", there[0])
    try:
        for path, text in held:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        where = error.filename or directory
        raise ArgumentError("DIR", f"be a directory that can be written ({error.strerror})", where) from error


def run(arguments: argparse.Namespace) -> int:
    """List the files, or write them.

    Args:
        arguments: What `add_arguments` describes.

    Returns:
        The exit status: 0.

    Raises:
        ArgumentError: The files cannot be written there.
    """
    if arguments.action == "list":
        width = max(map(len, ASSETS))
        for path, meaning in ASSETS.items():
            print(f"{path:<{width}}  {meaning}")
        return 0
    directory = arguments.directory
    export(
        directory,
        force=arguments.force,
        runbook_url=arguments.runbook_url,
        stalled_after=arguments.run_stalled_after,
    )
    print(f"{len(ASSETS)} files are in {directory}. To check them, in {directory / 'prometheus'}:")
    print("  promtool check config prometheus.yml")
    print("  promtool test rules alert_rules_test.yml run_stalled_test.yml")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions and their arguments."""
    parser.description = "Rules, alerts and dashboards for the sink 'prometheus', ready to be used and to be changed."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="say which files there are")
    writing = actions.add_parser("export", help="write them to a directory")
    writing.add_argument("directory", type=Path, metavar="DIR", help="where to write; made if it does not exist")
    writing.add_argument("--force", action="store_true", help="replace files that are there")
    writing.add_argument(
        "--runbook-url",
        type=_page,
        default=RUNBOOK_URL,
        metavar="BASE",
        help="the page that the alerts point to; #nonfinite and so on are added (gradmon's docs/alerts.md)",
    )
    writing.add_argument(
        "--run-stalled-after",
        type=_seconds,
        default=STALLED_AFTER,
        metavar="SECONDS",
        help=f"how long a run may be silent before RunStalled fires: some times the schedule's interval "
        f"({STALLED_AFTER})",
    )


COMMAND = Command("assets", "write rules, alerts and dashboards for Prometheus and Grafana", add_arguments, run)


def _duration(seconds: int) -> str:
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds}s"


def _page(text: str) -> str:
    # It ends up in YAML and in templates of Prometheus: nothing that means something there.
    if not re.fullmatch(r"https?://[\w.~:/?@!$&()*+,;=%\[\]-]+", text):
        raise argparse.ArgumentTypeError(f"must be an address such as {RUNBOOK_URL}. Got {text!r}.")
    return text


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and _SHORTEST <= int(text) <= _LONGEST):
        raise argparse.ArgumentTypeError(f"must be a whole number in [{_SHORTEST}, {_LONGEST}]. Got {text!r}.")
    return int(text)
