"""Entry-point look-up: how a name in a string becomes a sink, a metric or a command of some installed package."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from gradmon._errors import PluginError

SINKS = "gradmon.sinks"
METRICS = "gradmon.metrics"
COMMANDS = "gradmon.commands"


def entry_points_named(group: str) -> dict[str, EntryPoint]:
    """What is installed under a group, by name and in alphabetical order; nothing is imported yet.

    Where two packages offer the same name, the one that comes first on `sys.path` wins.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, point)
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """Import the object that is installed under a name.

    Args:
        group: `SINKS`, `METRICS` or `COMMANDS`.
        name: The name of the entry point.

    Returns:
        Whatever the entry point names; the caller checks what it is.

    Raises:
        PluginError: Nothing is installed under that name, or what is installed cannot be imported.
    """
    points = entry_points_named(group)
    if name not in points:
        raise PluginError(
            f"No {name!r} in the entry-point group `{group}`. Installed: {', '.join(points) or 'nothing'}. "
            f"Install the package that brings it into this environment (pip install PACKAGE); "
            f"gradmon's own names appear once gradmon itself is installed (pip install gradmon, or pip install -e .)."
        )
    try:
        return points[name].load()
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{name!r} in the entry-point group `{group}` is installed as {points[name].value}, "
            f"but cannot be imported: {error}. Install what it needs, or reinstall the package that brings it."
        ) from error
