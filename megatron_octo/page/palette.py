"""Colours of pages: safe for colour-blind eyes (Okabe and Ito's palette), each with a dark-mode twin."""

from __future__ import annotations

from pathlib import Path

INK, MUTED, GRID, SURFACE, NEUTRAL = "#1b1f24", "#5d6670", "#e3e6ea", "#fefefe", "#68727d"
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PINK, GOLD, SKY, PURPLE = "#cc79a7", "#b8860b", "#56b4e9", "#7a5195"

SPARE = (BLUE, VERMILION, GREEN, PINK, GOLD, SKY, PURPLE)
"""In the order in which names get them."""

_DARK = {
    INK: "#e8ebee",
    MUTED: "#a3acb6",
    GRID: "#2e353d",
    SURFACE: "#16191d",
    NEUTRAL: "#a9b3be",
    BLUE: "#4fabe6",
    VERMILION: "#f58b4c",
    GREEN: "#33c79d",
    PINK: "#e5a3c6",
    GOLD: "#f0bf4c",
    SKY: "#9bd4f7",
    PURPLE: "#b894d1",
}


def colours_of(names: list[str], fixed: dict[str, str] | None = None) -> dict[str, str]:
    """Give every name a colour.

    Args:
        names: in order.
        fixed: colours that belong to names; the others get the spare ones in turn.
    """
    fixed = fixed or {}
    free = [colour for colour in SPARE if colour not in fixed.values()]
    others = [name for name in names if name not in fixed]
    spare = {name: free[index % len(free)] for index, name in enumerate(others)}
    return {name: fixed.get(name) or spare[name] for name in names}


def variable(colour: str) -> str:
    """The style-sheet variable that holds a colour, for inline SVG and HTML alike."""
    return f"var(--c{colour.removeprefix('#')})"


def style_sheet() -> str:
    """The style of every page: definitions of all colour variables, light and dark, and the rules that use them."""
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in _DARK)
    dark = "".join(f"--c{colour[1:]}:{twin};" for colour, twin in _DARK.items())
    rules = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    dark_mode = f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}\n{dark_mode}\n@media print{{:root{{{light}}}}}\n{rules}"


def themed(svg: str) -> str:
    """Replace the light colours of an SVG text by their variables, so that it follows the page's colour scheme."""
    for colour in _DARK:
        svg = svg.replace(colour, variable(colour))
    return svg
