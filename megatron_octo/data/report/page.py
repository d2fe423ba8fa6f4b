"""The page of a data directory, section by section."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.data.report import figures
from megatron_octo.data.report.appendix import licences_section, origins_section, samples_section
from megatron_octo.data.report.cleaning import accounts_section, recall_section, removed_section
from megatron_octo.page.drawing import to_svg
from megatron_octo.page.frame import framed
from megatron_octo.page.markup import Facts, absent, coloured, key, listed, shown, table
from megatron_octo.page.palette import BLUE, GREEN, NEUTRAL, VERMILION
from megatron_octo.units import format_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINKS = {
    **{name: name for name in ("sources", "lengths", "tokens", "accounts", "removed", "recall", "samples", "licences")},
    "made-from": "inputs, settings, versions",
}


def render_page(facts: dict[str, Any]) -> str:
    """Draw the page.

    Args:
        facts: as `facts.build_facts` returns them.

    Returns:
        HTML that needs no other file and no network; texts of corpora are escaped and inert.
    """
    show, colours = Facts(facts), figures.source_colours(facts)
    recall = facts["cleaning"]["recall"]
    links = "".join(f'<a href="#{place}">{words}</a>' for place, words in _LINKS.items())
    return framed(
        Path(__file__).parent,
        title=shown(f"Data: {facts['name']}"),
        banner=doubt(facts),
        summary=_summary(show),
        links=f"<nav>{links}</nav>",
        cards=_cards(show),
        sources=_sources(show, colours),
        lengths=_lengths(show, colours),
        tokens=_tokens(show),
        accounts=_both(facts, figures.left_out_figure, "left-out", "Share of records left out, by source and reason")
        + accounts_section(show, colours),
        removed=removed_section(show, colours),
        recall=recall_section(show, _picture(figures.recall_figure(recall), "recall", _RECALL) if recall else ""),
        samples=samples_section(facts, colours),
        licences=licences_section(facts, colours),
        origins=origins_section(show),
    )


_RECALL = "Share of planted leaks that are found, and of near-misses taken for leaks, by kind"


def doubt(facts: dict[str, Any]) -> str:
    """What makes the directory doubtful, above everything else; nothing where all adds up."""
    wrong = [name for name, one in facts["sources"].items() if one["accounts"] and not one["accounts"]["adds_up"]]
    if not wrong:
        return ""
    names = escape(", ".join(wrong))
    return f'<div class="banner"><b>The accounts of {names} do not add up.</b> Records are lost or counted twice.</div>'


def _summary(show: Facts) -> str:
    sources, cleaning = show.values["sources"], show.values["cleaning"]
    several = "1 source" if len(sources) == 1 else f"{len(sources)} sources"
    parts = [f"{show('tokens', 'tokens')} tokens in {show('documents', 'count')} documents from {several}."]
    if cleaning["corpora"]:
        removed = f"{show('totals/removed', 'count')} documents were removed as duplicates or leaks"
        parts.append(f"{removed} and {show('totals/skipped', 'count')} damaged or unsuitable records were skipped.")
    else:
        parts.append("Nothing was asked to be deduplicated or compared with benchmarks.")
    return " ".join(parts)


def _cards(show: Facts) -> str:
    values = show.values
    cleaning = values["cleaning"]
    left = '<span class="none">not looked for</span>'
    cards = [
        (BLUE, "tokens", show("tokens", "tokens"), f"{show('documents', 'count')} documents"),
        (
            NEUTRAL, "vocabulary", show("tokenizer/vocabulary", "count"),
            f"{show('tokenizer/used', 'count')} of its entries occur",
        ),
        (
            GREEN, "duplicates and leaks removed", show("totals/removed", "count") if cleaning["corpora"] else left,
            f"of {show('totals/read', 'count')} records read" if cleaning["corpora"] else "",
        ),
        (
            VERMILION, "decontamination, precision",
            show("cleaning/recall/precision", "percent", "not measured"),
            "on planted leaks and near-misses" if cleaning["recall"] else "",
        ),
    ]  # fmt: skip
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(colour: str, title: str, figure: str, below: str) -> str:
    inner = f'<dl><dd><span class="big">{figure}</span><br><small>{below}</small></dd></dl>'
    return f'<div class="card" {coloured(colour)}><h3>{title}</h3>{inner}</div>'


def _sources(show: Facts, colours: dict[str, str]) -> str:
    columns = {
        "tokens": ("tokens", "count"), "share": ("share_of_tokens", "percent"), "documents": ("documents", "count"),
        "share ": ("share_of_documents", "percent"), "unigram entropy, nats": ("unigram_entropy", "loss"),
        "vocabulary used": ("used", "count"), "files": ("bytes", "bytes"),
    }  # fmt: skip
    rows = [
        [key(colour, name), *(show(f"sources/{name}/{field}", kind) for field, kind in columns.values())]
        for name, colour in colours.items()
    ]
    said = (
        '<p class="small">Shares are of what was built. Unigram entropy: the loss of a reader who knows only how often '
        "each token occurs.</p>"
    )
    label = "Tokens and documents of every source"
    drawn = _both(show.values, figures.sources_figure, "sources-by-size", label)
    return drawn + table(["source", *columns], rows) + said + _mixture(show.values, colours)


def _mixture(facts: dict[str, Any], colours: dict[str, str]) -> str:
    """What a run reads of each source, and how many passes that is."""
    mixture = facts["mixture"]
    if mixture is None:
        said = "No mixture is stated, so there are no weights and no passes to show: add --mixture FILE for a run's."
        return absent(said)
    most = max((row["passes"] or 0 for row in mixture["sources"]), default=0) or 1
    rows = [_read(row, colours, 60 * (row["passes"] or 0) / most) for row in mixture["sources"]]
    unread = [name for name in facts["sources"] if name not in {row["source"] for row in mixture["sources"]}]
    notes = [f"Not in this mixture: {listed(unread)}."] if unread else []
    items = "".join(f"<li>{shown(note)}</li>" for note in [*notes, *mixture["notes"]])
    title = f"What {shown(Path(mixture['file']).name)} reads: {format_tokens(mixture['tokens'])} tokens"
    counted = table(["source", "weight", "tokens read", "of", "known from", "passes"], rows)
    return f"<h3>{title}</h3>{counted}{f'<ul class=small>{items}</ul>' if items else ''}"


def _read(row: dict[str, Any], colours: dict[str, str], width: float) -> list[str]:
    name, unknown = row["source"], '<span class="none">unknown</span>'
    colour = colours.get(name, NEUTRAL)
    here = "" if name in colours else ' <small class="none">not in this directory</small>'
    bar = f'<i class="pass" {coloured(colour)[:-1]};width:{width:.0f}px"></i>'
    passes = unknown if row["passes"] is None else f"{bar}{row['passes']:.3g}"
    size = unknown if row["size"] is None else format_tokens(row["size"])
    return [key(colour, name) + here, f"{row['share']:.1%}", format_tokens(row["tokens"]), size, row["known"], passes]


def _lengths(show: Facts, colours: dict[str, str]) -> str:
    drawn = _both(show.values, figures.lengths_figure, "by-length", "Lengths of documents by source, logarithmic bins")
    caption = (
        '<p class="small">Coloured: share of the documents. Line: share of the tokens. Two bins to a doubling.</p>'
    )
    rows = []
    for name, colour in colours.items():
        path, middle = f"sources/{name}/lengths", show.values["sources"][name]["lengths"]["middle"]
        median = f"{middle[0]:,} to {middle[1] - 1:,}" if middle else "–"
        rows.append(
            [
                key(colour, name), show(f"{path}/shortest", "count", "–"), median, show(f"{path}/mean", "length", "–"),
                show(f"{path}/longest", "count", "–"),
            ]
        )  # fmt: skip
    return (
        (drawn or absent("No documents."))
        + caption
        + table(["source", "shortest", "median in", "mean", "longest"], rows)
    )


_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


def _tokens(show: Facts) -> str:
    frequent = show.values["frequent"]
    if not frequent:
        return absent("No tokens.")
    most = frequent[0]["count"]
    bars = "".join(
        f'<code>{shown(str(one["token"]).translate(_VISIBLE))}</code><span class="bar" {coloured(BLUE)}>'
        f'<i style="width:{70 * one["count"] / most:.1f}%"></i>{one["count"]:,} <small>{one["share"]:.1%}</small>'
        "</span>"
        for one in frequent
    )
    title = "Frequency over rank, by source"
    drawn = _picture(figures.ranks_figure(show.values), "ranks", title, title)
    return f'<div class="pair"><figure><h3>All sources</h3><div class="bars">{bars}</div></figure>{drawn}</div>'


def _both(facts: dict[str, Any], draw: Any, name: str, label: str) -> str:
    """A figure for wide screens and one for narrow screens; nothing where there is nothing to draw."""
    drawn = {width: draw(facts, width == "wide") for width in ("wide", "narrow")}
    if any(figure is None for figure in drawn.values()):
        return ""
    inner = "".join(
        f'<div class="{width}">{to_svg(figure, f"{name}-{width}", label)}</div>' for width, figure in drawn.items()
    )
    return f"<figure>{inner}</figure>"


def _picture(figure: Figure | None, name: str, label: str, title: str = "") -> str:
    if figure is None:
        return ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{to_svg(figure, name, label)}</figure>"
