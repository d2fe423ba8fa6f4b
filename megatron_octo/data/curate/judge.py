"""Scores of a language model for the documents of the sample."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron_octo.data.curate.answers import Answer, Log
from megatron_octo.data.curate.ask import Forecast, Pile, Pulse, ask_all
from megatron_octo.data.curate.parts import (
    Curation,
    Part,
    all_left,
    count,
    left,
    read_documents,
    total,
    write_documents,
)
from megatron_octo.data.curate.prompts import Asked, asked_of
from megatron_octo.data.curate.sample import SAMPLE
from megatron_octo.data.engine.code import CURATES, code_of
from megatron_octo.data.engine.stage import Executor, Stage, calls_of, run_calls
from megatron_octo.errors import DataError

FORMAT = 2
JUDGE, JUDGED = "judge", "judged"

_NO_ANSWER = "no answer: "
_ANSWER = 700.0  # characters: a justification of at most a hundred words, and the score
_EXAMPLE = 160  # characters, the last ones of an answer
_AT_FIRST = 100  # answers of which one must have a score
_FEWEST = 0.1  # share of the documents that must have a score: with fewer the prompt or the server is wrong
_MARKS = r"[\s*_`#>]*"
_SCORE = re.compile(
    rf"{_MARKS}final score{_MARKS}[:=]{_MARKS}<?([0-5])>?(?:\s*(?:/|out of)\s*5)?{_MARKS}\.?{_MARKS}", re.I
)


class NoScore(ValueError):
    """An answer without a score that counts; the message says why."""


def score_of(answer: str) -> int:
    """The score in the last line of an answer.

    Raises:
        NoScore: the last line is not `Final score: <n>` with n from 0 to 5.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    found = _SCORE.fullmatch(last)
    if found is not None:
        return int(found[1])
    raise NoScore("score is not a number from 0 to 5" if "final score" in last.lower() else "no final score line")


def judge_sample(curation: Curation, parts: list[Part], sample: dict[str, Any], team: Executor) -> dict[str, Any]:
    """Ask for a score of every document of the sample.

    Args:
        curation: the curation.
        parts: all shards.
        sample: what `draw_sample` returned.
        team: who collects what was answered before.

    Returns:
        Counts: `documents`, `scores` by score, `unscored` by reason (left out, for nobody knows what the judge thinks
        of them), `rejected` by reason, `positive`, `shortened`, `tokens_in`, `tokens_out`; and under `parts` the facts
        of each shard.

    Raises:
        DataError: hardly a document has a score.
    """
    judge, config = curation.config.judge, curation.config
    assert judge is not None
    endpoint = config.endpoint_of(judge)
    asked = asked_of(judge, endpoint.model, "judge")
    # Where a shard's sample changes so does its hash; an answer is found by what was asked.
    tasks = [(part.number, part.shard, facts["sha256"]) for part, facts in zip(parts, sample["parts"], strict=True)]
    own = {"format": FORMAT, "asked": asked.as_json(), "code": code_of(CURATES)}
    stage = Stage(JUDGE, tasks, partial(collect, curation, asked), own)
    calls = calls_of(stage, curation.work)
    left_over = [place for place, call in enumerate(calls) if not all_answered(call.done(curation.work))]
    piles = [
        Pile(
            curation.answers(JUDGE, parts[place].shard),
            partial(_texts, curation, parts[place].number),
            calls[place].perform,
        )
        for place in left_over
        if sample["parts"][place]["documents"]
    ]
    if piles:
        facts = [sample["parts"][place] for place in left_over]
        forecast = Forecast.of(asked, total(facts, "documents"), total(facts, "characters"), _ANSWER)
        ask_all(JUDGE, piles, asked, endpoint, forecast, _First().hear)
    done = run_calls(stage, calls, curation.work, team)
    tell_unanswered(JUDGE, done)
    names = ("documents", "scores", "unscored", "rejected", "shortened", "tokens_in", "tokens_out")
    counts = {name: total(done, name) for name in names}
    _look_at_unscored(counts, next((facts["example"] for facts in done if "example" in facts), None))
    positive = sum(number for score, number in counts["scores"].items() if int(score) >= judge.positive_from)
    return {**counts, "positive": positive, "asked": asked.as_json(), "parts": done, **all_left(done)}


def _score(answer: Answer, facts: dict[str, Any]) -> int | None:
    """The score of an answer with a text; where it has none the reason is counted, and `facts` keeps an example."""
    assert answer.text is not None
    try:
        return score_of(answer.text)
    except NoScore as reason:
        count(facts["unscored"], "cut off at max_tokens" if answer.finish == "length" else str(reason))
        facts.setdefault("example", answer.text.strip()[-_EXAMPLE:])
        return None


class _First:
    """Ends the asking where none of the first answers can be read: more of them would be money for nothing."""

    def __init__(self) -> None:
        self._over = False
        self._facts: dict[str, Any] = {"documents": 0, "scores": {}, "unscored": {}, "rejected": {}}

    def hear(self, answer: Answer) -> None:
        """Take in a new answer.

        Raises:
            DataError: it is the last of the first ones, and none had a score.
        """
        if self._over or answer.text is None:
            return
        self._facts["documents"] += 1
        readable = _score(answer, self._facts) is not None
        self._over = readable or self._facts["documents"] == _AT_FIRST
        if self._over and not readable:
            _look_at_unscored(self._facts, self._facts["example"])


def _look_at_unscored(counts: dict[str, Any], example: str | None) -> None:
    """Refuse a judgement that hardly holds a score; say how many documents are left out for want of one."""
    scored, unscored = sum(counts["scores"].values()), sum(counts["unscored"].values())
    seen = f"such as {example!r}; an answer must end with the line 'Final score: <n>', n from 0 to 5"
    if scored < _FEWEST * counts["documents"]:
        reasons = {**counts["unscored"], **counts["rejected"]}
        raise DataError(
            f"judge: {scored} of {counts['documents']} documents have a score "
            f"({', '.join(f'{why} {number}' for why, number in reasons.items())})",
            seen if example is not None else "answers/judge holds what the server said",
            "let judge.prompt ask for that line, and judge.max_tokens leave room; another question is asked anew"
            if example is not None else "mend the endpoint, or set what it refuses",
        )  # fmt: skip
    if unscored:
        print(f"octo: note: judge: {unscored} answers cannot be read and are left out, {seen}", file=sys.stderr)


def _texts(curation: Curation, number: int, pulse: Pulse) -> Iterator[tuple[str, str]]:
    for record in read_documents(curation.file(SAMPLE, number, ".jsonl.zst")):
        pulse()
        yield record["id"], record["text"]


def collect(curation: Curation, asked: Asked, task: tuple[int, Any, str]) -> dict[str, Any]:
    """Write the judged documents of one shard out of its answers."""
    number, shard, _ = task
    facts: dict[str, Any] = {
        "documents": 0, "scores": {}, "unscored": {}, "rejected": {}, "shortened": 0, "tokens_in": 0, "tokens_out": 0,
    }  # fmt: skip

    def records() -> Iterator[dict[str, Any]]:
        documents = read_documents(curation.file(SAMPLE, number, ".jsonl.zst"))
        for record, answer in answered(Log(curation.answers(JUDGE, shard)), asked, documents, facts):
            if answer.text is None:
                count(facts["rejected"], why_not(answer))
                continue
            score = _score(answer, facts)
            if score is None:
                continue
            count(facts["scores"], str(score))
            yield {**record, "score": score}

    path = curation.shard_file(JUDGED, number)
    written = write_documents(path, records())
    return {**facts, "sha256": written["sha256"], **left(curation, path)}


def answered(log: Log, asked: Asked, documents: Any, facts: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Documents with their answers; counts `documents`, `shortened`, `tokens_in` and `tokens_out` on the way."""
    index = log.index()
    with log.open() as file:
        for record in documents:
            facts["documents"] += 1
            facts["shortened"] += len(record["text"]) > asked.limit
            answer = log.read(file, index[asked.key(asked.message(record["text"]))])
            facts["tokens_in"] += answer.tokens[0]
            facts["tokens_out"] += answer.tokens[1]
            yield record, answer


def why_not(answer: Answer) -> str:
    """The reason for which a document has no answer, in words that do not depend on the document."""
    if answer.failure is not None:
        return f"{_NO_ANSWER}{answer.failure}"
    assert answer.error is not None
    return answer.error.partition(":")[0]


def all_answered(facts: dict[str, Any] | None) -> bool:
    """Whether a shard is finished, and no question about it only failed: those are asked again at the next start."""
    return facts is not None and not _unanswered(facts)


def tell_unanswered(step: str, done: list[dict[str, Any]]) -> None:
    """Say how many documents are left out for want of an answer, and how they are asked about again."""
    if number := sum(map(_unanswered, done)):
        print(
            f"octo: note: {step}: {number} documents got no answer and are left out; the same command asks about them "
            "again (once the curation is finished: delete its manifest.json first; answers are kept)",
            file=sys.stderr,
        )


def _unanswered(facts: dict[str, Any]) -> int:
    return sum(number for why, number in facts["rejected"].items() if why.startswith(_NO_ANSWER))
