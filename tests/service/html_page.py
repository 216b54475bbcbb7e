"""A page as a browser would read it."""

import html.parser
from dataclasses import dataclass, field

# Elements that have no end tag.
_VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Element:
    """A tag with its attributes, its text and that of all below it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: tuple["Element", ...] = field(default=(), repr=False)

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]


class Page(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[Element] = []
        self.texts: list[str] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, inside=tuple(self._open))
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if element.tag == tag and all(element.attributes.get(name) == value for name, value in wanted.items())
        ]

    @property
    def tags(self) -> list[tuple[str, dict[str, str]]]:
        """Every tag with its attributes."""
        return [(element.tag, element.attributes) for element in self.elements]

    def tables(self) -> list[list[list[str]]]:
        """Of each table the cells of its rows."""
        found: list[list[list[str]]] = []
        for element in self.elements:
            if element.tag == "table":
                found.append([])
            elif element.tag == "tr":
                found[-1].append([])
            elif element.tag in ("td", "th"):
                found[-1][-1].append(element.text)
        return found

    def by_id(self, name: str) -> Element | None:
        return next((element for element in self.elements if element.attributes.get("id") == name), None)

    @property
    def shown(self) -> str:
        """All of its text, with single spaces."""
        main = next(element for element in self.elements if element.tag == "main")
        return " ".join(main.text.split())

    def fields(self) -> dict[str, str]:
        """What the submit form would send, were its first button pressed."""
        sent = {}
        for element in self.elements:
            if not any(outer.attributes.get("id") == "submission" for outer in element.inside):
                continue
            if element.tag == "input":
                sent[element["name"]] = element.attributes.get("value", "")
            elif element.tag == "textarea":
                sent[element["name"]] = element.text.removeprefix("\n")
            elif element.tag == "option":
                name = next(outer["name"] for outer in reversed(element.inside) if outer.tag == "select")
                # Without a choice it is the first.
                if "selected" in element.attributes or name not in sent:
                    sent[name] = element.attributes.get("value", element.text)
        return sent
