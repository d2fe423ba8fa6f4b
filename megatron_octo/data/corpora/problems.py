"""The problems of a data build, from files or from the world, and which questions no training text may ask."""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass, fields
from typing import Any

from megatron_octo.config.data import InputFile, Inputs, ProblemSet
from megatron_octo.data.corpora.files import input_path
from megatron_octo.data.corpora.lines import numbered_lines, parse_line, text_of
from megatron_octo.data.corpora.render import BadRecord, gold_number, same_question
from megatron_octo.data.world import World, WorldConfig
from megatron_octo.errors import ConfigError, DataError

_NAMED = 20


@dataclass(frozen=True)
class Problem:
    """One question with its right answer, as a line of `problems/*.jsonl`."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class ProblemFile:
    """What the lines of a file of problems became.

    Args:
        problems: the sound ones, in order.
        skipped: how many lines are no problem, by reason.
        first: the first of these, `line: reason`; at most 20.
        unanswered: their questions, as far as they ask one: without a right answer it is still a question.
    """

    problems: list[Problem]
    skipped: dict[str, int]
    first: list[str]
    unanswered: list[str]


def build_world(config: Inputs) -> World:
    """The world of a build.

    Raises:
        ConfigError: a setting that the world does not have, or a value out of its range.
    """
    known = [setting.name for setting in fields(WorldConfig)]
    for name in config.world.settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            fix = f"did you mean '{near[0]}'?" if near else f"settings are {', '.join(known)}"
            raise ConfigError(f"world.settings: unknown key '{name}'", fix=fix)
    return World(WorldConfig(**config.world.settings), config.seed)


def problems(config: Inputs, split: str) -> list[Problem]:
    """The problems of one side.

    Args:
        config: the build.
        split: `train` or `heldout`.

    Returns:
        As many as asked for, in the order of their file or as the world draws them; none where the build has none.

    Raises:
        DataError: a missing or broken file, equal ids, or fewer problems than asked for.
        ConfigError: the world has fewer.
    """
    wanted: ProblemSet | None = getattr(config.problems, split)
    if wanted is None:
        return []
    if wanted.file is None:
        assert wanted.count != "all"
        drawn = build_world(config).problems("heldout" if split == "heldout" else "train", wanted.count)
        return [Problem(problem.id, problem.question, problem.answer) for problem in drawn]
    read = problem_file(config, split)
    assert read is not None
    return _sample(read.problems, wanted, f"{config.seed}/problems/{split}", f"problems.{split}")


def problem_file(config: Inputs, split: str) -> ProblemFile | None:
    """Read the file of one side; None where the world draws its problems, or there are none.

    Raises:
        DataError: the file is missing, or a line is no problem and the rule is strict.
    """
    wanted: ProblemSet | None = getattr(config.problems, split)
    if wanted is None or wanted.file is None:
        return None
    file, found = wanted.file, ProblemFile([], {}, [], [])
    path, ids = input_path(file, f"problems.{split}.file"), set()
    for line, raw in numbered_lines(str(path)):
        record: dict[str, Any] = {}
        try:
            record = parse_line(raw)
            problem = _problem(record, file, f"{path.parent.name}-{line}")
            if problem.id in ids:
                raise BadRecord("its id was there before", f": {problem.id!r}")
        except BadRecord as wrong:
            if config.on_bad_line != "skip":
                rule = "every line must be a problem with question and answer"
                raise DataError(f"{path}, line {line}: {wrong}", rule, "mend it, or set on_bad_line: skip") from None
            _skip(found, line, wrong, record.get(file.question_field))
            continue
        ids.add(problem.id)
        found.problems.append(problem)
    return found


def _skip(found: ProblemFile, line: int, wrong: BadRecord, question: object) -> None:
    found.skipped[wrong.kind] = found.skipped.get(wrong.kind, 0) + 1
    if len(found.first) < _NAMED:
        found.first.append(f"{line}: {wrong}")
    if isinstance(question, str) and question.strip():
        found.unanswered.append(question)


def _problem(record: dict[str, Any], file: InputFile, name: str) -> Problem:
    question, answer = text_of(record, file.question_field).strip(), text_of(record, file.answer_field)
    return Problem(str(record.get("id", name)), question, gold_number(answer))


def _sample(found: list[Problem], wanted: ProblemSet, seed: str, where: str) -> list[Problem]:
    count = len(found) if wanted.count == "all" else wanted.count
    if count > len(found) or not found:
        raise DataError(f"{where}: {wanted.count} problems asked for, its file has {len(found)}", fix="ask for fewer")
    chosen = random.Random(seed).sample(range(len(found)), count)
    return [found[number] for number in sorted(chosen)]


def heldout_questions(config: Inputs) -> frozenset[str]:
    """Questions no training record may ask, in comparable form: of held-out problems, and of those skipped there."""
    read = problem_file(config, "heldout")
    asked = [problem.question for problem in problems(config, "heldout")] + (read.unanswered if read else [])
    return frozenset(map(same_question, asked))


def without_heldout(train: list[Problem], forbidden: frozenset[str]) -> list[Problem]:
    """Problems to train on, less those whose question is held out.

    Raises:
        DataError: none is left.
    """
    kept = [problem for problem in train if same_question(problem.question) not in forbidden]
    if train and not kept:
        raise DataError("problems.train asks only held-out questions", "both sides name the same problems")
    return kept
