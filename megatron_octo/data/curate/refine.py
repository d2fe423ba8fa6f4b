"""What is kept, written anew by a language model, with guards against answers that are something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron_octo.config.curate import Refine
from megatron_octo.data.curate.answers import Answer, Log
from megatron_octo.data.curate.ask import Forecast, Pile, Pulse, ask_all
from megatron_octo.data.curate.classify import CORPUS, kept_documents
from megatron_octo.data.curate.judge import all_answered, answered, tell_unanswered, why_not
from megatron_octo.data.curate.parts import Curation, Part, all_left, count, left, read_shard, total, write_documents
from megatron_octo.data.curate.prompts import Asked, asked_of
from megatron_octo.data.curate.sample import reading
from megatron_octo.data.engine.stage import Executor, Stage, advance, calls_of, run_calls, run_stages

FORMAT = 1
REFINE, MEASURE = "refine", "measure"

_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]?m| am) (?:sorry|not able|unable)|sorry\b(?:,|[.!]? (?:but|i)\b)|i apologi[sz]e"
    r"|i can(?:no|['’]| no)t |(?:i (?:won['’]t|will not|must decline to|decline to)|unable to) (?:be able|help|assist"
    r"|compl|fulfil|provide|rewrite|refine|process|produce|write|generate|continue|do (?:this|that)|engage)"
    r"|as an? (?:ai|(?:large )?language model)\b|unfortunately, i )",
    re.I,
)
_OPENING = re.compile(
    r"(?:sure|certainly|of course|okay|ok)?[,!.\s]*(?:here(?:['’]s| is| are)|below is)\b[^\n]{0,120}:[ \t*]*\n+", re.I
)


class Unfit(ValueError):
    """An answer that is no refined document; the message says why."""


def refined_text(answer: Answer, sent: str, refine: Refine) -> tuple[str, bool]:
    """The refined document out of an answer.

    Args:
        answer: with a text.
        sent: the document as it was sent.
        refine: limits of the ratio of lengths, in characters.

    Returns:
        Its text, and whether an opening sentence of the model ("Here is the refined text:") was taken off.

    Raises:
        Unfit: it was cut off, is a refusal, or is too short or too long for a refined version of that document.
    """
    assert answer.text is not None
    if answer.finish == "length":
        raise Unfit("cut off at max_tokens")
    text = answer.text.strip()
    if _REFUSAL.match(text):
        raise Unfit("refusal")
    opening = _OPENING.match(text)
    text = text[opening.end() :].strip() if opening else text
    ratio = len(text) / len(sent)
    if ratio < refine.shortest:
        raise Unfit("too short")
    if ratio > refine.longest:
        raise Unfit("too long")
    if "\0" in text:
        raise Unfit("NUL character")
    return text, opening is not None


def refine_corpora(
    curation: Curation, parts: list[Part], classified: dict[str, Any] | None, team: Executor
) -> dict[str, Any]:
    """Ask for a refined version of every kept document, and write the fit ones as a corpus.

    Args:
        curation: the curation.
        parts: all shards.
        classified: what `classify_corpora` returned; None where there is no classifier.
        team: who collects what was answered before.

    Returns:
        Counts: `documents` asked about, `kept`, `rejected` by reason, `openings` taken off, `shortened` before they
        were sent, characters and tokens in and out.
    """
    refine, config = curation.config.refine, curation.config
    assert refine is not None
    endpoint = config.endpoint_of(refine)
    asked = asked_of(refine, endpoint.model, "refine")
    sizes = classified["parts"] if classified else _measured(curation, parts, team)
    own = {"format": FORMAT, "asked": asked.as_json(), "read": reading(curation)}
    own |= {"limits": [refine.shortest, refine.longest], "threshold": config.classify and config.classify.threshold}
    own |= {"model": classified and classified["model"]}
    stage = Stage(REFINE, parts, partial(collect, curation, asked), own)
    calls = calls_of(stage, curation.work)
    waiting = [place for place, call in enumerate(calls) if not all_answered(call.done(curation.work))]
    piles = [
        Pile(
            curation.answers(REFINE, parts[place].shard), partial(_texts, curation, parts[place]), calls[place].perform
        )
        for place in waiting
        if sizes[place]["documents"]
    ]
    if piles:
        documents, characters = (sum(sizes[place][name] for place in waiting) for name in ("documents", "characters"))
        ask_all(
            REFINE, piles, asked, endpoint, Forecast.of(asked, documents, characters, characters / max(1, documents))
        )
    done = run_calls(stage, calls, curation.work, team)
    tell_unanswered(REFINE, done)
    names = (
        "documents", "kept", "rejected", "openings", "shortened", "characters_in", "characters_out", "tokens_in",
        "tokens_out",
    )  # fmt: skip
    return {**{name: total(done, name) for name in names}, "asked": asked.as_json(), **all_left(done)}


def _measured(curation: Curation, parts: list[Part], team: Executor) -> list[dict[str, Any]]:
    """How many documents there are, for the forecast, where no classifier has gone through them."""
    stage = Stage(MEASURE, parts, partial(_measure, curation), {"read": reading(curation)}, unit="documents")
    return run_stages([stage], curation.work, team)[MEASURE]


def _measure(curation: Curation, part: Part) -> dict[str, Any]:
    documents = characters = 0
    for document in read_shard(curation, part):
        documents, characters = documents + 1, characters + len(document.text)
        advance(1)
    return {"documents": documents, "characters": characters}


def _texts(curation: Curation, part: Part, pulse: Pulse) -> Iterator[tuple[str, str]]:
    for document, _ in kept_documents(curation, part, pulse):
        yield document.id, document.text


def collect(curation: Curation, asked: Asked, part: Part) -> dict[str, Any]:
    """Write the refined documents of one shard out of its answers."""
    refine = curation.config.refine
    assert refine is not None
    facts: dict[str, Any] = {
        "documents": 0, "rejected": {}, "openings": 0, "shortened": 0, "characters_in": 0, "characters_out": 0,
        "tokens_in": 0, "tokens_out": 0,
    }  # fmt: skip

    def records() -> Iterator[dict[str, Any]]:
        kept = kept_documents(curation, part)
        documents = ({"id": found.id, "text": found.text, "score": score} for found, score in kept)
        for record, answer in answered(Log(curation.answers(REFINE, part.shard)), asked, documents, facts):
            sent = record["text"][: asked.limit]
            facts["characters_in"] += len(sent)
            if answer.text is None:
                count(facts["rejected"], why_not(answer))
                continue
            try:
                text, opened = refined_text(answer, sent, refine)
            except Unfit as reason:
                count(facts["rejected"], str(reason))
                continue
            facts["openings"] += opened
            facts["characters_out"] += len(text)
            yield {key: value for key, value in {**record, "text": text}.items() if value is not None}

    path = curation.shard_file(CORPUS, part.number)
    written = write_documents(path, records())
    return {**facts, "kept": written["documents"], **left(curation, path)}
