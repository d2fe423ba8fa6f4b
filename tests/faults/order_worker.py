"""Ranks that train and note every window they read: `python -m order_worker one|two RUN.yaml OUT.json`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from resume_worker import Trainer
from tiny_run import STEP_TOKENS

from megatron_octo.data.mix.reader import TrainDataset
from megatron_octo.train.data import Batches


class Consumed:
    """What each step of each run read, in order: (rank's run name, step, window, hash of its tokens and labels)."""

    def __init__(self) -> None:
        self.run, self.step, self.lines = "", -1, []

    def watch(self) -> None:
        """Note from now on; the real reading goes on underneath."""
        get, of_step = TrainDataset.__getitem__, Batches.of_step

        def noted(dataset: TrainDataset, window: int) -> dict[str, Any]:
            item = get(dataset, window)
            if self.step >= 0:
                content = item["tokens"].numpy().tobytes() + item["labels"].numpy().tobytes()
                self.lines.append((self.run, self.step, window, hashlib.sha256(content).hexdigest()))
            return item

        def numbered(batches: Batches, step: int) -> Any:
            self.step = step
            try:
                return of_step(batches, step)
            finally:
                self.step = -1

        mock.patch.object(TrainDataset, "__getitem__", noted).start()
        mock.patch.object(Batches, "of_step", numbered).start()


def legs(trainer: Trainer, consumed: Consumed, name: str, ends: list[int], *overrides: str) -> None:
    """Train a run in legs that end with these steps."""
    consumed.run = name
    for end in ends:
        trainer.train(name, *overrides, until=end * STEP_TOKENS, note=f"{name} {end}")


def two(trainer: Trainer, consumed: Consumed) -> None:
    """Two data-parallel ranks take the first steps of a run."""
    legs(trainer, consumed, "resized", [3], "parallel.data=2")
    legs(trainer, consumed, "phased", [5], "parallel.data=2", phase(trainer.run.parent))


def one(trainer: Trainer, consumed: Consumed) -> None:
    """One process takes the rest of them; and runs cut inside an epoch, between epochs and where the decay starts."""
    folder = trainer.run.parent
    legs(trainer, consumed, "resized", [10])
    legs(trainer, consumed, "whole", [10])
    legs(trainer, consumed, "cut", [2, 3, 8, 10])
    fork = [f"start.fork={{parent: {folder / 'whole'}, at: {8 * STEP_TOKENS}}}", "schedule.decay=null"]
    fork += ["schedule.kind=linear", "schedule.shape=null", f"schedule.tokens={2 * STEP_TOKENS}"]
    legs(trainer, consumed, "on", [1, 2], *fork, "start.fork.data=continue")
    legs(trainer, consumed, "fresh", [2], *fork, "data.seed=77")
    other = f"data.mixture={mixture(folder, 0.5)}"
    legs(trainer, consumed, "other", [1, 2], *fork, "start.fork.data=continue", other)
    legs(trainer, consumed, "phased", [6, 10], phase(folder))
    legs(trainer, consumed, "phased-whole", [10], phase(folder))
    legs(trainer, consumed, "later", [5])
    legs(trainer, consumed, "later", [10], phase(folder))
    with another_source(folder):
        trainer.train("whole", note="replaced")
        trainer.train("replaced-on", *fork, "start.fork.data=continue")


def phase(folder: Path) -> str:
    """After five steps another mixture: a quarter of what was read so far, and a source that is new."""
    return f"data.phases=[{{at: {5 * STEP_TOKENS}, mixture: {mixture(folder, 0.25)}}}]"


def mixture(folder: Path, web: float) -> str:
    """Some of the source of all runs, and of another one."""
    return f"{{web: {{path: {folder / 'web'}, weight: {web}}}, more: {{path: {folder / 'more'}, weight: {1 - web}}}}}"


@contextmanager
def another_source(folder: Path) -> Iterator[None]:
    """Put other data under the path of the source for a while."""
    names = [f"web{suffix}" for suffix in (".bin", ".idx")]
    for name in names:
        shutil.move(folder / name, folder / f"kept-{name}")
        shutil.copy(folder / f"other-{name}", folder / name)
    yield
    for name in names:
        shutil.move(folder / f"kept-{name}", folder / name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker, notes = Trainer(Path(sys.argv[2])), Consumed()
    notes.watch()
    {"one": one, "two": two}[sys.argv[1]](worker, notes)
    rank = int(os.environ.get("RANK", "0"))
    found = {"ended": worker.notes, "consumed": notes.lines}
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
