"""The frame of every page: head, style sheet, title and summary around the sections of one room."""

from __future__ import annotations

from pathlib import Path
from string import Template

from megatron_octo.page.palette import style_sheet


def framed(room: Path, title: str, banner: str, summary: str, links: str = "", **sections: str) -> str:
    """A whole page as HTML that needs no other file and no network.

    Args:
        room: directory of the page's own `sections.html`, with a place for each of `sections`, and `page.css`.
        title: escaped; of the window and the first heading.
        banner: what to say above everything else, or nothing.
        summary: a paragraph.
        links: what follows it in the header, such as links to the sections.
        sections: HTML by the name of its place.
    """
    style = f"{style_sheet()}\n{(room / 'page.css').read_text(encoding='utf-8')}".rstrip("\n")
    return _filled(
        Path(__file__).with_name("page.html"),
        title=title,
        style=style,
        banner=banner,
        summary=summary,
        links=links and f"\n{links}",
        sections=_filled(room / "sections.html", **sections).rstrip("\n"),
    )


def _filled(file: Path, **values: str) -> str:
    return Template(file.read_text(encoding="utf-8")).substitute(values)
