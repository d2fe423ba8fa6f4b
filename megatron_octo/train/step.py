"""One optimizer step: micro-batches forward and backward, clip, update, and what is known afterwards."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_octo.schedule.learning_rate import learning_rate
from megatron_octo.train.clock import Clock
from megatron_octo.train.facts import Gradients, StepFacts, Verdict
from megatron_octo.train.forward import run_batches
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


def train_step(engine: Engine, state: TrainState, hooks: Hooks) -> StepFacts:
    """Take one optimizer step and advance the state by it.

    Returns:
        The step's facts.

    Raises:
        OctoError: a hook refuses to go on; no checkpoint of this step exists.
    """
    if why := hooks.passes_over(state):
        return _pass_over(state, why)
    clock = Clock()
    rate, state.trouble = set_rates(state), None
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with clock.phase("data"):
        batches = engine.batches.of_step(state.step)
    with clock.phase("forward_backward"):
        losses = run_batches(engine, state, batches)
    with clock.phase("gradients"):
        state.optimizer.prepare_grads()
        norm = float(state.optimizer.get_grad_norm())
        loss, norm, stop = _agree(engine, losses, norm, state.stop_wanted)
    verdict = hooks.before_update(state, Gradients(loss, norm))
    if verdict is Verdict.UPDATE:
        with clock.phase("update"):
            _update(state.optimizer, state.run.optimizer.clip, norm)
    if verdict is not Verdict.REWIND:
        state.step += 1
    why = state.trouble.why if state.trouble else ""
    return StepFacts(loss, norm, rate, clock.seconds, clock.phases, verdict, stop, why)


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


def _pass_over(state: TrainState, why: str) -> StepFacts:
    """Count a step whose batches are not read: its tokens are consumed, weights and moments stay."""
    rate = set_rates(state)
    state.step += 1
    return StepFacts(math.nan, math.nan, rate, 0.0, {}, Verdict.SKIP, stop=False, why=why)


def _update(optimizer: Any, clip: float, norm: float) -> None:
    """Clip the gradients by their norm and let the optimizer use them: the second half of Megatron's `step`."""
    for one in optimizer.chained_optimizers:
        clip_grad_by_total_norm_fp32(one.get_parameters(), clip, norm)
    optimizer.step_with_ready_grads()


def _agree(engine: Engine, losses: list[torch.Tensor], norm: float, stop_wanted: bool) -> tuple[float, float, bool]:
    """Mean loss over all ranks' tokens, gradient norm, and whether any rank wants to stop, in one small exchange.

    All ranks learn the same three, bit by bit, so that a bad number or a signal ends them at the same step. The norm is
    that of rank 0, or NaN where any rank's is not finite: a group of its own may hold the bad gradient.
    """
    runtime = engine.runtime
    totals = torch.zeros(4, dtype=torch.float64, device=runtime.device)
    if losses and runtime.tensor_group.rank() == 0:
        totals[:2] = torch.stack(losses).double().sum(0)
    totals[2] = float(stop_wanted)
    totals[3] = norm if runtime.rank == 0 else norm - norm
    if runtime.world_size > 1:
        dist.all_reduce(totals)
    loss, count, stop, norm = totals.tolist()
    return loss / max(count, 1.0), norm, stop > 0
