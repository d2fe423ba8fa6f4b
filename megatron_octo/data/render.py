"""How a record becomes a document, and what its right answer is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megatron_octo.config.data import Corpus
from megatron_octo.data.world import QUESTION_TEMPLATE

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_GOLD_LINE = re.compile(r"\s*^####[ \t]*(.+?)\s*\Z", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class BadRecord(ValueError):
    """A record that cannot be used; the message says why."""


def field(record: dict[str, Any], name: str) -> str:
    """Take a text out of a record.

    Raises:
        BadRecord: the field is missing, no text, blank, or holds what no text file may hold.
    """
    if name not in record:
        raise BadRecord(f"no field {name!r} (it has {', '.join(map(repr, record)) or 'none'})")
    text = record[name]
    if not isinstance(text, str):
        raise BadRecord(f"field {name!r} is {'null' if text is None else type(text).__name__} and not text")
    if not text.strip():
        raise BadRecord(f"field {name!r} is empty")
    if "\0" in text:
        raise BadRecord(f"field {name!r} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"field {name!r} holds half of a surrogate pair") from None
    return text


def document(record: dict[str, Any], corpus: Corpus) -> str:
    """The training text of a record, without end mark.

    Questions and answers stand as they do in prompts: `Question: ...`, a new line, `Answer:`, a blank, the answer.

    Raises:
        BadRecord: a field is unusable.
    """
    if corpus.text == "text":
        return field(record, corpus.text_field)
    style: Callable[[str], str] = gsm8k_answer if corpus.text == "gsm8k" else str.strip
    question, answer = field(record, corpus.question_field).strip(), field(record, corpus.answer_field)
    return f"{QUESTION_TEMPLATE.format(question=question)} {style(answer)}"


def gsm8k_answer(answer: str) -> str:
    r"""GSM8K's answer as a worked answer: no calculator marks, and `\boxed{72}` for the last line `#### 72`.

    Raises:
        BadRecord: there is no `####` line with a number.
    """
    match = _GOLD_LINE.search(answer)
    if match is None:
        raise BadRecord("its answer has no last line '#### number'")
    worked = _CALCULATOR_MARK.sub("", answer[: match.start()]).strip()
    return f"{worked}\n\\boxed{{{gold_number(answer)}}}"


def gold_number(answer: str) -> str:
    """The right answer of a problem: what follows `####`, or the whole text, without thousands separators.

    Raises:
        BadRecord: it is not a number.
    """
    match = _GOLD_LINE.search(answer)
    number = (match[1] if match else answer).strip().replace(",", "").removeprefix("$")
    if not _NUMBER.fullmatch(number):
        raise BadRecord(f"its answer {number[:40]!r} is not a number")
    return number


def same_question(question: str) -> str:
    """A form in which two spellings of a question agree: words and numbers alone, lower case."""
    return " ".join(re.findall(r"\w+", question.casefold()))
