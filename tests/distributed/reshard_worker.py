"""One rank of the resharding tests: saves in each layout of this world, and goes on from checkpoints of any.

`python -m reshard_worker PHASES FOLDER NPROC`, where PHASES is "save", "load" or "save load": FOLDER/<layout>/ are run
directories; what a layout computed after loading another's checkpoint goes to FOLDER/<from> to <into>.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from tiny_layouts import PAIRS, RESHARDED, reshard_case

import megatron_octo.train.loop  # noqa: F401  # first: it imports megatron-core the quick way
from megatron_octo.checkpoint.save import load_checkpoint
from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.hooks.save import SaveCheckpoints
from megatron_octo.train.step import train_step
from megatron_octo.train.tiny import Case
from megatron_octo.train.trace import training

BEFORE, AFTER = 2, 2
"""Steps before the checkpoint and after it; only the second after it shows whether the moments came along."""


def save(case: Case, steps: int = BEFORE) -> list[StepFacts]:
    """Train from random weights and save at the end."""
    case.run.out.mkdir(parents=True, exist_ok=True)
    with training(case) as (engine, state), Hooks([SaveCheckpoints()], state) as hooks:
        facts = [train_step(engine, state, hooks) for _ in range(steps)]
        hooks.finish(state)
    return facts


def go_on(case: Case, checkpoint: Path, *, moments: bool = True) -> list[StepFacts]:
    """Load a checkpoint of any layout and train on."""
    with training(case) as (engine, state):
        load_checkpoint(checkpoint, state.models, state.optimizer, moments=moments)
        state.step = BEFORE
        return [train_step(engine, state, Hooks([], state)) for _ in range(AFTER)]


def write(path: Path, facts: list[StepFacts]) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps([{"loss": fact.loss, "norm": fact.grad_norm} for fact in facts]))


def main(phases: list[str], folder: Path, nproc: int) -> None:
    here = {name: reshard_case(name, folder) for name, values in RESHARDED.items() if values["nproc"] == nproc}
    if "save" in phases:
        for name, case in here.items():
            write(folder / f"{name}.json", save(case))
        if nproc == 1:
            whole = reshard_case("single", folder / "whole")
            write(folder / "whole.json", save(whole, BEFORE + AFTER))
            bf16 = reshard_case("single bf16", folder / "whole")
            write(folder / "whole bf16.json", save(bf16, BEFORE + AFTER))
            given = latest_checkpoint(folder / "single")
            write(folder / "no moments.json", go_on(here["single"], given, moments=False))
    if "load" in phases:
        for source, name in PAIRS:
            if name in here:
                write(folder / f"{source} to {name}.json", go_on(here[name], latest_checkpoint(folder / source)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1].split(), Path(sys.argv[2]), int(sys.argv[3]))
    dist.destroy_process_group()
