"""docs/benchmarks.md: every benchmark writes its own section of it, and leaves the others as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a `|` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the markers of a section; where there are none yet, append it with its markers.

    Args:
        name: The section's name, as in ``<!-- name -->`` and ``<!-- /name -->``.
        text: Markdown, from its heading on.
        page: The file, made when it is missing.

    Raises:
        ValueError: The section has no end.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    section = f"{start}\n{text.strip()}\n\n{end}"
    whole = page.read_text() if page.exists() else "# Benchmarks\n"
    before, opened, rest = whole.partition(start)
    if not opened:
        page.write_text(f"{whole.rstrip()}\n\n{section}")
        return
    _, closed, after = rest.partition(end)
    if not closed:
        # Going on would swallow every section below.
        raise ValueError(f"{page}: {start.strip()} has no {end.strip()}")
    page.write_text(before + section + after)
