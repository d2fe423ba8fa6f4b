"""Real trainers that are killed or run out of something while they save: `python -m forked_worker RUN.yaml OUT.json`.

This process imports what a trainer needs, computes nothing, and forks a trainer for each case: one with the fault, and
one that goes on with the same run afterwards. Starting a fresh Python for each would cost seconds.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorboard.summary.writer.event_file_writer  # noqa: F401

import megatron_octo.train.loop  # noqa: F401
from megatron_octo import files
from megatron_octo.checkpoint import hashing, part, retain, store
from megatron_octo.train.__main__ import main

BACKGROUND = "checkpoint.asynchronous=true"


def die(*_arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, act: Callable[..., None], when: Callable[..., bool] | None = None):
    """Have something happen before the `number`-th call of a function (of those that `when` counts)."""
    plain, calls = getattr(owner, name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if when is None or when(*arguments):
            calls += 1
            if calls == number:
                act(*arguments)
        return plain(*arguments, **options)

    setattr(owner, name, call)


def in_second_shard(act: Callable[..., None]) -> None:
    """Act at the third write to the file of the second checkpoint's tensors."""

    def of_second(file: Any, _content: Any) -> bool:
        return "step_00000006" in str(file.name) and "distcp" in str(file.name)

    at_call(hashing._Hashed, "write", 3, act, of_second)


def slowly_in_second_shard() -> None:
    """Let training go on for some steps, then kill from the thread that writes."""
    in_second_shard(lambda *_: (time.sleep(0.4), die()))


KILLS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "before any byte": (lambda: at_call(store, "begin", 2, die), []),
    "mid-shard": (lambda: in_second_shard(die), []),
    "before the metadata": (lambda: at_call(part.Part, "complete", 2, die), []),
    "before the rename": (lambda: at_call(store, "retire", 2, die), []),
    "before the pointer": (lambda: at_call(store, "point_at", 2, die), []),
    "in the pointer": (lambda: at_call(Path, "replace", 2, die, lambda _, target: Path(target).name == "latest"), []),
    "while pruning": (
        lambda: at_call(store, "_remove", 1, die, lambda path: path.name.startswith(".old-") and path.exists()),
        ["checkpoint.keep=1"],
    ),
    "in the background": (slowly_in_second_shard, [BACKGROUND]),
}


def fail(number: int) -> Callable[..., None]:
    def act(*_arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return act


def few_files() -> None:
    """At the second save, leave the process no file to open."""

    def limit(*_arguments: Any) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # what is open stays so

    at_call(store, "begin", 2, limit)


def short_writes() -> None:
    """Let the kernel take seven bytes of each write to a file of tensors."""
    files.SmallWrites.write = lambda file, content: io.FileIO.write(file, memoryview(content).cast("B")[:7])


FAILURES: dict[str, tuple[Callable[[], None], list[str]]] = {
    "disk full": (lambda: in_second_shard(fail(errno.ENOSPC)), []),
    "disk full in the background": (lambda: in_second_shard(fail(errno.ENOSPC)), [BACKGROUND]),
    "read-only directory": (lambda: at_call(store, "begin", 2, fail(errno.EROFS)), []),
    "failing device": (lambda: in_second_shard(fail(errno.EIO)), []),
    "too many open files": (few_files, []),
    "short writes": (short_writes, []),
}


def trainer(run: Path, name: str, arm: Callable[[], None], overrides: list[str]) -> dict[str, Any]:
    """Train in a child; returns how it ended and what it said."""
    log = run.parent / f"{name}.log"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            arm()
            code = main([str(run), f"out={run.parent / name}", *overrides])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out = run.parent / name
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    latest = store.latest_checkpoint(out).name if store.has_checkpoint(out) else None
    lines = (out / "metrics.jsonl").read_text().count("\n")
    return {"code": code, "said": log.read_text(), "left": left, "latest": latest, "lines": lines}


def everything(run: Path) -> dict[str, list[dict[str, Any]]]:
    notes = {"undisturbed": [trainer(run, "undisturbed", lambda: None, [])]}
    for name, (arm, overrides) in {**KILLS, **FAILURES}.items():
        notes[name] = [trainer(run, name, arm, overrides), trainer(run, name, lambda: None, overrides)]
    return notes


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    assert retain.retire is store.retire
    Path(sys.argv[2]).write_text(json.dumps(everything(Path(sys.argv[1]))))
