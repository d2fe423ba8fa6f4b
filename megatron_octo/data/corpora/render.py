"""How the fields of a record become the text of a document, and what its right answer is. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from megatron_octo.data.world import QUESTION_TEMPLATE

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_GOLD_LINE = re.compile(r"\s*^####[ \t]*(.+?)\s*\Z", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped one opens and closes nothing
_ANSWER_TAG = re.compile(r"</?answer>")
_CLOSERS = " \t\r\n$.*)]\\"  # what may stand behind a boxed answer: the end of a formula, of a sentence, of bold text


class BadRecord(ValueError):
    """A record that is damaged; the message says how.

    Args:
        kind: what is wrong, in words that do not depend on the record: records are counted by it.
        detail: what goes on after these words.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind = kind
        super().__init__(f"{kind}{detail}")


class Unsuitable(ValueError):
    """A sound record that its corpus's own rule leaves out; the message is the rule."""


def as_is(text: str) -> str:
    """A text that is a document already."""
    return text


def pair(question: str, solution: str) -> str:
    """A problem and its solution, a line break between them, as the QA sources of the decay mixes are written."""
    return f"{question.strip()}\n{solution.strip()}"


def prompted(question: str, answer: str) -> str:
    """Question and answer as they stand in prompts: `Question: ...`, a new line, `Answer:`, a blank, the answer."""
    return f"{QUESTION_TEMPLATE.format(question=question.strip())} {answer.strip()}"


def restyled(text: str, question: str, rendering: str) -> str:
    """The same question and solution in another form, to part what a text says from how it is laid out.

    Args:
        text: as `pair` or `prompted` wrote it.
        question: that it begins with.
        rendering: `qa`, as they stand in prompts; `prose`, one running paragraph without marks and breaks; or
            `published`, as it is.
    """
    if rendering == "published":
        return text
    asked = question.strip()
    start = next(start for start in (QUESTION_TEMPLATE.format(question=asked), asked) if text.startswith(start))
    solution = text[len(start) :].strip()
    return prompted(asked, solution) if rendering == "qa" else " ".join(f"{asked} {solution}".split())


def gsm8k(question: str, answer: str) -> str:
    r"""GSM8K's pair in that form, its answer without calculator marks and with `\boxed{72}` for the line `#### 72`.

    Raises:
        BadRecord: there is no last line `####` with a number.
    """
    match = _GOLD_LINE.search(answer)
    if match is None:
        raise BadRecord("its answer has no last line '#### number'")
    worked = _CALCULATOR_MARK.sub("", answer[: match.start()]).strip()
    return prompted(question, f"{worked}\n{_BOX}{gold_number(answer)}}}")


def joined(texts: Sequence[str | None]) -> str:
    """The pieces of a page that are text, a line each; None stands where an image was.

    Raises:
        BadRecord: they are no list, or a piece is no text.
        Unsuitable: there is nothing but images.
    """
    if not isinstance(texts, list):
        raise BadRecord("the pieces of its text are no list")
    kept = [text for text in texts if text is not None]
    if any(not isinstance(text, str) for text in kept):
        raise BadRecord("a piece of its text is not text")
    if not any(text.strip() for text in kept):
        raise Unsuitable("no text between its images")
    return "\n".join(kept)


def conversation(turns: Sequence[dict[str, Any]]) -> str:
    r"""Turns as `User:{}\nAssistant:{}`, pair after pair with a line break between them.

    Raises:
        BadRecord: a turn is no turn.
        Unsuitable: the turns are not question, answer, question, answer ..., or one of them is empty.
    """
    try:
        roles, contents = [turn["role"] for turn in turns], [turn["content"] for turn in turns]
    except (TypeError, KeyError):
        raise BadRecord("a turn has no role or no content") from None
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unsuitable("turns are not user, assistant, user, assistant ...")
    if any(not isinstance(content, str) or not content.strip() for content in contents):
        raise Unsuitable("a turn is empty")
    names = {"user": "User", "assistant": "Assistant"}
    return "\n".join(f"{names[role]}:{content}" for role, content in zip(roles, contents, strict=True))


def first_turn(turns: Sequence[dict[str, Any]]) -> str:
    """What the first turn says."""
    return turns[0]["content"]


def conversation_of_gpt_4(turns: Sequence[dict[str, Any]], model: str) -> str:
    """A conversation, if the model that answers is a GPT-4.

    Raises:
        Unsuitable: another model answers.
    """
    if not model.startswith("gpt-4"):
        raise Unsuitable("not answered by GPT-4")
    return conversation(turns)


def valid_pair(question: str, solution: Any, question_is_valid: str, solution_is_valid: str) -> str:
    """A problem with its solution, if somebody has found both valid.

    Raises:
        Unsuitable: one of them is not known to be valid, or the solution is missing.
    """
    for what, verdict in (("problem", question_is_valid), ("solution", solution_is_valid)):
        if verdict != "Yes":
            raise Unsuitable(f"{what} not valid")
    if not isinstance(solution, str) or not solution.strip():
        raise Unsuitable("no solution")
    return pair(question, solution)


def correct_pair(question: str, solution: str, is_correct: bool) -> str:
    """A problem with a solution, if its answer is right.

    Raises:
        Unsuitable: the answer is wrong.
    """
    if is_correct is not True:
        raise Unsuitable("wrong answer")
    return pair(question, solution)


def thoughts(question: str, response: str, answer: Any) -> str:
    r"""A question and the thinking of a reasoning model, tags dropped, ending with a boxed answer.

    Where the thinking does not end with one, or with another one than what follows it, the last boxed line of what
    follows is appended, or else the known answer in a box. A box within the thinking is no answer.

    Raises:
        Unsuitable: the thinking is not complete, or there is no boxed answer and none is known.
    """
    before, closed, after = _ANSWER_TAG.sub("", response).partition("</think>")
    if not closed:
        raise Unsuitable("thinking not complete")
    thinking = before.rpartition("<think>")[2].strip()
    if not thinking:
        raise Unsuitable("no thinking")
    return pair(question, _ends_boxed(thinking, after, answer))


def first_verified(
    question: str, generations: Sequence[str], verified: Sequence[Any], judged: Sequence[Any] | None,
    complete: Sequence[Any], answer: Any,
) -> str:  # fmt: skip
    """A question and the thinking of its first generation that is both verified and complete.

    Args:
        question: the problem.
        generations: of a reasoning model.
        verified: whether a program found each generation's answer right.
        judged: whether a language model did, where the program could not; None where none was asked.
        complete: whether each generation's thinking came to its end.
        answer: the right one.

    Raises:
        BadRecord: the lists are no lists or not of one length, or that generation is no text.
        Unsuitable: no generation is verified and complete.
    """
    lists = [generations, verified, complete, *([judged] if judged is not None else [])]
    if any(not isinstance(items, list) or len(items) != len(generations) for items in lists):
        raise BadRecord("generations and their verdicts are not lists of one length")
    for number, generation in enumerate(generations):
        right = verified[number] is True or (judged is not None and judged[number] is True)
        if right and complete[number] is True:
            if not isinstance(generation, str):
                raise BadRecord("a generation is no text")
            return thoughts(question, generation, answer)
    raise Unsuitable("no generation that is verified and complete")


def verified_thoughts(question: str, response: str, answer: Any, score: Any) -> str:
    """A question and the thinking of a response whose verify_score is 1 or more, or missing.

    Args:
        question: the problem.
        response: of a reasoning model.
        answer: the right one, where it is known.
        score: a number, or a text that is one: 1 for a right answer, less for a wrong one; None where nobody looked.

    Raises:
        BadRecord: the score is no number.
        Unsuitable: the response is not known to be right, or its thinking not complete.
    """
    if score is not None and _number(score) < 1:
        raise Unsuitable("not verified")
    return thoughts(question, response, answer)


def _number(score: Any) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRecord("its verify_score is no number", f": {str(score)[:40]!r}")
    return number


def _ends_boxed(thinking: str, summary: str, answer: Any) -> str:
    own, rest = _last_box(thinking)
    last = next((line.strip() for line in reversed(summary.splitlines()) if _BOX in line), "")
    if own and not rest.strip(_CLOSERS) and (not last or _last_box(last)[0] == own):
        return thinking
    if last:
        return f"{thinking}\n{last}"
    if isinstance(answer, str) and answer.strip():
        return f"{thinking}\n{_BOX}{answer.strip()}}}"
    raise Unsuitable("no boxed answer")


def _last_box(text: str) -> tuple[str, str]:
    """The last boxed answer that is closed, with its box, and what stands behind it; nothing where there is none."""
    start, depth = text.rfind(_BOX), 0
    for found in _BRACE.finditer(text, start + len(_BOX) - 1) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[start : found.end()], text[found.end() :]
    return "", ""


def gold_number(answer: str) -> str:
    """The right answer of a problem: what follows `####`, or the whole text, without thousands separators.

    Raises:
        BadRecord: it is not a number.
    """
    match = _GOLD_LINE.search(answer)
    number = (match[1] if match else answer).strip().replace(",", "").removeprefix("$")
    if not _NUMBER.fullmatch(number):
        raise BadRecord("its answer is not a number", f": {number[:40]!r}")
    return number


def same_question(question: str) -> str:
    """A form in which two spellings of a question agree: words and numbers alone, lower case."""
    return " ".join(re.findall(r"\w+", question.casefold()))
