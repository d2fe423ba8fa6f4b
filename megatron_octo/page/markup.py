"""Small pieces of HTML: escaped text, figures of a report with their place in its JSON, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from megatron_octo.page.palette import variable
from megatron_octo.units import format_bytes, format_duration, format_tokens

_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")

FORMATS = {
    "percent": lambda value: f"{value:.1%}",
    "points": lambda value: f"{100 * value:+.1f} points",
    "tokens": lambda value: format_tokens(round(value)),
    "duration": format_duration,
    "bytes": format_bytes,
    "count": lambda value: f"{value:,}",
    "loss": lambda value: f"{value:.3f}",
    "length": lambda value: f"{value:.1f}",
    "tiny": lambda value: f"{value:.1e}" if value else "0",
    "text": str,
}
"""How a value of a report's JSON is written on its page, by kind."""


def look(values: Any, *paths: str) -> Any:
    """The first value found under slash-separated paths of nested mappings, else None."""
    for path in paths:
        found = values
        for part in path.split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


class Facts:
    """Writes values of a report's JSON; each carries its path (`data-fact`) and kind (`data-as`) and can be checked."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __call__(self, path: str, kind: str, absent: str = "not yet") -> str:
        """One value as HTML.

        Args:
            path: slash-separated keys into the JSON.
            kind: one of `FORMATS`.
            absent: what to write when the value is null or missing.
        """
        value = look(self.values, path)
        if value is None:
            return f'<span class="none">{escape(absent)}</span>'
        text = escape(FORMATS[kind](value))
        return f'<span class="nb" data-fact="{escape(path)}" data-as="{kind}">{text}</span>'

    def has(self, path: str) -> bool:
        """Whether the JSON has a value there."""
        return look(self.values, path) is not None

    def interval(self, path: str) -> str:
        """The interval of a measure, '(39.2% to 52.9%)', or nothing when it has none."""
        if not (self.has(f"{path}/low") and self.has(f"{path}/high")):
            return ""
        return f" <small>({self(f'{path}/low', 'percent')} to {self(f'{path}/high', 'percent')})</small>"


def shown(text: str) -> str:
    """A text from outside as HTML: it stays text whatever is in it.

    Control characters, halves of surrogate pairs and marks that turn the direction of writing become U+FFFD: a page
    cannot hold the first two, and the third would reach beyond the text.
    """
    return escape(_UNFIT.sub("\ufffd", text))


def coloured(colour: str) -> str:
    """A style attribute that sets an element's own colour `--k`."""
    return f'style="--k:{variable(colour)}"'


def key(colour: str, name: str) -> str:
    """A name with its colour before it."""
    return f'<span class="nb"><i class="key" {coloured(colour)}></i>{escape(name)}</span>'


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that scrolls sideways on a small screen; headings are text, cells are HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def badge(state: Any, good: str, bad: str, unknown: str) -> str:
    """A word in a box: good for True, bad for False, anything else is not known."""
    kind, text = ("ok", good) if state is True else ("bad", bad) if state is False else ("open", unknown)
    return f'<span class="{kind}">{escape(text)}</span>'


def absent(text: str) -> str:
    """A sentence in place of a part that is not there."""
    return f'<p class="none">{escape(text)}</p>'


def listed(items: list[str]) -> str:
    """'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
