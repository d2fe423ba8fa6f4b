"""Problems to be solved: the project's own files and the benchmark files of the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.errors import ConfigError, DataError


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        id: unique within its file.
        question: the bare question.
        answer: the right answer, text.
    """

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Columns:
    """Which keys of a file hold a problem."""

    question: str = "question"
    answer: str = "answer"
    id: str = "id"


# Schemas of the files in OctoThinker's public evaluation folder.
BENCHMARKS: dict[str, Columns] = {
    "gsm8k": Columns(),
    "math500": Columns(question="problem", id="unique_id"),
    "amc23": Columns(),
    "olympiad_bench": Columns(answer="final_answer"),
}


def read_problems(path: Path, columns: Columns = Columns()) -> list[Problem]:
    """Read a file of one JSON object a line.

    Args:
        path: the file.
        columns: names of its keys.

    Returns:
        The problems in file order, at least one.

    Raises:
        DataError: no such file, a line that is not an object, a missing or empty column, an id used twice, no problem.
    """
    problems = [_problem(row, columns, where) for where, row in read_objects(path)]
    if not problems:
        raise DataError(f"{path}: holds no problem", "an accuracy over nothing is not 0%", "check the file")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise DataError(f"{path}: id {problem.id!r} is used twice", "every problem counts once", "make ids unique")
        seen.add(problem.id)
    return problems


def read_benchmark(name: str, root: Path) -> list[Problem] | None:
    """Read `ROOT/NAME/test.jsonl`.

    Returns:
        The problems, or None when the file is absent: an absent benchmark is reported as such, never as 0.

    Raises:
        ConfigError: unknown benchmark.
        DataError: the file is there and damaged.
    """
    path = benchmark_path(name, root)
    return read_problems(path, BENCHMARKS[name]) if path.exists() else None


def benchmark_path(name: str, root: Path) -> Path:
    """Where a benchmark's file is expected.

    Raises:
        ConfigError: unknown benchmark.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark '{name}'", fix=f"benchmarks: {', '.join(BENCHMARKS)}")
    return root / name / "test.jsonl"


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a jsonl file; yields ('FILE line N', object).

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})", "each line is one object", "mend the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: holds {type(row).__name__}", "each line is one object", "mend the line")
        yield where, row


def column(row: dict[str, Any], name: str, where: str) -> Any:
    """One value of a row.

    Raises:
        DataError: the key is missing or null.
    """
    if row.get(name) is None:
        raise DataError(f"{where}: no '{name}'", f"the row has: {', '.join(row) or 'nothing'}", f"add '{name}'")
    return row[name]


def _problem(row: dict[str, Any], columns: Columns, where: str) -> Problem:
    question = str(column(row, columns.question, where))
    answer = _plain(column(row, columns.answer, where))
    if not question.strip() or not answer.strip():
        raise DataError(f"{where}: empty question or answer", "nothing can be asked or graded", "drop the row")
    return Problem(str(column(row, columns.id, where)), question, answer)


def _plain(answer: Any) -> str:
    """An answer as text: 27.0 is 27; of OlympiadBench's list the first entry, which names all answers."""
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    return str(answer)
