"""Loss on held-out text, source by source."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_octo.config.run import RunConfig
from megatron_octo.data.mix.held_out import HeldOut, open_held_out
from megatron_octo.train.data import Batches
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.forward import run_batches
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.loggers import Loggers
from megatron_octo.train.metrics import LineFile
from megatron_octo.train.setup import Engine
from megatron_octo.train.start import VALIDATION
from megatron_octo.train.state import TrainState

MEMORY = "validation"


class Validate(Hook):
    """Computes validation losses when the run crosses a multiple of `validation.every` tokens, and at its end.

    Each is a line of `validation.jsonl`: position, per source its loss per token, perplexity and tokens counted, and
    `loss`, the plain mean over sources. Nothing of training is touched: no gradient, no generator, no weight.

    It comes before the save of the same step, and the step it was last done at is remembered in checkpoints: a run
    that goes on neither loses one nor does one twice. A step that ends with a request to stop leaves it to the restart.
    """

    def __init__(self, engine: Engine, loggers: Loggers) -> None:
        self._engine, self._loggers = engine, loggers
        self._sources: dict[str, HeldOut] = {}
        self._file: LineFile | None = None
        self.loss: float | None = None

    def open(self, state: TrainState) -> None:
        """Open the sources, and make up for a validation that a stop left out.

        Raises:
            DataError: a source is missing, damaged or unfit.
        """
        run = state.run
        if run.validation is None:
            return
        self._sources, short = open_held_out(run)
        if self._engine.runtime.is_reporter:
            self._file = LineFile(run.out / VALIDATION)
            for sentence in short:
                print(f"octo: warning: {sentence}", file=sys.stderr, flush=True)
        if self._due(state) and state.memory.get(MEMORY) != state.step:
            if self._file is not None:  # an attempt killed before its next checkpoint made up for it too
                self._file.cut(state.step - 1)
            self._validate(state)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Validate if it is time."""
        if self._sources and self._due(state) and (not facts.stop or state.step == state.run.steps):
            self._validate(state)

    def after_rewind(self, state: TrainState) -> None:
        """Go on behind the checkpoint's line."""
        if self._file is not None:
            self._file.cut(state.step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _due(self, state: TrainState) -> bool:
        assert state.run.validation is not None
        every, end = state.run.validation.every, state.run_tokens
        crossed = end // every > (end - state.run.tokens_per_step) // every
        return state.step > 0 and (crossed or state.step == state.run.steps)

    def _validate(self, state: TrainState) -> None:
        began = time.perf_counter()
        with state.apart("a validation"):
            found = losses_of(self._engine, state, self._sources)
        state.memory[MEMORY] = state.step
        self.loss = sum(loss for loss, _ in found.values()) / len(found)
        if self._file is None:
            return
        sources = {
            name: {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
            for name, (loss, tokens) in found.items()
        }
        position = {"step": state.step, "tokens": state.tokens, "run_tokens": state.run_tokens}
        seconds = round(time.perf_counter() - began, 4)
        self._file.write({**position, "loss": self.loss, "sources": sources, "seconds": seconds})
        points = {f"validation/{name}": loss for name, (loss, _) in found.items()}
        self._loggers.write(state.step, {**points, "validation/mean": self.loss})


def losses_of(engine: Engine, state: TrainState, sources: dict[str, HeldOut]) -> dict[str, tuple[float, int]]:
    """Loss per token of each source, forward only and in the run's own layout; collective over all ranks.

    Data-parallel ranks share the windows. What fills the last micro-batches up is masked, so that every window counts
    once, whatever the layout.

    Returns:
        For each source the mean loss of its tokens and how many there are, the same on every rank.
    """
    runtime = engine.runtime
    totals = torch.zeros(len(sources), 2, dtype=torch.float64, device=runtime.device)
    with _evaluating(state), torch.no_grad():
        for place, (name, source) in enumerate(sources.items()):
            run, rounds = _rounds(state.run, source.count)
            batches = Batches(run, runtime, source)
            for number in range(rounds):
                with state.apart(f"a validation ({name}, batch {number + 1} of {rounds})"):
                    losses = run_batches(engine, state, batches.of_step(number), forward_only=True)
                if losses and runtime.tensor_group.rank() == 0:
                    totals[place] += torch.stack(losses).double().sum(0)
    if runtime.world_size > 1:
        dist.all_reduce(totals)
    return {name: (loss / count, int(count)) for name, (loss, count) in zip(sources, totals.tolist(), strict=True)}


def _rounds(run: RunConfig, windows: int) -> tuple[RunConfig, int]:
    """How windows are cut: the run with a global batch that holds them, at most its own, and how often that is read."""
    parallel = run.parallel
    unit = run.batch.micro_batch * parallel.data * (parallel.pipeline if parallel.virtual_pipeline else 1)
    size = min(-(-windows // unit) * unit, run.batch.global_batch)
    batch = run.batch.model_copy(update={"global_batch": size})
    return run.model_copy(update={"batch": batch}), -(-windows // size)


@contextmanager
def _evaluating(state: TrainState) -> Iterator[None]:
    """Modules in evaluation mode, with all weights gathered; hooks that gather them piece by piece pause."""
    gathering = [chunk for chunk in state.chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in gathering:
        chunk.disable_forward_pre_hook()
    for chunk in state.chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in state.chunks:
            chunk.train()
        for chunk in gathering:
            chunk.enable_forward_pre_hook()
