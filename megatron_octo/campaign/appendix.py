"""The later sections of the report's page: sample answers, certificates, data, wall time, machine."""

from __future__ import annotations

from html import escape
from typing import Any

from megatron_octo.campaign.palette import STABLE
from megatron_octo.campaign.record import Branch
from megatron_octo.campaign.samples import Answer, Pair, sample_pairs
from megatron_octo.page.markup import Facts, absent, badge, coloured, key, look, table


def branch_samples_section(branch: Branch, colour: str) -> str:
    """A branch's sample answers, before and after RL side by side."""
    sides = [when for when in ("before", "after") if getattr(branch, when) is not None]
    shown = "".join(_sample(pair, colour, sides) for pair in sample_pairs(branch)) or absent("No answers saved yet.")
    return f"<h3>{key(colour, branch.name)}</h3>{shown}"


def _sample(pair: Pair, colour: str, sides: list[str]) -> str:
    answers = "".join(_answer(f"{when} RL", getattr(pair, when)) for when in sides)
    return (
        f'<div class="answers" {coloured(colour)}><div class="question"><small>question</small>'
        f"<pre>{escape(pair.question)}</pre><small>right answer: {escape(pair.gold)}</small></div>{answers}</div>"
    )


def _answer(when: str, answer: Answer | None) -> str:
    if answer is None:
        return f"<div><small>{when}</small> {absent('not among the saved answers')}</div>"
    verdict = badge(answer.right, answer.verdict, answer.verdict, answer.verdict)
    return f"<div><small>{when}</small> {verdict}<pre>{escape(answer.response.strip())}</pre></div>"


def certificates_section(show: Facts, colours: dict[str, str]) -> str:
    """The conversion certificates as a table."""
    rows = []
    for name, colour in colours.items():
        path = f"branches/{name}/certificate"
        tensors = f"{show(f'{path}/covered', 'count', '?')} of {show(f'{path}/tensors', 'count', '?')}"
        bitwise = badge(look(show.values, f"{path}/bitwise"), "bitwise", "differs", "not stated")
        logits = [show(f"{path}/{field}", kind, "not stated") for field, kind in _CERTIFICATE_COLUMNS.values()]
        made = show.has(path)
        cells = [tensors, bitwise, *logits] if made else [""] * (2 + len(logits))
        passed = (
            f"{show(f'{path}/checks_passed', 'count', '?')} of {show(f'{path}/checks', 'count', '?')}" if made else ""
        )
        rows.append([key(colour, name), certificate_badge(show, name), passed, *cells])
    return table(
        ["branch", "certificate", "checks passed", "tensors covered", "round trip", *_CERTIFICATE_COLUMNS], rows
    )


_CERTIFICATE_COLUMNS = {
    "largest logit difference": ("max_abs_difference", "tiny"),
    "KL divergence": ("kl", "tiny"),
    "same greedy token": ("greedy_match", "percent"),
}


def certificate_badge(show: Facts, name: str) -> str:
    """Whether a branch's converted model is proven."""
    return badge(
        look(show.values, f"branches/{name}/certificate/valid"), "certificate valid", "certificate INVALID", "none yet"
    )


def data_section(show: Facts) -> str:
    """Sources with their sizes and their shares in the stages' mixtures."""
    if not show.has("data"):
        return absent("No data manifest yet.")
    mixtures = show.values["mixtures"]
    rows = []
    for name in show.values["data"]["sources"]:
        counts = [show(f"data/sources/{name}/{kind}", "count", "not stated") for kind in ("documents", "tokens")]
        shares = [show(f"mixtures/{stage}/{name}", "percent", "–") for stage in mixtures]
        entropy = show(f"data/sources/{name}/unigram_entropy", "loss", "not stated")
        rows.append([escape(name), *counts, entropy, *shares])
    total = [show(f"data/{kind}", "count", "not stated") for kind in ("documents", "tokens")]
    rows.append(["<b>all</b>", *total, "", *[""] * len(mixtures)])
    columns = ["source", "documents", "tokens", "unigram entropy, nats", *(f"share in {stage}" for stage in mixtures)]
    caption = "Unigram entropy: the loss of a reader who knows only how often each token occurs. "
    caption += "Shares are of packed sequences, as each stage draws them." if mixtures else ""
    return f'{table(columns, rows)}<p class="small">{caption}</p>'


def times_section(show: Facts, colours: dict[str, str]) -> str:
    """Wall time of the stages as bars."""
    stages = show.values["stages"]
    longest = max((stage["wall_seconds"] for stage in stages.values()), default=0)
    if not longest:
        return absent("No stage has been timed yet.")
    bars = "".join(_bar(show, name, stage, colours.get(name, STABLE), longest) for name, stage in stages.items())
    total = f"Together {show('wall_seconds', 'duration')}. Stages that ran side by side count in full."
    return f'<div class="bars">{bars}</div><p class="small">{total}</p>'


def _bar(show: Facts, name: str, stage: dict[str, Any], colour: str, longest: float) -> str:
    width = 78 * stage["wall_seconds"] / longest
    remark = "" if stage["status"] in ("done", "unknown") else f' <span class="bad">{escape(stage["status"])}</span>'
    return (
        f'<span>{escape(name)}</span><span class="bar" {coloured(colour)}><i style="width:{width:.1f}%"></i>'
        f"{show(f'stages/{name}/wall_seconds', 'duration')}{remark}</span>"
    )


def machine_section(show: Facts) -> str:
    """Hardware, versions, and hashes of the files the report was made from."""
    gpus = show.values["hardware"]["gpus"]
    items = [
        ("processor", show("hardware/cpu", "text", "not recorded")),
        ("cores", show("hardware/cores", "count", "not recorded")),
        ("memory", show("hardware/memory_bytes", "bytes", "not recorded")),
        ("GPUs", escape(", ".join(gpus)) or "none"),
    ]
    items += [(name, show(f"versions/{name}", "text")) for name in show.values["versions"]]
    listing = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in items)
    rows = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in show.values["hashes"].items()]
    hashes = f"<details><summary>sha256 of {len(rows)} files</summary>{table(['file', 'sha256'], rows)}</details>"
    return f'<dl class="facts">{listing}</dl>{hashes if rows else ""}'


def notes_section(values: dict[str, Any]) -> str:
    """What a reader should know about the directory's state, if anything."""
    items = "".join(f"<li>{escape(note)}</li>" for note in values["notes"])
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>" if items else ""
