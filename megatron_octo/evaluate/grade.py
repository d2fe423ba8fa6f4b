r"""The one grader: rewards of reinforcement learning and scores of evaluation are both `grade`.

The answer is the last `\boxed{...}`. Spelling and exact numbers decide most pairs here; what is left goes to
math-verify in a child process with a budget. Model text is never executed, and no verdict depends on the load.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from megatron_octo.evaluate import symbolic
from megatron_octo.evaluate.extract import canonical, last_boxed
from megatron_octo.evaluate.numeric import read_number, same_number

VerdictName = Literal["correct", "wrong", "no_answer", "not_stopped", "timed_out"]
VERDICTS: tuple[VerdictName, ...] = ("correct", "wrong", "no_answer", "not_stopped", "timed_out")

_LONGEST_SPELLED = 4_000  # characters of an answer that is looked at closely
_LONGEST_SYMBOLIC = 1_000  # characters of an answer that is worth a symbolic comparison
_ASSIGNS = re.compile(r"(?<![<>!:=])=(?![=<>])")
_ARITHMETIC = re.compile(r"[0-9+\-*/().,:= ]*")
_MEMBER = re.compile(r"^[a-zA-Z] ?\\in ?")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the grader found.

    Args:
        correct: whether the answer earns the point; True exactly for the verdict "correct".
        verdict: "not_stopped": cut off by the length limit, whatever it says; "no_answer": no closed or an empty box;
            "timed_out": the comparison ran out of its CPU or memory budget.
        extracted: content of the last box, None when there is none.
    """

    correct: bool
    verdict: VerdictName
    extracted: str | None

    @property
    def reward(self) -> float:
        """1.0 or 0.0."""
        return float(self.correct)


def grade(response_text: str, gold: str, *, stopped: bool, require_stop: bool = True) -> Verdict:
    """Grade one response. Never raises, and may be called from any thread.

    Args:
        response_text: the response without its prompt.
        gold: the right answer, bare, in dollar signs or boxed.
        stopped: whether the response ended by itself (end-of-text token) and not at the length limit.
        require_stop: whether a response that did not stop earns nothing.

    Returns:
        The verdict.
    """
    try:
        return _grade(str(response_text), str(gold), stopped or not require_stop)
    except Exception:
        _log.exception("the grader failed on this response; counted as wrong")
        return Verdict(False, "wrong", None)


def grade_many(cases: Sequence[tuple[str, str, bool]], *, require_stop: bool = True) -> list[Verdict]:
    """Grade (response, gold, stopped) cases, the costly comparisons side by side.

    Returns:
        One verdict a case, in order; an empty list for no cases.
    """
    with ThreadPoolExecutor(max_workers=4) as threads:
        return list(threads.map(lambda case: _grade_case(case, require_stop), cases))


def _grade_case(case: tuple[str, str, bool], require_stop: bool) -> Verdict:
    response, gold, stopped = case
    return grade(response, gold, stopped=stopped, require_stop=require_stop)


def count_verdicts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Number of verdicts of each kind, absent kinds as 0."""
    counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
    for verdict in verdicts:
        counts[verdict.verdict] += 1
    return counts


def _grade(response: str, gold: str, counts: bool) -> Verdict:
    extracted = last_boxed(response)
    if not counts:
        return Verdict(False, "not_stopped", extracted)
    if not extracted:
        return Verdict(False, "no_answer", extracted)
    boxed_gold = last_boxed(gold)
    equal = same_answer(gold if boxed_gold is None else boxed_gold, extracted)
    if equal is None:
        return Verdict(False, "timed_out", extracted)
    return Verdict(equal, "correct" if equal else "wrong", extracted)


def same_answer(gold: str, answer: str) -> bool | None:
    """Compare two bare answers: spelling, then numbers, then shape, then symbols.

    Returns:
        Whether they are equal; None when the symbolic comparison ran out of its budget.
    """
    if not gold.strip() or max(len(gold), len(answer)) > _LONGEST_SPELLED:
        return bool(gold.strip()) and gold.strip() == answer.strip()
    # Stripped first: the blank after a last backslash is a space of LaTeX only where it is kept on both sides.
    gold, answer = canonical(gold.strip()), canonical(answer.strip())
    decided = decide_cheaply(gold, answer)
    if decided is not None:
        return decided
    if max(len(gold), len(answer)) > _LONGEST_SYMBOLIC:
        return False
    return symbolic.shared.get().equal(gold, answer)


def decide_cheaply(gold: str, answer: str) -> bool | None:
    """Compare two canonical answers without symbols.

    Returns:
        The decision, or None when only a symbolic comparison can tell.
    """
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    if not gold or not answer:
        return False
    gold, answer = _without_assignment(gold, answer)
    gold_number, answer_number = read_number(gold), read_number(answer)
    if gold_number is not None:
        if answer_number is not None:
            return same_number(gold_number, answer_number)
        if _says_no_number(answer):
            return False
    return _decide_by_shape(gold, answer)


def _without_assignment(gold: str, answer: str) -> tuple[str, str]:
    """`x=5` and `7-2=5` answer 5; a bound such as `x<=5` does not."""
    if "=" not in gold and _ASSIGNS.search(answer) and not re.search(r"[<>]|\\(?:le|ge|ne)", answer):
        answer = _ASSIGNS.split(answer)[-1].strip()
    return gold, answer


def _says_no_number(answer: str) -> bool:
    """Words without a digit, and arithmetic left undone: a copied `7+5-3` is not the answer 9."""
    if _ARITHMETIC.fullmatch(answer):
        return True
    return "\\" not in answer and not any(character.isdecimal() for character in answer)


def _decide_by_shape(gold: str, answer: str) -> bool | None:
    """Text by its letters, intervals and tuples by their brackets and, where all are numbers, their parts."""
    gold_text, answer_text = (_TEXT.sub(r"\1", side).strip().casefold() for side in (gold, answer))
    if gold_text == answer_text and (_TEXT.search(gold) or re.fullmatch(r"[A-Za-z]{2,}( [A-Za-z]+)*", gold)):
        return True
    gold_parts, answer_parts = _intervals(gold), _intervals(answer)
    if not gold_parts or not answer_parts:
        return None
    if [part[0] for part in gold_parts] != [part[0] for part in answer_parts]:
        return False if len(gold_parts) == len(answer_parts) else None
    pairs = [pair for g, a in zip(gold_parts, answer_parts, strict=True) for pair in _zip(g[1], a[1])]
    decisions = [_decide_part(g, a) for g, a in pairs]
    if all(decisions):
        return True
    return False if len(gold_parts) == 1 and False in decisions else None


def _zip(gold: list[str], answer: list[str]) -> list[tuple[str, str]]:
    """Pairs of parts; a missing part is an empty text, which equals nothing."""
    missing = [""] * abs(len(gold) - len(answer))
    return list(zip(gold + missing, answer + missing, strict=False))


def _decide_part(gold: str, answer: str) -> bool | None:
    if not gold or not answer:
        return False
    return decide_cheaply(gold, answer)


def _intervals(text: str) -> list[tuple[str, list[str]]]:
    """Cut a union of intervals, or one tuple, into (brackets, parts); [] when it is anything else."""
    found = []
    for piece in re.split(r"\\cup(?![a-zA-Z])", _MEMBER.sub("", text)):
        piece = piece.strip()
        if len(piece) < 2 or piece[0] not in "([" or piece[-1] not in ")]":
            return []
        parts = _split_at_commas(piece[1:-1])
        if parts is None or len(parts) < 2:
            return []
        found.append((piece[0] + piece[-1], parts))
    return found


def _split_at_commas(text: str) -> list[str] | None:
    """Split at commas outside all brackets; None when the brackets do not match up, as in `1,2),(3,4`."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if depth == 0 else None
