"""The texts and problems a data build is made of, wherever they come from."""

from __future__ import annotations

import difflib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from megatron_octo.config.data import Corpus, DataBuildConfig, InputFile, ProblemSet
from megatron_octo.data import render
from megatron_octo.data.jsonl import BadLines, input_path, records
from megatron_octo.data.render import BadRecord, same_question
from megatron_octo.data.world import World, WorldConfig
from megatron_octo.errors import ConfigError, DataError


@dataclass
class Texts:
    """Documents of one source, and what was left out while they were read.

    Args:
        documents: the texts, without end marks.
        bad: broken lines; None for generated text.
        heldout: records left out because they ask a held-out question.
    """

    documents: Iterator[str] = field(default_factory=lambda: iter(()))
    bad: BadLines | None = None
    heldout: int = 0


@dataclass(frozen=True)
class Problem:
    """One question with its right answer, as a line of `problems/*.jsonl`."""

    id: str
    question: str
    answer: str


def build_world(config: DataBuildConfig) -> World:
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


def texts(config: DataBuildConfig, name: str, heldout: frozenset[str]) -> Texts:
    """Open one source.

    Args:
        config: the build.
        name: of the source.
        heldout: held-out questions in the form of `render.same_question`; records that ask one are left out.

    Returns:
        Its documents: endless for the world, every usable record for a corpus.

    Raises:
        DataError: a missing file, or on reading a broken line under the strict rule.
    """
    if name in config.world.tokens:
        return Texts(build_world(config).documents(name, sys.maxsize))
    corpus = config.corpora[name]
    path = input_path(corpus, f"corpora.{name}")
    found = Texts(bad=BadLines(path, config.on_bad_line == "skip"))
    found.documents = _rendered(corpus, path, found, heldout)
    if corpus.order == "shuffled":
        found.documents = _shuffled(found.documents, f"{config.seed}/order/{name}")
    return found


def _rendered(corpus: Corpus, path: Path, found: Texts, heldout: frozenset[str]) -> Iterator[str]:
    assert found.bad is not None
    for line, record in records(path, found.bad):
        try:
            text = render.document(record, corpus)
            asked = corpus.text != "text" and same_question(record[corpus.question_field]) in heldout
        except BadRecord as problem:
            found.bad.add(line, str(problem))
            continue
        if asked:
            found.heldout += 1
        else:
            yield text


def _shuffled(documents: Iterator[str], seed: str) -> Iterator[str]:
    held = list(documents)
    random.Random(seed).shuffle(held)
    return iter(held)


def problems(config: DataBuildConfig, split: str) -> list[Problem]:
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
    found = _read_problems(wanted.file, f"problems.{split}.file", config.on_bad_line == "skip")
    return _sample(found, wanted, f"{config.seed}/problems/{split}", f"problems.{split}")


def _read_problems(file: InputFile, where: str, skip: bool) -> list[Problem]:
    path = input_path(file, where)
    bad, found = BadLines(path, skip), {}
    for line, record in records(path, bad):
        try:
            question = render.field(record, file.question_field).strip()
            answer = render.gold_number(render.field(record, file.answer_field))
        except BadRecord as problem:
            bad.add(line, str(problem))
            continue
        name = str(record.get("id", f"{path.parent.name}-{line}"))
        if name in found:
            bad.add(line, f"id {name!r} was there before")
            continue
        found[name] = Problem(name, question, answer)
    return list(found.values())


def _sample(found: list[Problem], wanted: ProblemSet, seed: str, where: str) -> list[Problem]:
    count = len(found) if wanted.count == "all" else wanted.count
    if count > len(found) or not found:
        raise DataError(f"{where}: {wanted.count} problems asked for, its file has {len(found)}", fix="ask for fewer")
    chosen = random.Random(seed).sample(range(len(found)), count)
    return [found[number] for number in sorted(chosen)]


def heldout_questions(heldout: list[Problem]) -> frozenset[str]:
    """Questions no training record may ask, in comparable form."""
    return frozenset(same_question(problem.question) for problem in heldout)


def without_heldout(train: list[Problem], heldout: list[Problem]) -> list[Problem]:
    """Problems to train on, less those that are held out.

    Raises:
        DataError: none is left.
    """
    forbidden = heldout_questions(heldout)
    kept = [problem for problem in train if same_question(problem.question) not in forbidden]
    if train and not kept:
        raise DataError("problems.train asks only held-out questions", "both sides name the same problems")
    return kept
