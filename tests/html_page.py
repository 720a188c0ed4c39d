"""A page of HTML taken apart, and texts that would break one."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input", "img"}
EVIL = ["<script>alert(1)</script>", '" onmouseover="x', "&lt;", "\u202eab", "\u0301", "\u200b\x00"]


class Page(HTMLParser):
    """Tags must nest; texts are gathered by the tags that they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(("/".join(self.open), data))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, end: str) -> str:
        return "".join(data for path, data in self.texts if path.endswith(end))
