"""Pictures of pages, drawn with matplotlib: the style, and figures as inline SVG or PNG."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from megatron_octo.page.palette import GRID, INK, MUTED, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")

HALF = 4.7
"""Width of a figure that stands beside another, inches."""
WIDE = 11.2
"""Width of one that fills a page."""
_STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "octo",
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.linewidth": 0.7,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.frameon": False, "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}  # fmt: skip


def styled(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """Run a drawing function under the pages' style; the process's own matplotlib settings stay as they are."""

    @functools.wraps(draw)
    def with_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return with_style


@styled
def to_svg(figure: Figure, name: str, label: str) -> str:
    """Inline SVG without outside references; ids carry `name` so that several fit one page; `label` is read aloud."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace('xlink:href="#', f'href="#{name}-').replace("'DejaVu Sans'", "system-ui")
    return themed(re.sub(r"\n\s*", "\n", svg))


@styled
def to_png(figure: Figure) -> bytes:
    """PNG at 160 dots an inch on white."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; it belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
