"""HTML pages as tests look at them."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What matters of a page: its tags, their attributes, the text of every stated fact."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stated: list[tuple[str, str, str]] = []
        self._fact: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if "data-fact" in values:
            self._fact = (str(values["data-fact"]), str(values["data-as"]))

    def handle_data(self, data: str) -> None:
        if self._fact is not None:
            self.stated.append((*self._fact, data))
            self._fact = None
