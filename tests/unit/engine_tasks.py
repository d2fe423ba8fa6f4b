"""Work of stages for the tests of the engine: worker processes import it by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.data.engine.stage import FILES, advance
from megatron_octo.errors import DataError
from megatron_octo.files import write_text


@dataclass(frozen=True)
class Task:
    """What to do with a number; `out` also gets a line for every time it is done."""

    number: int
    out: Path
    does: str = "square"


def work(task: Task) -> dict[str, Any]:
    """Square a number, or fail as told."""
    with (task.out / "log").open("a") as log:
        log.write(f"{task.number}\n")
    advance(10)
    if task.does == "refuse":
        raise DataError("that shard, line 7: broken", "a rule", "mend it")
    if task.does == "fail":
        raise Peculiar(1, 2)
    if task.does == "full":
        raise OSError(28, "No space left on device", str(task.out / "piece"))
    if task.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.does == "exit":
        os._exit(3)
    if task.does == "linger":
        write_text(task.out / "pid", str(os.getpid()))
        time.sleep(60)
    if task.does == "wait and refuse":
        while not (task.out / "pid").exists():
            time.sleep(0.1)
        raise DataError("that shard, line 8: broken")
    if task.does == "sleep":
        time.sleep(60)
    name = f"piece-{task.number}"
    write_text(task.out / name, str(task.number**2))
    return {"square": task.number**2, FILES: {name: len(str(task.number**2))}}


@contextmanager
def opened_below(folder: Path) -> Iterator[list[str]]:
    """The files of a folder that this process opens meanwhile, in order."""
    paths: list[str] | None = []

    def heard(event: str, values: tuple[Any, ...]) -> None:  # there is no way to take a hook away
        if event == "open" and paths is not None and str(values[0]).startswith(f"{folder}{os.sep}"):
            paths.append(str(values[0]))

    sys.addaudithook(heard)
    yield paths
    paths = None


class Peculiar(Exception):
    """Cannot be unpacked in another process."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("peculiar")
