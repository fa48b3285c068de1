"""A drawing as SVG, with a name and a description for those who do not see it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from markupsafe import Markup

WIDTH = 480
"""The width of every drawing, in units of which a phone shows about three quarters, so that text stays legible."""


class Drawing:
    """An SVG element that is filled part by part. Colours come from the page, by class.

    Args:
        key: What its ids begin with; different for each drawing of a page.
        title: Its name.
        description: What is to be seen in it.
        height: Its height; the width is always the same.
    """

    def __init__(self, key: str, title: str, description: str, height: float) -> None:
        self._root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {WIDTH} {_plain(height)}",
                "role": "img",
                "aria-labelledby": f"{key}-title {key}-desc",
            },
        )
        ET.SubElement(self._root, "title", {"id": f"{key}-title"}).text = title
        ET.SubElement(self._root, "desc", {"id": f"{key}-desc"}).text = description

    def add(self, tag: str, kind: str, *, tip: str | None = None, text: str | None = None, **where: object) -> None:
        """Add an element.

        Args:
            tag: Its tag.
            kind: Its classes.
            tip: What is shown when the mouse rests on it.
            text: What it holds.
            where: Its attributes; numbers are rounded to a tenth, and underscores become hyphens.
        """
        attributes = {name.replace("_", "-"): _plain(value) for name, value in where.items()}
        element = ET.SubElement(self._root, tag, {"class": kind, **attributes})
        if tip is not None:
            ET.SubElement(element, "title").text = tip
        if text is not None:
            element.text = text

    def text(self, kind: str, x: float, y: float, text: str, anchor: str = "start", tip: str | None = None) -> None:
        """Add words that begin, end or have their middle at a place."""
        element = ET.SubElement(
            self._root, "text", {"class": kind, "x": _plain(x), "y": _plain(y), "text-anchor": anchor}
        )
        element.text = text
        if tip is not None:
            ET.SubElement(element, "title").text = tip

    def markup(self) -> Markup:
        """The element, escaped."""
        return Markup(ET.tostring(self._root, encoding="unicode"))


def path(places: Sequence[tuple[float, float]]) -> str:
    """The data of a path through places."""
    return "M" + "L".join(f"{_plain(x)} {_plain(y)}" for x, y in places)


def shortened(text: str, most: int) -> str:
    """A text without its middle where it is too long.

    Example:
        >>> shortened("transformer.h.11.mlp.c_fc", 13)
        'transf…p.c_fc'
    """
    if len(text) <= most:
        return text
    return f"{text[: most - 1 - (most - 1) // 2]}…{text[-((most - 1) // 2) :]}"


def _plain(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)
