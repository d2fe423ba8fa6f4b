"""Work cut into stages of independent tasks, each of which leaves a record when it is done.

A stage starts when the one before it is finished. A task reads its inputs and what earlier stages left, writes its
files under a temporary name, renames them and returns its facts; the engine writes these into the task's record, last.
What a killed process leaves is therefore a record or none, and the next run repeats only the tasks without one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_octo.files import hash_json, hash_weights, hold, read_json, write_json
from megatron_octo.progress import Progress

RECORDS, AT_WORK = "records", "at_work"
FILES = "files"

_QUIET = 30.0  # seconds of all stages before their progress goes into a log
Advance = Callable[[float], None]
_ADVANCE: ContextVar[Advance] = ContextVar("advance", default=lambda amount: None)


@dataclass(frozen=True)
class Stage:
    """Tasks that do not wait for each other.

    Args:
        name: unique in a build; also the directory of its records.
        tasks: what each task is about: dataclasses, paths and JSON's types, for they travel to other processes and
            their values decide whether a record still holds (but for fields of a dataclass with `compare=False`).
        work: a module-level function that does one task and returns its facts, JSON. A task may be done twice, also at
            the same time. Facts may name the files it left, `{"files": {path relative to the work directory: what is
            known of it}}`, see `left`: a record whose files are gone or are others counts for nothing.
        made_from: JSON of everything the results follow from besides the task: settings, hashes, a format number.
        amounts: how much each task is, in any measure; for the progress bar.
        unit: what `advance` counts inside the tasks, such as "tokens"; None where finished tasks are all that counts.
        sweep: a module-level function that clears away, once a task's record is written, what only that task needed.
        skip: numbers of tasks whose results are not wanted: they are not done, and their facts are {}.
    """

    name: str
    tasks: Sequence[Any]
    work: Callable[[Any], dict[str, Any]]
    made_from: Any
    amounts: Sequence[float] | None = None
    unit: str | None = None
    sweep: Callable[[Any], None] | None = None
    skip: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Call:
    """One task on its way to whatever process does it."""

    stage: str
    number: int
    work: Callable[[Any], dict[str, Any]]
    task: Any
    key: str
    record: Path
    sweep: Callable[[Any], None] | None = None

    def perform(self) -> dict[str, Any]:
        """Do the task and write its record; returns its facts."""
        with hold(self.record.parents[2] / AT_WORK, shared=True):  # wherever it is done, see `wait_for_tasks`
            facts = self.work(self.task)
            write_json(self.record, {"made_from": self.key, "facts": facts})
            if self.sweep is not None:
                self.sweep(self.task)
        return facts

    def done(self, work: Path, read: bool = True) -> dict[str, Any] | None:
        """The facts of an earlier run, where they still hold, see `facts_of`."""
        return facts_of(work, self.stage, self.number, self.key, read)


class Executor(Protocol):
    """What runs the tasks of a stage: this process, others of this machine, or a cluster."""

    def run(self, calls: Sequence[Call], advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """Do tasks in any order.

        Args:
            calls: what is to be done; the executor ensures that each is done once and has written its record.
            advance: called in this process with what tasks report, where the executor hears of it.

        Yields:
            Place in `calls`, and the facts, as tasks end.

        Raises:
            OctoError: as a task raised it; no other task is running any more.
            StageFailed: the process of a task was killed.
        """
        ...


def run_stages(stages: Sequence[Stage], work: Path, executor: Executor) -> dict[str, list[dict[str, Any]]]:
    """Run stages one after the other; tasks whose record holds are not done again.

    Args:
        stages: in order.
        work: directory for records; the tasks know it by themselves.
        executor: who does the tasks. Results do not depend on it.

    Returns:
        For each stage the facts of its tasks, in the order of the tasks.

    Raises:
        OctoError: as a task raised it.
        StageFailed: the process of a task was killed.
    """
    began, facts = time.monotonic(), {}
    for stage in stages:
        quiet = max(0.0, _QUIET - (time.monotonic() - began))
        facts[stage.name] = run_calls(stage, calls_of(stage, work), work, executor, quiet)
    return facts


def calls_of(stage: Stage, work: Path) -> list[Call]:
    """The tasks of a stage, ready to be handed out."""
    name, sweep = stage.name, stage.sweep
    made_from = hash_json(plain(stage.made_from))  # once: it may be as long as there are tasks
    return [
        Call(name, number, stage.work, task, _key(made_from, task), record_path(work, name, number), sweep)
        for number, task in enumerate(stage.tasks)
    ]


def wait_for_tasks(work: Path, patience: float) -> None:
    """Wait until no task of an earlier start is at work, on any machine that shares the directory and its locks.

    Whoever starts a build may be killed while a node of a cluster goes on.

    Raises:
        BlockingIOError: one still is; `strerror` says which.
    """
    if (work / AT_WORK).is_dir():
        hold(work / AT_WORK, patience).close()


def left(work: Path, paths: Iterable[Path], hashed: bool = False) -> dict[str, Any]:
    """What facts say of the files a task left: their sizes, or sizes and BLAKE3.

    A power cut may leave a file whose size is right and whose content is not; where nothing else would notice, hashed.
    """
    found = {str(path.relative_to(work)): path for path in paths}
    if not hashed:
        return {name: path.stat().st_size for name, path in found.items()}
    return {name: [path.stat().st_size, hash_weights(path)] for name, path in found.items()}


def facts_of(work: Path, stage: str, number: int, key: str, read: bool = True) -> dict[str, Any] | None:
    """The facts of a task that is done; None where its record is of another key, or its files are not as they were.

    Args:
        work: directory of the records.
        stage: of the task.
        number: of the task.
        key: of the task.
        read: whether files whose hashes are known are read; else their sizes are enough.
    """
    record = read_json(record_path(work, stage, number))
    if not isinstance(record, dict) or record.get("made_from") != key:
        return None
    facts = record["facts"]
    return facts if all(_is(work / name, known, read) for name, known in facts.get(FILES, {}).items()) else None


def record_path(work: Path, stage: str, number: int) -> Path:
    """Where a task leaves its record."""
    return work / RECORDS / stage / f"{number:05}.json"


def run_calls(
    stage: Stage, calls: Sequence[Call], work: Path, executor: Executor, quiet: float = _QUIET
) -> list[dict[str, Any]]:
    """Do some of the tasks of a stage; returns their facts in the order of the calls, see `run_stages`."""
    facts: list[Any] = [{} if call.number in stage.skip else call.done(work) for call in calls]
    left = [place for place, found in enumerate(facts) if found is None]
    if not left:
        return facts
    for place in left:
        calls[place].record.unlink(missing_ok=True)  # what it says is of other inputs, and later tasks may read it
    amounts = [stage.amounts[call.number] if stage.amounts else 1.0 for call in calls]
    before = sum(amounts) - sum(amounts[place] for place in left)
    with _Bar(stage, sum(amounts), before, quiet) as bar:
        for number, found in executor.run([calls[place] for place in left], bar.inside):
            facts[left[number]] = found
            bar.finished(amounts[left[number]])
    return facts


def advance(amount: float) -> None:
    """Report progress from inside a task, in the unit of its stage; costs nothing where nobody listens."""
    _ADVANCE.get()(amount)


def heard_by(listener: Advance) -> None:
    """Send what tasks of this process report to a listener."""
    _ADVANCE.set(listener)


class _Bar:
    """Progress of a stage: what tasks report themselves, out of a total that is estimated from the finished ones."""

    def __init__(self, stage: Stage, total: float, before: float, quiet: float) -> None:
        self._progress = Progress(stage.name, total, stage.unit or "tasks", before, lines=True, quiet=quiet)
        self._alone, self._total, self._before = stage.unit is None, total, before
        self._done = self._told = 0.0

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def inside(self, amount: float) -> None:
        if not self._alone:
            self._told += amount
            self._progress.advance(amount)

    def finished(self, amount: float) -> None:
        self._done += amount
        if self._alone:
            self._progress.advance(amount)
        elif self._told:  # in another measure than the amounts: what is left is guessed from the share that is done
            self._progress.expect(self._before + self._told * (self._total - self._before) / self._done)


def _key(made_from: str, task: Any) -> str:
    return hash_json({"stage": made_from, "task": plain(task)})


def plain(value: Any) -> Any:
    """A value as JSON, equal for equal values in any process.

    Raises:
        TypeError: for what has no such form.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a task")


def _is(path: Path, known: Any, read: bool) -> bool:
    size, digest = known if isinstance(known, list) else (known, None)
    if not path.is_file() or path.stat().st_size != size:
        return False
    return digest is None or not read or hash_weights(path) == digest
