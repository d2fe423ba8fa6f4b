"""Ranks of the tests of what a run tells: many short trainings in one process, since starting one costs seconds.

`python -m seeing_worker NPROC RUN.yaml OUT.json`; each rank writes how its trainings ended.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from resume_worker import Trainer, signalled_at
from tiny_run import STEP_TOKENS

LAYOUTS = {
    1: {"one": []},
    2: {
        "TP2 SP": ["parallel={tensor: 2, sequence: true}"],
        "DP2": ["parallel={data: 2}"],
        "CP2": ["parallel={context: 2}"],
        "PP2": ["parallel={pipeline: 2}"],
        "DP2 plain optimizer": ["parallel={data: 2, distributed_optimizer: false}"],
        "TP2": ["parallel={tensor: 2}"],
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


def main() -> None:
    nproc, trainer = int(sys.argv[1]), Trainer(Path(sys.argv[2]))
    folder = trainer.run.parent
    short = [f"schedule.tokens={LENGTH * STEP_TOKENS}", "checkpoint.every=1M", "model.layers=4"]
    seen = [*short, *validation(folder), "logging.statistics_every=3", "logging.profile_every=2"]
    for name, layout in LAYOUTS[nproc].items():
        trainer.train(name, *seen, *layout)
    if nproc == 1:
        trainer.train("blind", *short, "logging.tensorboard=false")
        with signalled_at(3):  # the step it ends with is one of the validated
            trainer.train("stopped", *seen, note="stopped first")
        trainer.train("stopped", *seen)
        trainer.train("bf16", *seen, "dtype=bf16")
        trainer.train("bf16 blind", *short, "dtype=bf16")
        hot = ["schedule.learning_rate=1e30", "schedule.warmup=0", "logging.statistics_every=1"]
        trainer.train("nan", *seen, *hot)
    if nproc == 4:
        trainer.train("blind four", *short, *LAYOUTS[4]["PP2 VPP2 DP2"])
    rank = int(os.environ.get("RANK", "0"))
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps(trainer.notes))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
