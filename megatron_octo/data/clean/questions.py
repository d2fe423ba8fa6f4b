"""The questions of the benchmarks that a corpus must not give away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.clean import Benchmark, Decontaminate
from megatron_octo.config.data import expand_path
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.evaluate.problems import BENCHMARKS, column, read_objects


@dataclass(frozen=True)
class Question:
    """One question: `<benchmark>/<problem>` and its text."""

    id: str
    text: str


@dataclass(frozen=True)
class Asked:
    """Which columns of a file make up a question, in order, and which one names it (None: its place in the file)."""

    question: tuple[str, ...]
    id: str | None = None


# The graded benchmarks, and the rest of the recipe's suite, whose files need no grader to be compared with.
KNOWN: dict[str, Asked] = {name: Asked((columns.question,), columns.id) for name, columns in BENCHMARKS.items()} | {
    "math": Asked(("problem",), "id"),
    "sat": Asked(("question",), "id"),
    "mathqa": Asked(("problem",)),
    "mmlu_stem": Asked(("question",), "id"),
    "ocw": Asked(("problem",), "id"),
    "mawps": Asked(("input",), "idx"),
    "svamp": Asked(("Body", "Question"), "idx"),
    "asdiv": Asked(("body", "question"), "idx"),
    "tabmwp": Asked(("table", "question"), "id"),
    "gpqa": Asked(("Question",)),
}


def benchmark_file(name: str, benchmark: Benchmark) -> Path | None:
    """Where the questions of a benchmark are; None where the file is absent and may be.

    Raises:
        DataError: it is absent and may not be.
        ConfigError: its path names an environment variable that is not set, or nothing says which columns it has.
    """
    where = f"decontaminate.against.{name}"
    asked_of(name, benchmark)
    try:
        path = expand_path(benchmark.path, f"{where}.path")
    except ConfigError:
        if benchmark.absent == "ok":
            return None
        raise
    if path.is_file():
        return path
    if benchmark.absent == "ok":
        return None
    raise DataError(
        f"{where}: {path} is not there",
        "a corpus that was compared with nothing is not clean",
        f"put the file there, or set {where}.absent: ok",
    )


def located(config: Decontaminate) -> Decontaminate:
    """The same settings with the files as this machine finds them, for tasks that other machines do.

    A path is absolute and without variables, and its file must be there; one that is absent here has no path, and is
    absent everywhere.

    Raises:
        DataError, ConfigError: as `benchmark_file`.
    """
    found = {name: (benchmark_file(name, one), one) for name, one in config.against.items()}
    against = {
        name: one.model_copy(update={"path": str(path.absolute()), "absent": "error"} if path else {"path": ""})
        for name, (path, one) in found.items()
    }
    return config.model_copy(update={"against": against})


def read_questions(name: str, benchmark: Benchmark) -> list[Question] | None:
    """The questions of one benchmark.

    Args:
        name: as the configuration names it.
        benchmark: its file.

    Returns:
        In the order of the file, at least one; None where the file is absent and may be.

    Raises:
        DataError: the file is absent, damaged, lacks a column, or asks nothing.
        ConfigError: nothing says which columns the file has.
    """
    asked, path = asked_of(name, benchmark), benchmark_file(name, benchmark)
    if path is None:
        return None
    found = []
    for place, (where, row) in enumerate(_rows(path), start=1):
        parts = [column(row, asked.question[-1], where)] if len(asked.question) == 1 else _parts(row, asked, where)
        text = " ".join(str(part).strip() for part in parts)
        if not text.strip():
            raise DataError(f"{where}: empty question", "nothing can be compared with it", "drop the row")
        found.append(Question(f"{name}/{row[asked.id] if asked.id and asked.id in row else place}", text))
    if not found:
        raise DataError(f"{path}: holds no question", "a corpus compared with nothing is not clean", "check the file")
    return found


def asked_of(name: str, benchmark: Benchmark) -> Asked:
    """Which columns the file of a benchmark has.

    Raises:
        ConfigError: the benchmark is not known, and the configuration does not say.
    """
    if benchmark.question:
        return Asked(tuple(benchmark.question), benchmark.id)
    known = KNOWN.get(benchmark.like or name)
    if known is None:
        raise ConfigError(
            f"decontaminate.against.{name}: no known benchmark is named {benchmark.like or name!r}",
            f"known are {', '.join(KNOWN)}",
            f"name its columns in decontaminate.against.{name}.question, or a known one in .like",
        )
    return known if benchmark.id is None else Asked(known.question, benchmark.id)


def _parts(row: dict[str, Any], asked: Asked, where: str) -> list[Any]:
    """The columns of a question in several; all but the last may be null."""
    missing = [name for name in asked.question if name not in row]
    last = column(row, missing[0] if missing else asked.question[-1], where)
    return [*(row[name] for name in asked.question[:-1] if row[name] is not None), last]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file of one a line, or of one JSON array."""
    with path.open("rb") as file:
        array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not array:
        yield from read_objects(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})", fix="mend the file") from None
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path} entry {place}: holds {type(row).__name__}", "each entry is one object")
        yield f"{path} entry {place}", row


def all_questions(config: Decontaminate) -> tuple[list[Question], dict[str, int | None]]:
    """The questions of all benchmarks, and how many each has: None for one that is absent and may be.

    Raises:
        DataError, ConfigError: as `read_questions`.
    """
    found: list[Question] = []
    counts: dict[str, int | None] = {}
    for name, benchmark in config.against.items():
        questions = read_questions(name, benchmark)
        counts[name] = None if questions is None else len(questions)
        found += questions or []
    return found, counts
