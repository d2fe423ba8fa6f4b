"""Ranks of the tests of what a run tells: many short trainings in one process, since starting one costs seconds.

`python -m seeing_worker NPROC RUN.yaml OUT.json`; each rank writes how its trainings ended.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from resume_worker import Trainer, signalled_at
from tiny_run import STEP_TOKENS

import megatron_octo.train.step as step_module
from megatron_octo.errors import StageFailed
from megatron_octo.runtime.watchdog import Watchdog
from megatron_octo.train import rewind
from megatron_octo.train.hooks import validate

OVERLAPPED = "parallel={data: 2, overlap_grad_reduce: true, overlap_param_gather: true}"
LAYOUTS = {
    1: {"one": []},
    2: {
        "TP2 SP": ["parallel={tensor: 2, sequence: true}"],
        "DP2": ["parallel={data: 2}"],
        "CP2": ["parallel={context: 2}"],
        "PP2": ["parallel={pipeline: 2}"],
        "DP2 plain optimizer": ["parallel={data: 2, distributed_optimizer: false}"],
        "TP2": ["parallel={tensor: 2}"],
        "DP2 overlapped": [OVERLAPPED],
    },
    4: {
        "TP2 PP2 SP": ["parallel={tensor: 2, pipeline: 2, sequence: true}"],
        "PP2 VPP2 DP2": ["parallel={pipeline: 2, virtual_pipeline: 2, data: 2}", "batch.micro_batch=1"],
        "CP2 DP2": ["parallel={context: 2, data: 2}"],
    },
}
LENGTH = 6  # steps


def validation(folder: Path) -> list[str]:
    """Seven windows: no layout's share is whole."""
    sources = f"{{even: {folder / 'even'}, odd: {folder / 'odd'}}}"
    return [f"validation={{every: {2 * STEP_TOKENS}, sources: {sources}, windows: 7}}"]


@contextmanager
def happens(step: int, action: Callable[[list[torch.Tensor]], None]) -> Iterator[None]:
    """Do something, once, to the losses of a step counted from 1."""
    plain, left = step_module.run_batches, [1]

    def run_batches(engine: Any, state: Any, batches: Any) -> Any:
        losses = plain(engine, state, batches)
        if state.step + 1 == step and left[0]:
            left[0] = 0
            action(losses)
        return losses

    with mock.patch.object(step_module, "run_batches", run_batches):
        yield


@contextmanager
def overheard(owner: Any, name: str, said: list[str]) -> Iterator[None]:
    """Note what the watchdog would call the moment of each call of a function."""
    follow, plain, watching = Watchdog.follow, getattr(owner, name), []

    def followed(self: Watchdog, *answers: Any) -> None:
        watching.append(self)
        follow(self, *answers)

    def called(*arguments: Any, **options: Any) -> Any:
        said.append(watching[-1]._stage()[0])
        return plain(*arguments, **options)

    with mock.patch.object(Watchdog, "follow", followed), mock.patch.object(owner, name, called):
        yield


def bad_loss(losses: list[torch.Tensor]) -> None:
    losses[0][0] = math.nan


def killed(_losses: list[torch.Tensor]) -> None:
    raise StageFailed("killed")


def main() -> None:
    nproc, trainer = int(sys.argv[1]), Trainer(Path(sys.argv[2]))
    folder = trainer.run.parent
    short = [f"schedule.tokens={LENGTH * STEP_TOKENS}", "checkpoint.every=1M", "model.layers=4"]
    seen = [*short, *validation(folder), "logging.statistics_every=3", "logging.profile_every=2"]
    stages: dict[str, list[str]] = {"validation": [], "rewind": []}
    for name, layout in LAYOUTS[nproc].items():
        with overheard(validate, "run_batches", stages["validation"]):
            trainer.train(name, *seen, *layout)
    if nproc == 1:
        trainer.train("blind", *short, "logging.tensorboard=false")
        with signalled_at(3):  # the step it ends with is one of the validated
            trainer.train("stopped", *seen, note="stopped first")
        with happens(5, killed):  # after it made up for it, before a checkpoint could tell
            trainer.train("stopped", *seen, note="stopped again")
        trainer.train("stopped", *seen)
        trainer.train("bf16", *seen, "dtype=bf16")
        trainer.train("bf16 blind", *short, "dtype=bf16")
        hot = ["schedule.learning_rate=1e30", "schedule.warmup=0", "logging.statistics_every=1"]
        trainer.train("nan", *seen, *hot)
    if nproc == 2:
        trainer.train("overlapped blind", *short, OVERLAPPED)
        back = [*seen, OVERLAPPED, f"checkpoint.every={3 * STEP_TOKENS}", "logging.statistics_every=2"]
        for policy in ("rewind", "skip"):
            with happens(5, bad_loss), overheard(rewind, "load_checkpoint", stages["rewind"]):
                trainer.train(policy, *back, f"watch.nonfinite={policy}")
    if nproc == 4:
        trainer.train("blind four", *short, *LAYOUTS[4]["PP2 VPP2 DP2"])
    rank = int(os.environ.get("RANK", "0"))
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps({**trainer.notes, "stages": stages}))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
