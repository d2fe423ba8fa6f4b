"""One optimizer step: micro-batches forward and backward, clip, update, and what is known afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_octo.errors import StageFailed
from megatron_octo.schedule.learning_rate import learning_rate
from megatron_octo.train.data import Batch
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


class StepFacts(NamedTuple):
    """What one step says about itself, the same on every rank.

    Args:
        loss: mean over the step's tokens, all ranks together.
        grad_norm: global gradient norm before clipping.
        learning_rate: of this step.
        seconds: wall time of the step.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    stop: bool


def train_step(engine: Engine, state: TrainState) -> StepFacts:
    """Take one optimizer step and advance the state by it.

    Returns:
        The step's facts.

    Raises:
        StageFailed: loss or gradient is not a finite number; no checkpoint of this step exists.
    """
    begin = time.perf_counter()
    rate = set_rates(state)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    batches = engine.batches.of_step(state.step)
    losses = engine.forward_backward(
        forward_step_func=forward_step,
        data_iterator=_per_chunk(batches, len(state.chunks)),
        model=state.chunks if len(state.chunks) > 1 else state.chunks[0],
        num_microbatches=len(batches),
        seq_length=state.run.data.sequence_length,
        micro_batch_size=state.run.batch.micro_batch,
        forward_only=False,
    )
    _, grad_norm, _ = state.optimizer.step()
    loss, stop = _agree(engine, losses, state.stop_wanted)
    _check_finite(state, loss, float(grad_norm))
    state.step += 1
    return StepFacts(loss, float(grad_norm), rate, time.perf_counter() - begin, stop)


def set_rates(state: TrainState) -> float:
    """Give the optimizer the learning rate and weight decay of the coming step.

    They follow from the position alone and are set anew each step, so what an optimizer loads on resume
    does not matter. Norm weights keep a weight decay of zero (Megatron's `wd_mult`).

    Returns:
        The learning rate.
    """
    rate = learning_rate(state.run.schedule, state.run_tokens)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = state.run.optimizer.weight_decay * group.get("wd_mult", 1.0)
    return rate


def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run one micro-batch through one chunk, in the form Megatron's schedules call.

    Returns:
        The chunk's output (losses [b, s] on the last stage, hidden states [s, b, h] before it) and the function
        that sums losses: (sum, token count, [sum, count]); the schedule divides by the global count at the end.
    """
    batch = next(batches)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def total(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = batch["loss_mask"]
        loss, count = (losses.float() * mask).sum(), mask.sum()
        return loss, count.to(torch.int), torch.stack([loss.detach(), count])

    return output, total


def _per_chunk(batches: list[Batch], chunks: int) -> Iterator[Batch] | list[Iterator[Batch]]:
    return iter(batches) if chunks == 1 else [iter(batches) for _ in range(chunks)]


def _agree(engine: Engine, losses: list[torch.Tensor], stop_wanted: bool) -> tuple[float, bool]:
    """Mean loss over all ranks' tokens and whether any rank wants to stop, in one small exchange.

    All ranks learn both, so that a bad loss or a signal ends them at the same step.
    """
    runtime = engine.runtime
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    if losses and runtime.tensor_group.rank() == 0:
        totals[:2] = torch.stack(losses).double().sum(0)
    totals[2] = float(stop_wanted)
    if runtime.world_size > 1:
        dist.all_reduce(totals)
    loss, count, stop = totals.tolist()
    return loss / max(count, 1.0), stop > 0


def _check_finite(state: TrainState, loss: float, grad_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise StageFailed(
        f"step {state.step + 1} ({state.tokens} tokens): loss is {loss}, gradient norm is {grad_norm}",
        "a run stops at the first value that is not a finite number; the last checkpoint was taken before it",
        "look at the data of this step (octo data inspect), or start anew in another `out` with a lower "
        "schedule.learning_rate or optimizer.clip",
    )
