"""Which sample answers the report shows: the same question before and after RL, changed verdicts first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_octo.campaign.record import Branch


@dataclass(frozen=True)
class Answer:
    """One answer with its grade; `right` is None when the file does not say."""

    response: str
    verdict: str
    right: bool | None


@dataclass(frozen=True)
class Pair:
    """A question, its gold answer, and the answers of the two models (None: not among the saved ones)."""

    question: str
    gold: str
    before: Answer | None
    after: Answer | None


def sample_pairs(branch: Branch, limit: int = 4) -> list[Pair]:
    """Choose pairs of answers.

    Args:
        branch: the branch, with its evaluations.
        limit: how many at most.

    Returns:
        In turn one of each kind (became right, became wrong, stayed right, stayed wrong), in the order of the file,
        until there are enough; so a page never shows gains alone when there are losses.
    """
    pairs = all_pairs(branch)
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_rank(pair), []).append(pair)
    chosen: list[Pair] = []
    while len(chosen) < min(limit, len(pairs)):
        chosen += [group.pop(0) for _, group in sorted(groups.items()) if group]
    return chosen[:limit]


def all_pairs(branch: Branch) -> list[Pair]:
    """Every question with the greedy answers of both models, in the order of the file."""
    before, after = (
        {str(row.get("id", row["question"])): row for row in branch.answers[side]} for side in ("before", "after")
    )
    return [_pair(before.get(problem), after.get(problem)) for problem in {**before, **after}]


def _rank(pair: Pair) -> int:
    if pair.before is None or pair.after is None:
        return 4
    if pair.before.right == pair.after.right:
        return 2 if pair.after.right else 3
    return 0 if pair.after.right else 1


def _pair(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Pair:
    either = before or after or {}
    return Pair(str(either["question"]), str(either.get("gold", "not recorded")), _answer(before), _answer(after))


def _answer(sample: dict[str, Any] | None) -> Answer | None:
    if sample is None:
        return None
    verdict = sample.get("verdict")
    right = verdict == "correct" if isinstance(verdict, str) else None
    return Answer(
        str(sample.get("response", "")), verdict.replace("_", " ") if right is not None else "not graded", right
    )
