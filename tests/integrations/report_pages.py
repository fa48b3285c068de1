"""A page as the tests look at it: read with the standard library's parser, which shares no code with what made it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from html.parser import HTMLParser

INLINE = {"a", "b", "code", "span", "strong"}
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


@dataclass
class Element:
    """An element with what it holds."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text below it, with single spaces; also between elements that are not parts of a sentence."""
        return " ".join(self._raw().split())

    def _raw(self) -> str:
        parts = [child if isinstance(child, str) else child._raw() for child in self.children]
        inside = "".join(parts)
        return inside if self.tag in INLINE else f" {inside} "

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())

    def all(self, tag: str | None = None, kind: str | None = None) -> list[Element]:
        """Every element below it of a tag, and of a class."""
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (kind is None or kind in child.classes):
                    found.append(child)
                found.extend(child.all(tag, kind))
        return found

    def within(self, tag: str) -> bool:
        """Whether it lies in an element of a tag."""
        return self.parent is not None and (self.parent.tag == tag or self.parent.within(tag))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = self.root
        self.doctype = ""

    def handle_decl(self, decl: str) -> None:
        self.doctype = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open)
        self.open.children.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.tag == tag, f"</{tag}> closes <{self.open.tag}>"
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        self.open.children.append(data)


@dataclass
class Page:
    """A page that is well formed."""

    root: Element
    source: str

    def all(self, tag: str | None = None, kind: str | None = None) -> list[Element]:
        return self.root.all(tag, kind)

    def by_id(self, name: str) -> Element:
        """The one element with an id."""
        (found,) = [one for one in self.all() if one.attributes.get("id") == name]
        return found

    def figure(self, heading: str) -> Element:
        """The one figure with a heading."""
        (found,) = [
            one for one in self.all("figure") if heading in [h.text for tag in ("h3", "h4") for h in one.all(tag)]
        ]
        return found

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the one table whose caption begins so, its head first."""
        (found,) = [
            one for one in self.all("table") if any(held.text.startswith(caption) for held in one.all("caption"))
        ]
        return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in found.all("tr")]


def read_page(source: str) -> Page:
    """Read a page; an element that is not closed, or closed in the wrong order, fails the test."""
    reader = _Reader()
    reader.feed(source)
    reader.close()
    assert reader.doctype.lower() == "doctype html"
    assert reader.open is reader.root, f"<{reader.open.tag}> is not closed"
    return Page(reader.root, source)


def check_accessible(page: Page) -> None:
    """What a screen reader, a keyboard and a phone need."""
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer", "h1", "title"):
        assert [one for one in page.all(landmark) if not one.within("svg")], f"no <{landmark}>"
    assert [m for m in page.all("meta") if m.attributes.get("name") == "viewport"]
    levels = [int(one.tag[1]) for one in page.all() if one.tag in ("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    ids = [one.attributes["id"] for one in page.all() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    assert all(name and not set(name) & set(" \t\n\"'<>&") for name in ids)
    for one in page.all():
        for reference in one.attributes.get("aria-labelledby", "").split():
            assert page.by_id(reference).text, f"#{reference} names nothing"
        if one.attributes.get("href", "").startswith("#"):
            assert one.attributes["href"][1:] in ids
    for svg in page.all("svg"):
        if svg.attributes.get("aria-hidden") == "true":
            continue
        assert svg.attributes["role"] == "img"
        first, second = [child for child in svg.children if isinstance(child, Element)][:2]
        assert (first.tag, second.tag) == ("title", "desc")
        assert first.text
        assert second.text
        assert svg.attributes["aria-labelledby"].split() == [first.attributes["id"], second.attributes["id"]]
    for table in page.all("table"):
        assert table.all("caption")
        assert table.all("caption")[0].text
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in table.all("th"))
        head, *rows = [len([c for c in row.children if isinstance(c, Element)]) for row in table.all("tr")]
        assert all(count == head for count in rows)
    for figure in page.all("figure"):
        assert figure.all("svg")
        assert figure.all("details")[0].all("table"), "a drawing without its numbers"


def check_self_contained(page: Page) -> None:
    """Nothing is loaded from anywhere, and nothing is run."""
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    assert "@import" not in page.source
    assert "url(" not in page.source
    for one in page.all():
        assert not any(name.startswith("on") for name in one.attributes), one.attributes
        assert "src" not in one.attributes
        assert one.attributes.get("href", "#").startswith("#")
