"""What was left out of a build, on its page: accounts, examples side by side, and how well leaks are found."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape
from typing import Any

from megatron_octo.data.clean.removals import EXACT, LEAK, NEAR
from megatron_octo.data.corpora.read import HELDOUT
from megatron_octo.data.corpora.registry import ADAPTERS
from megatron_octo.data.report.figures import REASONS
from megatron_octo.page.markup import Facts, absent, badge, coloured, key, listed, shown, table
from megatron_octo.page.palette import GOLD, NEUTRAL, VERMILION

_WORD = re.compile(r"\w+")
_RUN = 3  # words in a row that are marked as common
_TITLES = {EXACT: "Exact duplicates", NEAR: "Near duplicates", LEAK: "Leaks of benchmark questions"}
_EXCERPTS = (
    "Underlined: words that both have in a row. Of duplicates the beginning is shown; near ones may differ later. Of a "
    "leak the longest passage that agrees is shown, with what stands around it, in the spelling that is compared."
)
_SHORT = {EXACT: "exact", NEAR: "near", LEAK: "leaks", HELDOUT: "held out"}
_KINDS = {
    "verbatim": "word for word",
    "rewrapped": "lines broken elsewhere",
    "embedded": "in the middle of prose",
    "markdown": "dressed in Markdown",
    "html": "as a web page writes it, with entities",
    "latex": "formulas spelled another way",
    "numbers": "the same words with other numbers",
    "reordered": "sentences in another order",
    "half": "half of its words in a row, in prose",
    "topic": "about the same things",
    "phrases": "phrases that all such problems share",
    "definition": "terms explained in the usual words",
    "quote": "a few words of the question",
    "template": "the same template, other numbers, names and things",
}


def accounts_section(show: Facts, colours: dict[str, str]) -> str:
    """Read = documents + beyond the budget + skipped + removed, for every source, and whether it adds up."""
    facts = show.values
    reasons = [EXACT, NEAR, LEAK, *([HELDOUT] if (facts["settings"].get("problems") or {}).get("heldout") else [])]
    rows = []
    for name, colour in colours.items():
        path, account = f"sources/{name}/accounts", facts["sources"][name]["accounts"]
        if account is None:
            rows.append([key(colour, name), absent("the manifest keeps no account"), *[""] * (4 + len(reasons))])
            continue
        cells = [show(f"{path}/{field}", "count") for field in ("read", "documents", "beyond_budget")]
        cells.append(f"{sum(account['skipped'].values()):,}")
        cells += [_removed(facts, name, reason) for reason in reasons]
        rows.append([key(colour, name), badge(account["adds_up"], "adds up", "DOES NOT ADD UP", "unknown"), *cells])
    headings = ["= documents", "+ beyond budget", "+ skipped", *(f"+ {_SHORT[reason]}" for reason in reasons)]
    return table(["source", "", "records read", *headings], rows) + _skipped(facts)


def _removed(facts: dict[str, Any], name: str, reason: str) -> str:
    """How many documents were removed; in words where nobody looked for such."""
    source, cleaning = facts["sources"][name], facts["cleaning"]
    count = source["accounts"]["removed"].get(reason, 0)
    same = cleaning["deduplicate"] or {}
    adapter = ADAPTERS.get(source["adapter"] or "")
    asked = {
        EXACT: bool(same.get("exact")),
        NEAR: same.get("near") is not None,
        LEAK: cleaning["decontaminate"] is not None,
        HELDOUT: bool((facts["settings"].get("problems") or {}).get("heldout") and adapter and adapter.question),
    }
    looked = asked[reason] and not source["generated"]
    return f"{count:,}" if count or looked else '<span class="none">not sought</span>'


def _skipped(facts: dict[str, Any]) -> str:
    rows, first = [], []
    for name, source in facts["sources"].items():
        account = source["accounts"] or {"skipped": {}, "first": []}
        rows += [[escape(name), shown(r), f"{n:,}"] for r, n in account["skipped"].items()]
        first += [f"{name}/{line}" for line in account["first"]]
    if not rows:
        return '<p class="small">No record was skipped.</p>'
    listing = "".join(f"<li><code>{shown(line)}</code></li>" for line in first)
    named = f"<details><summary>the first {len(first)} damaged records</summary><ul>{listing}</ul></details>"
    counted = table(["source", "reason", "records"], rows)
    return f'<h3>Skipped, by reason</h3><div class="words">{counted}</div>{named if first else ""}'


def removed_section(show: Facts, colours: dict[str, str]) -> str:
    """Numbers by corpus and benchmark, and examples beside what they equal."""
    cleaning = show.values["cleaning"]
    if not cleaning["corpora"]:
        return absent("The build file asks for neither deduplication nor decontamination: nothing was looked for.")
    parts = [_not_looked_for(show.values), _leaks_by_benchmark(cleaning, colours)]
    if cleaning["examples"]:
        parts.append(f'<p class="small">{_EXCERPTS}</p>')
    for reason, title in _TITLES.items():
        if reason in cleaning["examples"]:
            parts.append(f"<h3>{title}</h3>{''.join(map(_beside, cleaning['examples'][reason]))}")
    if not cleaning["examples"]:
        parts.append("<p>Nothing was removed.</p>")
    if cleaning["touched_examples"]:
        parts.append(
            f"<h3>Kept: like a question, but not enough</h3><p class='small'>{show('cleaning/touched', 'count')} "
            "documents share some n-grams with a question and stay. Examples:</p>"
            + "".join(_beside(one, _enough(one, cleaning["decontaminate"])) for one in cleaning["touched_examples"])
        )
    return "".join(parts)


def _not_looked_for(facts: dict[str, Any]) -> str:
    cleaning, missing = facts["cleaning"], []
    same = cleaning["deduplicate"] or {}
    missing += [] if same.get("exact") else ["exact duplicates"]
    missing += [] if same.get("near") else ["near duplicates"]
    missing += [] if cleaning["decontaminate"] else ["leaks"]
    notes = [f"The build file does not ask for {listed(missing)}: nobody looked for them."] if missing else []
    generated = [name for name, source in facts["sources"].items() if source["generated"]]
    notes += [f"Generated text is not compared: {escape(listed(generated))}."] if generated else []
    return "".join(f'<p class="none">{note}</p>' for note in notes)


def _leaks_by_benchmark(cleaning: dict[str, Any], colours: dict[str, str]) -> str:
    if not cleaning["decontaminate"]:
        return ""
    benchmarks = list(cleaning["decontaminate"]["against"])
    gone = {name for name, count in (cleaning["benchmarks"] or {}).items() if count is None}
    rows = []
    for name, own in cleaning["corpora"].items():
        found = [
            '<span class="none">file absent</span>' if one in gone else f"{own['leaks'].get(one, 0):,}"
            for one in benchmarks
        ]
        rows.append([key(colours.get(name, NEUTRAL), name), f"{own['documents']:,}", *found])
    return "<h3>Documents that give a question away</h3>" + table(["corpus", "compared", *benchmarks], rows)


def _enough(kept: dict[str, Any], limits: dict[str, Any]) -> str:
    """How much of a question would have been enough, by the rule that came nearest."""
    if kept["reason"] == "numbers":
        return f"; where numbers differ, {limits['changed_numbers']:.0%} make a leak (changed_numbers)"
    row = f"{limits['quoted_words']} words in a row (quoted_words) or {limits['quoted'] or 0:.0%} of its words (quoted)"
    return f"; {limits['coverage']:.0%} make a leak (coverage)" + (f", and so do {row}" if limits["quoted"] else "")


def _beside(removal: dict[str, Any], enough: str = "") -> str:
    """A removal and what it equals, common words underlined; of a document that stays, what would have been enough."""
    excerpt, equals, reason = removal["excerpt"], removal["equals"], removal["reason"]
    same = reason in (EXACT, NEAR)
    agrees = removal.get("agrees")
    gone = ("removed" if reason in REASONS else "kept") + (f", {shown(agrees)}{enough}" if agrees else "")
    other = f"<pre>{mark_common(equals, excerpt)}</pre>" if equals else absent(f"not shown: {removal['absent']}")
    left = mark_common(excerpt, equals) if equals else shown(excerpt)
    return (
        f'<div class="beside" {coloured(REASONS.get(reason, GOLD))}>'
        f"<div><small>{gone}: <code>{shown(removal['document'])}</code></small><pre>{left}</pre></div>"
        f"<div><small>{'kept instead' if same else 'question'}: <code>{shown(removal['other'])}</code></small>{other}"
        "</div></div>"
    )


def mark_common(text: str, other: str) -> str:
    """A text as HTML with the words marked that stand in a row in another text too, whatever case and marks they have.

    Args:
        text: to show.
        other: to compare with.
    """
    words, theirs = list(_WORD.finditer(text)), [match[0].casefold() for match in _WORD.finditer(other)]
    matcher = SequenceMatcher(None, [match[0].casefold() for match in words], theirs, autojunk=False)
    parts, place = [], 0
    for block in matcher.get_matching_blocks():
        if block.size >= _RUN:
            start, end = words[block.a].start(), words[block.a + block.size - 1].end()
            parts += [shown(text[place:start]), f"<mark>{shown(text[start:end])}</mark>"]
            place = end
    return "".join([*parts, shown(text[place:])])


def recall_section(show: Facts, picture: str) -> str:
    """Recall and precision on planted leaks and near-misses, by kind and benchmark, with what goes wrong."""
    cleaning = show.values["cleaning"]
    settings, recall = cleaning["decontaminate"], cleaning["recall"]
    if settings is None:
        return absent("The build file asks for no decontamination: there is nothing to measure.")
    if recall is None:
        return absent("Not measured: decontaminate.measure is 0.")
    benchmarks = [name for name, count in recall["benchmarks"].items() if count is not None]
    gone = [name for name, count in recall["benchmarks"].items() if count is None]
    rows = [_kind(recall["leaks"], kind, benchmarks, rate, 1.0) for kind, rate in recall["recall"].items()]
    rows += [
        _kind(recall["near_misses"], kind, benchmarks, rate, 0.0) for kind, rate in recall["false_positives"].items()
    ]
    precision = (
        f"Precision {show('cleaning/recall/precision', 'percent')}; "
        f"{show('cleaning/recall/any_ngram/precision', 'percent')} if one n-gram in common were enough. "
        f"Planted from up to {settings['measure']:,} questions of each benchmark. Solid: the rule of this build. "
        "Hollow: one n-gram in common."
    )
    missing = absent(f"Not compared, for their files are absent: {listed(gone)}.") if gone else ""
    counted = table(["planted", *benchmarks, "found"], rows)
    return f'<p class="small">{precision}</p>{missing}<div class="pair">{picture}</div>{counted}{_wrong(recall)}'


def _kind(
    side: dict[str, dict[str, dict[str, int]]], kind: str, benchmarks: list[str], rate: float, right: float
) -> list[str]:
    cells = []
    for name in benchmarks:
        count = side[kind].get(name)
        wrong = count and count["found"] != right * count["planted"]
        said = f"{count['found']:,} of {count['planted']:,}" if count else '<span class="none">none to plant</span>'
        cells.append(f'<span class="miss">{said}</span>' if wrong else said)
    what = "leak" if right else "near-miss"
    said = f"<b>{escape(kind)}</b> <small>{what}: {escape(_KINDS.get(kind, ''))}</small>"
    return [said, *cells, f'<span class="miss">{rate:.1%}</span>' if rate != right else f"{rate:.1%}"]


def _wrong(recall: dict[str, Any]) -> str:
    shown_ones = []
    for kind, several in recall["wrong"].items():
        verdict = "missed" if kind in recall["recall"] else "taken for a leak"
        for one in several:
            head = f"{verdict}: {escape(kind)}, of <code>{shown(one['question'])}</code>"
            body = f"<small>{head}</small><pre>{shown(one['text'])}</pre>"
            shown_ones.append(f'<div class="sample" {coloured(VERMILION)}>{body}</div>')
    if not shown_ones:
        return '<p class="small">Nothing planted went the wrong way.</p>'
    return f"<details><summary>{len(shown_ones)} that went the wrong way</summary>{''.join(shown_ones)}</details>"
