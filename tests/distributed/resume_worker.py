"""Ranks of the resume tests: many short trainings in one process, since starting one costs seconds.

`python -m resume_worker single|four RUN.yaml OUT.json`; rank 0 writes what happened.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from tiny_run import FOUR_WAY, LAYOUTS, RATE, STEP_TOKENS
from torch.distributed.checkpoint import filesystem

import megatron_octo.train.loop as loop
from megatron_octo.checkpoint import dist_write
from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.checkpoint.tensors import read, row_blocks
from megatron_octo.checkpoint.together import on_rank_zero
from megatron_octo.errors import OctoError
from megatron_octo.runtime import groups
from megatron_octo.train.api import load_run
from megatron_octo.train.data import Batches
from megatron_octo.train.setup import set_up
from megatron_octo.train.step import set_rates


class Trainer:
    """Trains into directories beside the reference and notes how each call ended."""

    def __init__(self, run: Path) -> None:
        self.run, self.notes = run, {}

    def load(self, name: str, *overrides: str) -> Any:
        return load_run(self.run, [f"out={self.run.parent / name}", *overrides])

    def train(self, name: str, *overrides: str, until: int | None = None, note: str | None = None) -> None:
        ended = {"error": None}
        try:
            with mock.patch.object(groups, "shutdown", partial(groups.shutdown, keep_world=True)):
                try:
                    loop.train(self.load(name, *overrides), until)
                except BaseException:
                    groups.shutdown()
                    raise
        except OctoError as error:
            ended = {"error": type(error).__name__, "text": str(error), "code": error.exit_code}
        self.notes[note or name] = ended


def signalled_at(step: int, rank: int = 0) -> Any:
    """Send this process SIGTERM while it reads the data of a step."""
    plain = Batches.of_step

    def of_step(self: Batches, number: int) -> Any:
        if number == step and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, number)

    return mock.patch.object(Batches, "of_step", of_step)


def full_disk(rank: int = 0) -> Any:
    """Let the disk be full once tensors are written."""

    def write(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    own = int(os.environ.get("RANK", "0")) == rank
    return mock.patch.object(filesystem, "_write_item", write if own else filesystem._write_item)


def loaded(trainer: Trainer, name: str, *overrides: str) -> dict[str, Any]:
    """Set a run up without training, and tell what its optimizer holds and would use in the first step."""
    run = trainer.load(name, *overrides)
    _, state = set_up(run, groups.initialize(run.parallel, run.seed, run.timeout_minutes))
    inner = state.optimizer.chained_optimizers[0].optimizer
    for group in inner.param_groups:  # stale values, as another schedule would have left them
        group["lr"], group["weight_decay"] = 123.0, 123.0
    set_rates(state)
    states = [inner.state.get(weight, {}) for group in inner.param_groups for weight in group["params"]]
    moments = [item["exp_avg"] for item in states if "exp_avg" in item]
    found = {
        "rates": [(group["lr"], group["weight_decay"], group["wd_mult"]) for group in inner.param_groups],
        "moments": math.sqrt(sum(float(moment.double().square().sum()) for moment in moments)),
        "steps": sorted({float(item["step"]) for item in states if "step" in item}),
    }
    groups.shutdown(keep_world=True)
    return found


def stored_moments(checkpoint: Path) -> float:
    source = TorchDist(checkpoint, optimizer=True)
    moments = [read(source, name) for name in source.shapes() if ".exp_avg." in name]
    return math.sqrt(sum(float(moment.double().square().sum()) for moment in moments))


def write_model(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint's weights as a conversion does, in blocks of a few rows; rank 0 only."""
    if dist.get_rank() == 0:
        small = partial(row_blocks, block_bytes=2048)
        with mock.patch.object(dist_write, "row_blocks", small), mock.patch.object(dist_write, "FILE_BYTES", 2**16):
            dist_write.write_model(target, TorchDist(checkpoint), {"config": {}}, {})
    dist.barrier()


def single(trainer: Trainer) -> None:
    """Everything that needs one process."""
    folder, reference = trainer.run.parent, trainer.run.parent / "reference"
    trainer.train("reference")
    for name in ("killed-step", "killed-seal", "killed-pointer"):
        trainer.train(name)
    with signalled_at(5):
        trainer.train("signalled", note="signalled first")
    trainer.train("signalled")
    trainer.train("halted", until=8 * STEP_TOKENS, note="halted first")
    trainer.train("halted", "parallel.virtual_pipeline=null", f"schedule.tokens={20 * STEP_TOKENS}")
    given = f"start.checkpoint={reference}"
    with full_disk():
        trainer.train("full", given, note="full first")
    trainer.train("full", given, until=STEP_TOKENS)
    with full_disk():
        trainer.train("full", given, until=2 * STEP_TOKENS, note="full again")
    last = reference / "checkpoints" / "step_00000016"
    write_model(last, folder / "converted")
    trainer.train("converted-run", f"start.checkpoint={folder / 'converted'}", until=STEP_TOKENS)
    trainer.train("wider", f"start.checkpoint={folder / 'converted'}", "model.ffn=128")
    trainer.train("deeper", f"start.checkpoint={folder / 'converted'}", "model.layers=3")
    trainer.train("nan", "schedule.learning_rate=1e30", "schedule.warmup=0")
    branch = [
        "name=branch",
        f"start.fork.parent={reference}",
        f"start.fork.at={8 * STEP_TOKENS}",
        f"schedule={{kind: cosine, learning_rate: {RATE}, warmup: 0, tokens: {6 * STEP_TOKENS}}}",
        "data.seed=11",
    ]
    trainer.notes["moments with"] = loaded(trainer, "fork-with", *branch)
    trainer.notes["moments without"] = loaded(trainer, "fork-without", *branch, "start.fork.moments=false")
    trainer.notes["moments stored"] = stored_moments(reference / "checkpoints" / "step_00000008")
    trainer.notes["resumed"] = loaded(trainer, "reference")
    trainer.train("branch", *branch)
    leaf = ["name=leaf", f"start.fork={{parent: {folder / 'branch'}}}", "data.seed=12"]
    rate = 0.1 * RATE
    trainer.train("leaf", *leaf, f"schedule={{learning_rate: {rate!r}, warmup: 0, tokens: {2 * STEP_TOKENS}}}")
    trainer.train("four")
    twice_and_once(trainer, "bf16", "dtype=bf16")
    twice_and_once(trainer, "plain", "parallel.distributed_optimizer=false")


def four(trainer: Trainer) -> None:
    """Legs of one run in two layouts of four processes, a full disk and a signal that reach one rank only."""
    trainer.train("four", *FOUR_WAY, until=5 * STEP_TOKENS, note="first leg")
    unexpected(trainer)
    second = ["parallel.pipeline=2", "parallel.data=2"]
    trainer.train("four", *second, until=8 * STEP_TOKENS, note="second leg")
    with full_disk(rank=1):
        trainer.train("four", *second, until=9 * STEP_TOKENS, note="full on rank 1")
    with signalled_at(10, rank=2):
        trainer.train("four", *second, note="signalled rank 2")
    given, converted = trainer.run.parent / "four", trainer.run.parent / "converted-cut"
    write_model(latest_checkpoint(given), converted)
    trainer.train("given-cut", *FOUR_WAY, f"start.checkpoint={given}", until=STEP_TOKENS)
    trainer.train("converted-cut-run", *FOUR_WAY, f"start.checkpoint={converted}", until=STEP_TOKENS)
    for name, layout in LAYOUTS.items():
        twice_and_once(trainer, name, *layout)


def unexpected(trainer: Trainer) -> None:
    """Let rank 0 meet an error that nobody thought of, in what it does for all."""
    try:
        on_rank_zero(lambda: {}["absent"])
    except Exception as error:
        trainer.notes["unexpected"] = f"{type(error).__name__}: {error}"
    trainer.notes["after it"] = on_rank_zero(lambda: "all are here")


def twice_and_once(trainer: Trainer, name: str, *overrides: str) -> None:
    """Train six steps in two legs, and in one."""
    trainer.train(name, *overrides, until=3 * STEP_TOKENS, note=f"{name} first")
    trainer.train(name, *overrides, until=6 * STEP_TOKENS)
    trainer.train(f"{name}-whole", *overrides, until=6 * STEP_TOKENS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker = Trainer(Path(sys.argv[2]))
    {"single": single, "four": four}[sys.argv[1]](worker)
    rank = int(os.environ.get("RANK", "0"))
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps(worker.notes))
    dist.destroy_process_group()
