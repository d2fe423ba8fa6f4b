"""One process that trains a tree of runs: `python -m fork_worker RUN.yaml OUT.json`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from resume_worker import Trainer
from tiny_run import STEP_TOKENS

ALL = ["checkpoint.every=128", "checkpoint.keep=99"]


def tokens(steps: int) -> str:
    return str(steps * STEP_TOKENS)


def fork(parent: Path, at: int, steps: int, kind: str, *more: str) -> list[str]:
    """Overrides of a branch that leaves at a position of the tree, in steps, with its parent's rate there."""
    schedule = f"schedule={{kind: {kind}, tokens: {tokens(steps)}, learning_rate: null, warmup: 0}}"
    return [f"start.fork={{parent: {parent}, at: {tokens(at)}}}", schedule, *more]


def grow(trainer: Trainer) -> None:
    """A stable run, a decay at its end, more of the stable run, another decay; forks of forks."""
    folder = trainer.run.parent
    stable = ["name=stable", "checkpoint.keep=1", "checkpoint.every=10K"]
    trainer.train("stable", *stable, f"schedule.tokens={tokens(8)}", note="stable to 8")
    first = fork(folder / "stable", 8, 4, "1-sqrt", "name=first", "data.seed=21", *ALL)
    trainer.train("first", *first, until=2 * STEP_TOKENS, note="first, cut short")
    trainer.train("first", *first)
    trainer.train("stable", *stable, f"schedule.tokens={tokens(12)}", note="stable to 12")
    trainer.train("second", *fork(folder / "stable", 12, 4, "linear", "name=second", "data.seed=21"))
    trainer.train("whole", *stable, f"schedule.tokens={tokens(12)}")
    trainer.train("twig", *fork(folder / "first", 10, 3, "cosine", "name=twig", "data.seed=22"))
    trainer.train(
        "leaf", *fork(folder / "twig", 13, 2, "constant", "name=leaf", "data.seed=22", "start.fork.data=continue")
    )
    trainer.train("jump", *fork(folder / "first", 10, 3, "cosine"), "schedule.learning_rate=1e-3")
    trainer.train("late", *fork(folder / "first", 11, 3, "cosine", "schedule.warmup=128"))
    trainer.train("nowhere", *fork(folder / "second", 13, 3, "cosine"))
    trainer.train("mixed", *fork(folder / "first", 10, 3, "cosine", "data.seed=1", "start.fork.data=continue"))


def decay_in_place(trainer: Trainer) -> None:
    """Warm-up, stable, decay in one run: whole, stopped inside its decay, and as a stable run and its branch."""
    folder = trainer.run.parent
    shape = f"kind: wsd, learning_rate: 0.003, warmup: {tokens(2)}, shape: 1-sqrt"
    wsd = ["name=wsd", f"schedule={{{shape}, tokens: {tokens(12)}, decay: {tokens(4)}}}", *ALL]
    trainer.train("wsd-whole", *wsd)
    for steps in (8, 9):
        trainer.train("wsd", *wsd, until=steps * STEP_TOKENS, note=f"wsd to {steps}")
    longer = f"schedule={{{shape}, tokens: {tokens(16)}, decay: {tokens(8)}}}"
    trainer.train("wsd", *wsd, longer, note="wsd stretched")
    trainer.train("wsd", *wsd)
    trainer.train("moved", *wsd, until=8 * STEP_TOKENS, note="moved to 8")
    trainer.train("moved", *wsd, f"schedule.tokens={tokens(14)}")
    on = fork(folder / "stable", 8, 4, "1-sqrt", "name=apart", "start.fork.data=continue")
    trainer.train("apart", *on)
    trainer.train("bare", *on, "name=bare", "start.fork.moments=false")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker = Trainer(Path(sys.argv[1]))
    grow(worker)
    decay_in_place(worker)
    Path(sys.argv[2]).write_text(json.dumps(worker.notes))
    dist.destroy_process_group()
