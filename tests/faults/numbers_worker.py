"""Runs with bad numbers injected, many in one process since starting one costs seconds.

`python -m numbers_worker single|two RUN.yaml OUT.json`; each rank writes what happened.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from resume_worker import Trainer
from tiny_run import STEP_TOKENS

import megatron_octo.train.step as step_module
from megatron_octo.train import loop, rewind
from megatron_octo.train.hooks.report import WriteMetrics
from megatron_octo.train.hooks.save import SaveCheckpoints
from megatron_octo.train.loggers import Loggers
from megatron_octo.train.metrics import LineFile

RANK = int(os.environ.get("RANK", "0"))
SKIP, REWIND, EVERY, BF16 = "watch.nonfinite=skip", "watch.nonfinite=rewind", "watch.weights_every=1", "dtype=bf16"
DATA = ("parallel.data=2", "batch.micro_batch=1")
OVERLAP = (*DATA, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
LAYOUTS = {
    "data": DATA,
    "data without distributed optimizer": (*DATA, "parallel.distributed_optimizer=false"),
    "data in bf16": (*DATA, BF16),
    "data with overlap": OVERLAP,
    "pipeline": ("parallel.pipeline=2",),
}
LAST = {"single": 12, "two": 8}
Fault = Callable[[Any, list[torch.Tensor]], None]


def bad_loss(_state: Any, losses: list[torch.Tensor]) -> None:
    losses[0][0] = math.nan


def infinite_gradient(state: Any, _losses: list[torch.Tensor]) -> None:
    state.chunks[0].buffers[0].grad_data[3] = math.inf


def bad_gradient(state: Any, _losses: list[torch.Tensor]) -> None:
    """In one element of this rank's share of the reduced gradients."""
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.view(-1)[0] = math.nan


def tenfold(state: Any, losses: list[torch.Tensor]) -> None:
    for loss in losses:
        loss[0] *= 10
    for buffer in state.chunks[0].buffers:
        buffer.grad_data *= 10


def at(fault: Fault, *steps: int, rank: int | None = None, times: int = 10**9) -> Any:
    """Inject a fault after the forward and backward passes of some steps, counted from 1, on all ranks or one."""
    plain, left = step_module.run_batches, [times]

    def run_batches(engine: Any, state: Any, batches: Any, **options: Any) -> Any:
        losses = plain(engine, state, batches, **options)
        if state.step + 1 in steps and rank in (None, RANK) and left[0] > 0:
            left[0] -= 1
            fault(state, losses)
        return losses

    return mock.patch.object(step_module, "run_batches", run_batches)


def poisoned_backward(step: int, rank: int) -> Any:
    """Let one rank's own gradient of one weight be NaN before the ranks' gradients are added up."""
    plain = step_module.run_batches

    def run_batches(engine: Any, state: Any, batches: Any, **options: Any) -> Any:
        weight = next(state.chunks[0].parameters())
        poison = state.step + 1 == step and rank == RANK
        handle = weight.register_hook(lambda gradient: gradient * math.nan) if poison else None
        losses = plain(engine, state, batches, **options)
        if handle is not None:
            handle.remove()
        return losses

    return mock.patch.object(step_module, "run_batches", run_batches)


def flipped(step: int, rank: int = 0, *, master: bool = False, before_save: bool = False, times: int = 1) -> Any:
    """Flip one bit of a weight after the update of a step: before its checkpoint is written, or after."""
    where = WriteMetrics if before_save else SaveCheckpoints
    plain, left = where.after_step, [times]

    def after_step(self: Any, state: Any, facts: Any) -> None:
        plain(self, state, facts)
        if state.step == step and rank == RANK and left[0] > 0:
            left[0] -= 1
            weight = list(state.models[0].parameters())[1]
            bits = (weight.main_param if master else weight).data.view(-1)
            bits = bits.view({2: torch.int16, 4: torch.int32}[bits.element_size()])
            bits[1] ^= 1 << 3

    return mock.patch.object(where, "after_step", after_step)


def drifted(step: int, rank: int, times: int = 1) -> Any:
    """Flip a bit on one rank after a forward pass was used up and before any sum of the weights is taken."""
    plain, left = loop.train_step, [times]

    def train_step(engine: Any, state: Any, hooks: Any) -> Any:
        facts = plain(engine, state, hooks)
        if state.step == step and rank == RANK and left[0] > 0:
            left[0] -= 1
            list(state.models[0].parameters())[1].data.view(-1).view(torch.int32)[1] ^= 1 << 3
        return facts

    return mock.patch.object(loop, "train_step", train_step)


def contents(state: Any) -> list[torch.Tensor]:
    """Everything the optimizer may change: weights, master weights, moments, step counters, gradient-free."""
    found = [parameter.detach().clone() for model in state.models for parameter in model.parameters()]
    for one in state.optimizer.chained_optimizers:
        inner = one.optimizer
        for group in inner.param_groups:
            for weight in group["params"]:
                found.append(weight.detach().clone())
                entries = inner.state.get(weight, {})
                found += [torch.as_tensor(entries[name]).detach().clone() for name in sorted(entries)]
    return found


def watched(notes: dict[str, Any], name: str) -> Any:
    """Note for each step whether it left every bit of weights and optimizer as it was."""
    plain, kept = loop.train_step, notes.setdefault(f"{name} kept", {})

    def train_step(engine: Any, state: Any, hooks: Any) -> Any:
        state.gather_weights()  # with overlap the forward pass would, which is no change of this step
        before = contents(state)
        facts = plain(engine, state, hooks)
        after = contents(state)
        same = all(a.equal(b) for a, b in zip(before, after, strict=True)) if len(before) == len(after) else False
        kept[str(state.step)] = same
        return facts

    return mock.patch.object(loop, "train_step", train_step)


def run(trainer: Trainer, name: str, *overrides: str, faults: tuple[Any, ...] = ()) -> None:
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        trainer.train(name, *overrides, until=LAST[sys.argv[1]] * STEP_TOKENS)


def killed_in_rewind(trainer: Trainer, name: str, point: str) -> None:
    """Train in a child that gets SIGKILL in the middle of its rewind."""
    child = os.fork()
    if child == 0:
        target, attribute = {
            "before the list": (rewind, "write_json"),
            "before the load": (rewind, "load_checkpoint"),
            "before the cut": (LineFile, "cut"),
            "after the cut": (Loggers, "rewind"),
        }[point]

        def die(*_arguments: Any, **_options: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        with mock.patch.object(target, attribute, die):
            run(trainer, name, REWIND, "watch.rewind_skip=2", faults=(at(bad_loss, 7),))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    listed = (trainer.run.parent / name / "rewinds.json").exists()
    trainer.notes[f"{name} first"] = {"signal": os.WTERMSIG(status), "listed": listed}


POINTS = ("before the list", "before the load", "before the cut", "after the cut")


def single(trainer: Trainer) -> None:
    """Everything that needs one process; children first, while nothing has computed in threads here."""
    two_over = (REWIND, "watch.rewind_skip=2")
    for point in POINTS:
        killed_in_rewind(trainer, f"killed {point}", point)
    for point in POINTS:
        run(trainer, f"killed {point}", *two_over, faults=(at(bad_loss, 7),))
    run(trainer, "clean")
    run(trainer, "all watches", *two_over, "watch.spike=rewind", "watch.window=8", EVERY)
    run(trainer, "skip", SKIP, faults=(at(bad_loss, 7), watched(trainer.notes, "skip")))
    run(trainer, "infinite", SKIP, faults=(at(infinite_gradient, 7),))
    run(trainer, "rewind", *two_over, faults=(at(bad_loss, 7),))
    run(trainer, "skipped from the start", SKIP, faults=(at(bad_loss, 6, 7),))
    run(trainer, "rewind twice", REWIND, faults=(at(bad_loss, 6, 7),))
    run(trainer, "too early", REWIND, faults=(at(bad_loss, 3),))
    run(trainer, "patience with rewinds", REWIND, faults=(at(bad_loss, *range(6, 13)),))
    run(trainer, "patience with skips", SKIP, faults=(at(bad_loss, *range(6, 13)),))
    run(trainer, "with good ones between", SKIP, faults=(at(bad_loss, 5, 6, 8, 9, 11),))
    run(trainer, "stop", faults=(at(bad_loss, 7),))
    spike = "watch.window=8"
    run(trainer, "spike", "watch.spike=skip", spike, faults=(at(tenfold, 10), watched(trainer.notes, "spike")))
    run(trainer, "spike stops", "watch.spike=stop", spike, faults=(at(tenfold, 10),))
    run(trainer, "bf16", SKIP, BF16, faults=(at(bad_loss, 7), watched(trainer.notes, "bf16")))
    run(trainer, "flip", REWIND, EVERY, faults=(flipped(9),))
    run(trainer, "flip saved", REWIND, EVERY, faults=(flipped(8, before_save=True),))
    run(trainer, "flip that shows", *two_over, EVERY, faults=(flipped(8, before_save=True), at(bad_loss, 9, times=1)))
    run(trainer, "flip of a master copy", REWIND, EVERY, BF16, faults=(flipped(9, master=True),))
    run(trainer, "flip of a copy", REWIND, EVERY, BF16, faults=(flipped(9),))
    run(trainer, "bf16 clean", BF16)
    run(trainer, "flip stops", EVERY, faults=(flipped(8, before_save=True),))
    run(trainer, "flip time and again", REWIND, EVERY, faults=(flipped(9, times=9),))


def two(trainer: Trainer) -> None:
    """Faults of one rank among two."""
    for name, layout in LAYOUTS.items():
        watch = watched(trainer.notes, name)
        run(trainer, name, *layout, SKIP, faults=(poisoned_backward(7, rank=1), watch))
    run(trainer, "loss on 1", *DATA, SKIP, faults=(at(bad_loss, 7, rank=1),))
    run(trainer, "share on 1", *DATA, SKIP, faults=(at(bad_gradient, 7, rank=1),))
    run(trainer, "rewind on 1", *DATA, REWIND, faults=(poisoned_backward(7, rank=1),))
    run(trainer, "clean", *DATA)
    run(trainer, "flip on 1", *DATA, REWIND, EVERY, faults=(flipped(6, rank=1),))
    run(trainer, "drift on 1", *DATA, REWIND, EVERY, faults=(drifted(6, rank=1),))
    run(trainer, "clean overlap", *OVERLAP, EVERY)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worker = Trainer(Path(sys.argv[2]))
    {"single": single, "two": two}[sys.argv[1]](worker)
    Path(sys.argv[3]).with_suffix(f".{RANK}.json").write_text(json.dumps(worker.notes))
    if dist.is_initialized():
        dist.destroy_process_group()
