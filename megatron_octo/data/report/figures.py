"""The pictures of a data report, drawn from its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_octo.data.clean.removals import EXACT, LEAK, NEAR
from megatron_octo.data.corpora.read import HELDOUT
from megatron_octo.page.drawing import HALF, WIDE, new_figure, styled
from megatron_octo.page.palette import (
    GOLD,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    SKY,
    SURFACE,
    VERMILION,
    colours_of,
)
from megatron_octo.units import format_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REASONS = {EXACT: SKY, NEAR: PURPLE, LEAK: VERMILION, HELDOUT: GREEN, "skipped": GOLD}
"""Why records are left out, with the colour of each everywhere on the page."""
_LEAST = 0.01  # share that the axis of what was left out shows at least: a few documents must not look like many


def source_colours(facts: dict[str, Any]) -> dict[str, str]:
    """The colour of each source everywhere on the page."""
    return colours_of(list(facts["sources"]))


@styled
def sources_figure(facts: dict[str, Any], wide: bool) -> Figure:
    """Tokens of every source beside its documents, as bars with their shares."""
    sources, colours = facts["sources"], source_colours(facts)
    height = 0.75 + 0.36 * len(sources)
    figure = new_figure(WIDE, height) if wide else new_figure(HALF, 2 * height)
    panels = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1)
    for axes, what in zip(panels, ("tokens", "documents"), strict=True):
        most = max(source[what] for source in sources.values())
        for row, (name, source) in enumerate(sources.items()):
            axes.barh(row, source[what], 0.68, color=colours[name])
            said = f"{format_tokens(source[what])} · {source[f'share_of_{what}']:.1%}"
            axes.annotate(said, (source[what], row), (5, 0), textcoords="offset points", va="center")
        _rows(axes, list(sources))
        axes.set_xlim(0, 1.3 * most)
        axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
        _few_ticks(axes)
        axes.set_title(what.capitalize())
    return figure


@styled
def left_out_figure(facts: dict[str, Any], wide: bool) -> Figure | None:
    """What was left out of every source, as a share of the records read of it, stacked by reason."""
    accounts = {name: source["accounts"] for name, source in facts["sources"].items() if source["accounts"]}
    if not any(account["left_out"] for account in accounts.values()):
        return None
    figure = new_figure(WIDE if wide else HALF, 0.95 + 0.36 * len(accounts))
    axes, seen = figure.subplots(), set()
    for row, account in enumerate(accounts.values()):
        start = 0.0
        for reason, colour in REASONS.items():
            count = sum(account["skipped"].values()) if reason == "skipped" else account["removed"].get(reason, 0)
            if count:
                width = count / account["read"]
                label = None if reason in seen else reason.replace("_", " ")
                axes.barh(row, width, 0.62, left=start, color=colour, edgecolor=SURFACE, linewidth=1.2, label=label)
                start += width
                seen.add(reason)
        said = f"{account['left_out']:,} of {account['read']:,} ({start:.2%})" if start else "nothing"
        axes.annotate(said, (start, row), (5, 0), textcoords="offset points", va="center")
    _rows(axes, list(accounts))
    most = max(account["left_out"] / account["read"] for account in accounts.values() if account["read"])
    axes.set_xlim(0, max(_LEAST, 1.45 * most))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    _few_ticks(axes)
    axes.set_xlabel("share of the records read")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3 if not wide else 5, borderpad=0, handlelength=1)
    return figure


@styled
def lengths_figure(facts: dict[str, Any], wide: bool) -> Figure | None:
    """Lengths of documents, one panel a source over one axis: bars are documents, the line is where the tokens are."""
    sources = {name: source for name, source in facts["sources"].items() if source["lengths"]["bins"]}
    if not sources:
        return None
    colours, columns = source_colours(facts), (2 if len(sources) in (2, 4) else min(3, len(sources))) if wide else 1
    rows = -(-len(sources) // columns)
    figure = new_figure(WIDE if wide else HALF, 0.5 + 1.75 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    low = min(source["lengths"]["bins"][0]["from"] for source in sources.values())
    high = max(source["lengths"]["bins"][-1]["below"] for source in sources.values())
    for axes, (name, source) in zip(grid, sources.items(), strict=False):
        _draw_lengths(axes, source, colours[name])
        axes.set_title(name)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value < 10_000 else format_tokens(round(value))
        )
        axes.minorticks_off()
        axes.tick_params(labelbottom=True)
    for axes in grid[len(sources) :]:
        axes.axis("off")
    figure.supxlabel("tokens of a document", color=MUTED, fontsize=9)
    return figure


def _draw_lengths(axes: Axes, source: dict[str, Any], colour: str) -> None:
    bins = source["lengths"]["bins"]
    edges = [one["from"] for one in bins] + [bins[-1]["below"]]
    documents = [one["documents"] / source["documents"] for one in bins]
    tokens = [one["tokens"] / source["tokens"] for one in bins]
    axes.stairs(documents, edges, fill=True, color=colour, alpha=0.75, linewidth=0)
    axes.stairs(tokens, edges, color=INK, linewidth=1.4)
    axes.set_ylim(0, 1.12 * max(*documents, *tokens))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.locator_params(axis="y", nbins=4)
    axes.grid(visible=False, axis="x")


@styled
def ranks_figure(facts: dict[str, Any]) -> Figure | None:
    """How fast the frequency of tokens falls with their rank, one line a source."""
    colours, lines = source_colours(facts), ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
    figure = new_figure(HALF, 3.3)
    axes = figure.subplots()
    for number, (name, source) in enumerate(facts["sources"].items()):
        if source["ranks"]:
            x, y = zip(*source["ranks"], strict=True)
            axes.plot(x, y, color=colours[name], linewidth=1.8, linestyle=lines[number % len(lines)], label=name)
    if not axes.lines:
        return None
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank of the token in its source")
    axes.set_ylabel("share of all tokens")
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.legend(loc="lower left", handlelength=2.6)
    return figure


@styled
def recall_figure(recall: dict[str, Any]) -> Figure:
    """Which planted leaks and near-misses were taken for leaks: the build's rule solid, one n-gram in common hollow."""
    sides = (
        ("Leaks found: 100% is right", "recall", GREEN),
        ("Near-misses taken for leaks: 0% is right", "false_positives", VERMILION),
    )
    height = 0.34 * (len(recall["recall"]) + len(recall["false_positives"])) + 1.7
    figure = new_figure(HALF, height)
    panels = figure.subplots(2, 1, height_ratios=[max(1, len(recall[side])) for _, side, _ in sides])
    for axes, (title, side, colour) in zip(panels, sides, strict=True):
        for row, (kind, rate) in enumerate(recall[side].items()):
            other = recall["any_ngram"][side].get(kind)
            axes.plot([0, rate], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            if other is not None:
                axes.plot([other], [row], marker="o", markersize=9, markerfacecolor="none", color=MUTED, clip_on=False)
            axes.plot([rate], [row], marker="o", markersize=6, color=colour, clip_on=False, zorder=3)
            axes.annotate(f"{rate:.1%}", (1.06, row), annotation_clip=False, va="center")
        _rows(axes, list(recall[side]))
        axes.tick_params(axis="y", pad=8)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title(title)
    return figure


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, color=INK, fontsize=9.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _few_ticks(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=5)
