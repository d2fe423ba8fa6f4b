"""The FP8 sentinel: now and then one micro-batch is computed again in BF16, and FP8 that strays is taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_octo.config.precision import SentinelConfig
from megatron_octo.model.precision import Precision
from megatron_octo.train import envelope
from megatron_octo.train.data import Batch
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.facts import Verdict as Step
from megatron_octo.train.forward import run_batches
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.metrics import LineFile
from megatron_octo.train.setup import Engine
from megatron_octo.train.start import SENTINEL
from megatron_octo.train.state import TrainState

NAME = "sentinel"
_SYNCHRONISING = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func")


class Sentinel(Hook):
    """Compares FP8 with BF16 every few steps, on the weights and the data of the step just taken.

    Each data-parallel rank replays its first micro-batch, forward and backward, in both precisions. Gradients are not
    reduced: a layer's norm is that of all ranks' gradients side by side. Nothing of it stays: gradient buffers are
    empty before the next step as they always are, and what the recipe remembers is put back. What is decided is the
    same on every rank, kept in `state.memory["sentinel"]` and in `sentinel.jsonl`.

    Args:
        engine: data and schedule.
        precision: moves layers.
        config: how often, how far, and what then.
    """

    def __init__(self, engine: Engine, precision: Precision, config: SentinelConfig) -> None:
        self._engine, self._precision, self._config = engine, precision, config
        self._file: LineFile | None = None

    def open(self, state: TrainState) -> None:
        """Move the layers that were moved before a restart."""
        self._take_up(state)
        if self._engine.runtime.is_reporter:
            self._file = LineFile(state.run.out / SENTINEL)

    def after_rewind(self, state: TrainState) -> None:
        """Go back to what was decided by then."""
        self._take_up(state)
        if self._file is not None:
            self._file.cut(state.step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Compare, if it is time and the step was a good one."""
        if state.step % self._config.every == 0 and facts.verdict is Step.UPDATE and _in_fp8(state):
            self._watch(state)

    def _take_up(self, state: TrainState) -> None:
        memory = state.memory.setdefault(NAME, {"bf16": []})
        self._precision.keep_in_bf16(memory["bf16"])

    def _watch(self, state: TrainState) -> None:
        memory = state.memory[NAME]
        batches = self._engine.batches.of_step(state.step - 1, limit=1)
        if state.run.parallel.virtual_pipeline:  # its schedule takes as many as there are stages
            batches *= state.run.parallel.pipeline
        reference = self._replay(state, batches, range(state.run.model.layers))
        differences = envelope.relative(self._replay(state, batches, ()), reference)
        allowed = envelope.limits(memory, self._config, list(differences))
        verdict = envelope.judge(memory, self._config, differences)
        moved: list[int] = []
        if verdict.due:
            moved = self._decide(state, batches, reference, allowed, verdict)
            memory["bf16"], memory["strikes"] = sorted({*memory["bf16"], *moved}), 0
            self._precision.keep_in_bf16(memory["bf16"])
        if self._file is not None:
            self._file.write(_line(state, differences, verdict, moved))
            if verdict.due:
                print(_sentence(state, differences, allowed, verdict, moved), flush=True)

    def _decide(
        self,
        state: TrainState,
        batches: list[Batch],
        reference: dict[str, float],
        allowed: dict[str, float],
        verdict: envelope.Verdict,
    ) -> list[int]:
        """The layers to move: none, the one whose move explains the difference, or all that are in FP8."""
        candidates = _in_fp8(state)
        if self._config.action == "warn":
            return []
        if self._config.action == "layer":
            alone = {
                number: envelope.excess(
                    envelope.relative(self._replay(state, batches, [number]), reference), allowed
                )[0]
                for number in candidates
            }  # fmt: skip
            layer = envelope.choose(verdict.excess, alone)
            if layer is not None:
                return [layer]
        return candidates

    def _replay(self, state: TrainState, batches: list[Batch], in_bf16: Iterable[int]) -> dict[str, float]:
        """Loss, and gradient norm of each layer, of these micro-batches with more layers in BF16."""
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        with self._precision.replay(in_bf16), _unreduced(state.chunks):
            losses = run_batches(self._engine, state, batches)
        measured = self._gather(state, losses)
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        return measured

    def _gather(self, state: TrainState, losses: list[torch.Tensor]) -> dict[str, float]:
        """Sum over all ranks: [loss, tokens, squared gradient norm of each layer]."""
        runtime = self._engine.runtime
        totals = torch.zeros(2 + state.run.model.layers, dtype=torch.float64, device=runtime.device)
        if losses and runtime.tensor_group.rank() == 0:
            totals[:2] = torch.stack(losses).double().sum(0)
        for number, layer in self._precision.layers.items():
            own = [weight.main_grad for weight in layer.parameters() if param_is_not_tensor_parallel_duplicate(weight)]
            totals[2 + number] = torch.stack(torch._foreach_norm(own)).double().square().sum()
        if runtime.world_size > 1:
            dist.all_reduce(totals)
        loss, tokens, *squares = totals.tolist()
        norms = {envelope.layer_name(number): square**0.5 for number, square in enumerate(squares)}
        return {envelope.LOSS: loss / max(tokens, 1.0), **norms}


def _in_fp8(state: TrainState) -> list[int]:
    """Layers of the whole model that still compute in FP8."""
    fp8, count = state.run.fp8, state.run.model.layers
    first, last = (fp8.bf16_first_layers, fp8.bf16_last_layers) if fp8 else (0, 0)
    return [number for number in range(first, count - last) if number not in state.memory[NAME]["bf16"]]


@contextmanager
def _unreduced(chunks: list[Any]) -> Iterator[None]:
    """Leave gradients as each rank computed them: no reduction, no scaling, no messages of the schedule."""
    kept = [{name: getattr(chunk.config, name) for name in _SYNCHRONISING} for chunk in chunks]
    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
            for name in _SYNCHRONISING:
                setattr(chunk.config, name, None)
        try:
            yield
        finally:
            for chunk, functions in zip(chunks, kept, strict=True):
                for name, function in functions.items():
                    setattr(chunk.config, name, function)


def _line(
    state: TrainState, differences: envelope.Differences, verdict: envelope.Verdict, moved: list[int]
) -> dict[str, Any]:
    """One comparison: relative differences, how far outside, what was moved."""
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": differences[envelope.LOSS],
        "layers": [differences[envelope.layer_name(number)] for number in range(state.run.model.layers)],
        "excess": verdict.excess,
        "worst": verdict.worst,
        "strikes": verdict.strikes,
        "moved": moved,
        "bf16": state.memory[NAME]["bf16"],
    }


def _sentence(
    state: TrainState,
    differences: envelope.Differences,
    allowed: dict[str, float],
    verdict: envelope.Verdict,
    moved: list[int],
) -> str:
    worst = verdict.worst
    if not moved:
        action = "nothing is moved (fp8.sentinel.action: warn)"
    elif len(moved) == 1:
        action = f"layer {moved[0]} moves to BF16 for the rest of the run"
    else:
        action = f"all {len(moved)} layers in FP8 move to BF16 for the rest of the run: no single one explains it"
    return (
        f"fp8 sentinel: step {state.step}: {action}; {worst} differs from BF16 by {differences[worst]:.2e}, "
        f"allowed are {allowed[worst]:.2e}, {verdict.strikes} comparisons in a row were outside"
    )
