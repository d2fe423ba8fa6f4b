"""Colours of the report: one a branch everywhere, safe for colour-blind eyes, each with a dark-mode twin."""

from __future__ import annotations

INK, MUTED, GRID, SURFACE, STABLE = "#1b1f24", "#5d6670", "#e3e6ea", "#fefefe", "#68727d"

_NAMED = {"long": "#0072b2", "short": "#d55e00", "hybrid": "#009e73"}
# The rest of Okabe and Ito's palette, for branches with other names.
_SPARE = ("#cc79a7", "#b8860b", "#56b4e9", "#7a5195")

_DARK = {
    INK: "#e8ebee",
    MUTED: "#a3acb6",
    GRID: "#2e353d",
    SURFACE: "#16191d",
    STABLE: "#a9b3be",
    "#0072b2": "#4fabe6",
    "#d55e00": "#f58b4c",
    "#009e73": "#33c79d",
    "#cc79a7": "#e5a3c6",
    "#b8860b": "#f0bf4c",
    "#56b4e9": "#9bd4f7",
    "#7a5195": "#b894d1",
}


def branch_colours(names: list[str]) -> dict[str, str]:
    """Give every branch its colour: fixed for long, short and hybrid, the next spare one for others."""
    others = [name for name in names if name not in _NAMED]
    spare = {name: _SPARE[index % len(_SPARE)] for index, name in enumerate(others)}
    return {name: _NAMED.get(name) or spare[name] for name in names}


def variable(colour: str) -> str:
    """The style-sheet variable that holds a colour, for inline SVG and HTML alike."""
    return f"var(--c{colour.removeprefix('#')})"


def style_sheet() -> str:
    """Definitions of all colour variables, light and dark."""
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in _DARK)
    dark = "".join(f"--c{colour[1:]}:{twin};" for colour, twin in _DARK.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n@media print{{:root{{{light}}}}}"


def themed(svg: str) -> str:
    """Replace the light colours of an SVG text by their variables, so that it follows the page's colour scheme."""
    for colour in _DARK:
        svg = svg.replace(colour, variable(colour))
    return svg
