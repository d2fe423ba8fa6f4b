"""Micro-batches through the model, forward and backward, in whatever layout it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_octo.train.data import Batch
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


def run_batches(
    engine: Engine, state: TrainState, batches: list[Batch], *, forward_only: bool = False
) -> list[torch.Tensor]:
    """Run micro-batches through the model; gradients are added to the gradient buffers and reduced.

    Args:
        engine: the schedule of the layout.
        state: the model.
        batches: this rank's micro-batches.
        forward_only: compute losses and no gradients.

    Returns:
        On the last stage [sum of losses, token count] of each micro-batch of this rank; empty elsewhere.
    """
    return engine.forward_backward(
        forward_step_func=forward_step,
        data_iterator=_per_chunk(batches, len(state.chunks)),
        model=state.chunks if len(state.chunks) > 1 else state.chunks[0],
        num_microbatches=len(batches),
        seq_length=state.run.data.sequence_length,
        micro_batch_size=state.run.batch.micro_batch,
        forward_only=forward_only,
    )


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
