"""docs/figures/: the plots of docs/benchmarks.md. Imported only where something is drawn, since it needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"
"""Told apart also by those who do not see red and green; GREY is for guides."""

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        # White, not transparent: dark letters stay readable on a dark page.
        "figure.facecolor": "white",
        # Letters, not outlines: a smaller file, and one that can be searched.
        "svg.fonttype": "none",
        # The same drawing is the same file.
        "svg.hashsalt": "gradmon",
    }
)


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure, and its axes row by row; sizes in inches."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return figure, list(axes.flat)


def save(figure: Any, name: str, text: str) -> str:
    """Write ``docs/figures/<name>.svg``.

    Args:
        figure: The figure.
        name: The file's name, without its ending.
        text: What is to be seen, for those who do not see it.

    Returns:
        The Markdown that shows it in docs/benchmarks.md.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    return f"![{text}](figures/{name}.svg)"
