"""Ranks of the exactness tests: a run stopped at every step and gone on with, in one process for many short runs.

`python -m exact_worker single|pair RUN.yaml OUT.json`; each rank writes what it saw.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed as dist

import megatron_octo.train.loop as loop
from megatron_octo.checkpoint import hashing, part
from megatron_octo.errors import OctoError
from megatron_octo.runtime import groups
from megatron_octo.train.api import load_run
from megatron_octo.train.data import Batches

STEPS = 8
ASYNC = "checkpoint.asynchronous=true"


class Killed(BaseException):
    """Stands for SIGKILL inside a process that goes on: nothing of the run acts on it."""


class Trainer:
    """Trains beside the run file, notes windows in the order they are read, and what is there at the end."""

    def __init__(self, run: Path) -> None:
        self.run, self.notes = run, {}

    def train(self, name: str, *overrides: str, kill: int | None = None, note: str | None = None) -> None:
        """Train, until `kill` steps have been taken if given."""
        run = load_run(self.run, [f"out={self.run.parent / name}", *overrides])
        windows: list[tuple[int, int]] = []  # step, window
        plain = Batches.of_step

        def of_step(batches: Batches, step: int) -> Any:
            if step == kill:
                raise Killed
            dataset = batches._dataset
            with mock.patch.object(
                batches, "_dataset", _Watched(dataset, lambda window: windows.append((step, window)))
            ):
                return plain(batches, step)

        ended: dict[str, Any] = {"error": None}
        with (
            mock.patch.object(Batches, "of_step", of_step),
            mock.patch.object(groups, "shutdown", partial(groups.shutdown, keep_world=True)),
        ):
            try:
                state = loop.train(run)
                ended |= {"weights": weights_of(state), "random": random_state()}
            except Killed:
                ended = {"error": "Killed"}
                groups.shutdown()
            except OctoError as error:
                ended = {"error": type(error).__name__, "text": str(error)}
                groups.shutdown()
        self.notes[note or name] = {**ended, "windows": windows}


class _Watched:
    """A dataset that tells which windows are read."""

    def __init__(self, dataset: Any, tell: Any) -> None:
        self._dataset, self._tell = dataset, tell

    def __getitem__(self, window: int) -> Any:
        self._tell(window)
        return self._dataset[window]


def weights_of(state: Any) -> str:
    """One hash of all weights, fp32 master weights, moments and step counts that this rank holds."""
    digest = hashlib.sha256()
    for chunk in state.models:
        for name, weight in chunk.named_parameters():
            digest.update(name.encode() + weight.detach().float().numpy().tobytes())
    for one in state.optimizer.chained_optimizers:
        inner = one.optimizer
        for group in inner.param_groups:
            # What `step` of a group says was loaded once and is not used: each weight counts its own.
            kept = sorted((key, value) for key, value in group.items() if key not in ("params", "step"))
            digest.update(repr(kept).encode())
            for weight in group["params"]:
                digest.update(weight.detach().float().numpy().tobytes())
                for key, value in sorted(inner.state[weight].items()):
                    digest.update(key.encode() + value.detach().float().numpy().tobytes())
    return digest.hexdigest()


def random_state() -> str:
    """One hash of every generator: Python's, numpy's, torch's and megatron-core's trackers."""
    from megatron.core.tensor_parallel import random as megatron_random  # after train.loop, which imports it quickly

    tracked = megatron_random.get_cuda_rng_tracker().get_states()
    trackers = {name: value.numpy().tobytes() for name, value in tracked.items()}
    found = (
        random.getstate(),
        numpy.random.get_state(),
        torch.get_rng_state().numpy().tobytes(),
        sorted(trackers.items()),
    )
    return hashlib.sha256(pickle.dumps(found)).hexdigest()


def slow_writes() -> Any:
    """Let each rank's writing take longer than several steps."""
    plain = part.Part.write

    def write(self: part.Part, directory: Path) -> Any:
        time.sleep(0.3)
        return plain(self, directory)

    return mock.patch.object(part.Part, "write", write)


def full_disk(rank: int) -> Any:
    """Let the disk be full once tensors are written, on one rank."""
    plain = hashing._Hashed.write

    def write(file: Any, content: Any) -> int:
        if os.environ.get("RANK", "0") == str(rank) and "distcp" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(file, content)

    return mock.patch.object(hashing._Hashed, "write", write)


def single(trainer: Trainer) -> None:
    """A kill before every step, synchronous and not; all in one process."""
    trainer.train("whole")
    for step in range(STEPS):
        way = [ASYNC] if step % 2 else []
        trainer.train(f"killed-{step}", *way, kill=step, note=f"killed-{step} first")
        trainer.train(f"killed-{step}", *way)
    with slow_writes():
        trainer.train("background", ASYNC, "checkpoint.keep=9")
    trainer.train("pair")
    trainer.train("bf16", "dtype=bf16")
    with slow_writes():
        trainer.train("bf16-background", "dtype=bf16", ASYNC)


def pair(trainer: Trainer) -> None:
    """Two data-parallel ranks: a run stopped and gone on with, saves in the background, a disk full on one rank."""
    two = "parallel.data=2"
    trainer.train("pair", two, kill=5, note="pair first")
    trainer.train("pair-whole", two)
    trainer.train("pair-killed", two, ASYNC, kill=5, note="pair-killed first")
    trainer.train("pair-killed", two, ASYNC)
    with slow_writes():
        trainer.train("pair-background", two, ASYNC)
    with full_disk(rank=1), slow_writes():
        trainer.train("pair-full", two, ASYNC)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker = Trainer(Path(sys.argv[2]))
    {"single": single, "pair": pair}[sys.argv[1]](worker)
    rank = os.environ.get("RANK", "0")
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps(worker.notes))
    dist.destroy_process_group()
