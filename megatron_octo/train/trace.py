"""A few real training steps on made-up data: what the check of a layout compares, and the parity suite with it.

Model, wrappers, optimizer and step are those of a training run; only the windows are made up, so that neither a
corpus nor a run directory is needed. One rank of it: `python -m megatron_octo.train.trace CASES.json OUT_DIR`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_octo.runtime import groups, quick_import

quick_import.import_megatron()  # before the modules below import it

# ruff: noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_octo.model.build import build_chunks
from megatron_octo.progress import Progress
from megatron_octo.train.data import Batches
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.setup import Engine, build_optimizer, wrap
from megatron_octo.train.state import TrainState
from megatron_octo.train.step import train_step
from megatron_octo.train.tiny import Case

_PATTERNS, _NOISE, _MASKED = 4, 0.1, 0.1
_SEED = 7


class Patterns:
    """Windows of noisy repetitions, so that there is something to learn, with a random loss mask.

    Window n follows from n alone, so every layout reads the same.

    Args:
        vocabulary: tokens lie below it.
        length: s, tokens of a window.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length
        fixed = torch.Generator().manual_seed(_SEED)
        self._patterns = torch.randint(0, vocabulary, (_PATTERNS, length + 1), generator=fixed)

    def __getitem__(self, window: int) -> dict[str, torch.Tensor]:
        fresh = torch.Generator().manual_seed(_SEED + 1 + window)
        tokens = self._patterns[int(torch.randint(0, _PATTERNS, (1,), generator=fresh))]
        noise = torch.rand(tokens.shape, generator=fresh) < _NOISE
        tokens = torch.where(noise, torch.randint(0, self._vocabulary, tokens.shape, generator=fresh), tokens)
        mask = (torch.rand(self._length, generator=fresh) >= _MASKED).float()
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self._length),
        }


@contextmanager
def training(case: Case) -> Iterator[tuple[Engine, TrainState]]:
    """A run of this case's layout that can take steps; the world of processes must be of its size, and is kept."""
    run = case.run
    runtime = groups.initialize(run.parallel, run.seed, run.timeout_minutes)
    try:
        chunks = wrap(run, build_chunks(run.model, run.parallel, run.dtype, run.seed, run.recompute), case.bucket)
        if case.nudge is not None:
            nudge(chunks, case.nudge)
        state = TrainState(run, chunks, build_optimizer(run, chunks))
        windows = Patterns(run.model.vocabulary, run.data.sequence_length)
        yield Engine(runtime, Batches(run, runtime, windows), get_forward_backward_func()), state
    finally:
        groups.shutdown(keep_world=True)


def trace(case: Case) -> Iterator[dict[str, float]]:
    """Take the case's steps; each gives its mean loss a token and its gradient norm, the same on every rank."""
    with training(case) as (engine, state):
        for _ in range(case.steps):
            facts = train_step(engine, state, Hooks([], state))
            yield {"loss": facts.loss, "norm": facts.grad_norm}


def nudge(chunks: list[torch.nn.Module], seed: int) -> None:
    """Move every weight by one unit in its last place, up or down at random: the smallest change there is."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for weight in chunk.parameters():
                up = torch.rand(weight.shape, generator=chance) < 0.5
                weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf).to(weight)))


def run_cases(source: Path, out: Path) -> None:
    """Trace each case of a JSON file, {name: case}, one after another; rank 0 writes out/<name>.json."""
    cases = {name: Case.load(values) for name, values in json.loads(source.read_text(encoding="utf-8")).items()}
    with Progress("steps", sum(case.steps for case in cases.values()), "steps") as progress:
        for name, case in cases.items():
            steps = []
            for facts in trace(case):
                steps.append(facts)
                progress.advance()
            if dist.get_rank() == 0:
                (out / f"{name}.json").write_text(json.dumps(steps), encoding="utf-8")


def main() -> None:
    """Trace the cases named on the command line as one rank."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    run_cases(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
