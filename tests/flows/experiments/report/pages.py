"""The report as a reader of HTML sees it: sections, tables by caption, and the text in cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_EMPTY = {"meta", "img", "br", "link"}


@dataclass
class Element:
    """An element with its attributes and what is in it, in order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    content: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, kind: str = "") -> list[Element]:
        """Every element of a tag, and of a class, below this one."""
        found = []
        for part in self.content:
            if isinstance(part, Element):
                if part.tag == tag and kind in ["", *part.attributes.get("class", "").split()]:
                    found.append(part)
                found += part.all(tag, kind)
        return found

    @property
    def text(self) -> str:
        """All text, white space as single spaces."""
        return " ".join("".join(f" {p.text} " if isinstance(p, Element) else p for p in self.content).split())

    def section(self, name: str) -> Element:
        """The section of an id."""
        (found,) = [part for part in self.all("section") if part.attributes.get("id") == name]
        return found

    def rows(self) -> list[list[str]]:
        """The cells of a table's rows."""
        return [[c.text for c in row.content if isinstance(c, Element)] for row in self.all("tr")]

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table of a caption, headings first."""
        (found,) = [table for table in self.all("table") if any(c.text == caption for c in table.all("caption"))]
        return found.rows()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].content.append(element)
        if tag not in _EMPTY:
            self.stack.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].content.append(data)


def parse(page: str) -> Element:
    """The page as elements; one that is closed wrongly is an error."""
    reader = _Reader()
    reader.feed(page)
    assert len(reader.stack) == 1
    return reader.stack[0]
