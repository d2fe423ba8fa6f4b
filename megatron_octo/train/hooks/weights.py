"""Weights that change by themselves: bits flipped in memory, and replicas that drifted apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_octo.runtime.groups import Runtime
from megatron_octo.train.facts import Gradients, StepFacts, Trouble, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


class WatchWeights(Hook):
    """Every `watch.weights_every` steps: between two updates no bit of a weight may change, and replicas are equal.

    Sums over the bits of each weight, and of its fp32 master copy, are taken right after an update and again right
    before the next one. Then each rank's sum of all weights is compared with those of its replicas. Where a policy of
    `watch` is `rewind` the run goes back to a checkpoint from before the change; else it stops (see `train.rewind`). A
    checkpoint that was taken since may hold the damage and is withdrawn.
    """

    def __init__(self, engine: Engine) -> None:
        self._runtime = engine.runtime
        self._sums: torch.Tensor | None = None
        self._equal_at = 0  # the last step at which all replicas were equal

    def open(self, state: TrainState) -> None:
        """Begin at the step the run starts from."""
        self._sums, self._equal_at = None, state.step

    after_rewind = open

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Sum the weights as the optimizer left them."""
        every = state.run.watch.weights_every
        if every is None or state.step % every:
            return
        state.gather_weights()
        self._sums = _sums(state)

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Sum the weights again, and compare with what they were and with the replicas."""
        if self._sums is None:
            return Verdict.UPDATE
        before, self._sums = self._sums, None
        changed, since = _changed(state, before), state.step - 1
        if not _anywhere(changed is not None, self._runtime):
            changed, since = _unlike(state, before, self._runtime), self._equal_at
            if not _anywhere(changed is not None, self._runtime):
                self._equal_at = state.step
                return Verdict.UPDATE
        everybody: list[str | None] = [changed]
        if self._runtime.world_size > 1:
            everybody = [None] * self._runtime.world_size
            dist.all_gather_object(everybody, changed)
        state.trouble = Trouble("; ".join(sorted({one for one in everybody if one})), since=since)
        return Verdict.REWIND


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's bits, eight bytes at a time: any single flipped bit changes it. An int64 on its device."""
    flat = tensor.detach().reshape(-1)
    small = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    pack = 8 // flat.element_size()
    start = min(-flat.storage_offset() % pack, flat.numel())
    end = start + (flat.numel() - start) // pack * pack
    edges = flat[:start].view(small).sum(dtype=torch.int64) + flat[end:].view(small).sum(dtype=torch.int64)
    return flat[start:end].view(torch.int64).sum() + edges


def _watched(state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's weights, then the fp32 master copies its optimizer holds of them."""
    weights = [
        (f"{name} of chunk {index}" if len(state.models) > 1 else name, weight)
        for index, model in enumerate(state.models)
        for name, weight in model.named_parameters()
    ]
    yield from weights
    for name, weight in weights:
        if (master := getattr(weight, "main_param", None)) is not None:
            yield f"{name} (master copy)", master


def _sums(state: TrainState) -> torch.Tensor:
    return torch.stack([checksum(tensor) for _, tensor in _watched(state)])


def _changed(state: TrainState, before: torch.Tensor) -> str | None:
    """What changed on this rank since the update, in words."""
    differs = (_sums(state) != before).tolist()
    names = [name for (name, _), one in zip(_watched(state), differs, strict=True) if one]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"rank {dist.get_rank()}: {names[0]}{more} changed without an update: memory or hardware is faulty"


def _unlike(state: TrainState, sums: torch.Tensor, runtime: Runtime) -> str | None:
    """How this rank's weights differ from its replicas', in words: the ranks in the minority are named."""
    count = sum(1 for model in state.models for _ in model.parameters())
    total = sums[:count].sum().reshape(1)
    ranks = dist.get_process_group_ranks(runtime.data_context_group)
    if len(ranks) == 1 or len(set(_gather(total, runtime))) == 1:
        return None
    by_rank = _gather(sums[:count], runtime)
    for (name, _), *column in zip(_watched(state), *by_rank, strict=False):
        common = max(column, key=column.count)
        odd = [rank for rank, value in zip(ranks, column, strict=True) if value != common]
        if odd and column.count(common) * 2 > len(column):
            return f"rank {', '.join(map(str, odd))}: {name} differs from its replicas on the other ranks of {ranks}"
        if odd:
            return f"ranks {', '.join(map(str, ranks))}: {name} is not the same, and none is in the majority"
    return None


def _gather(values: torch.Tensor, runtime: Runtime) -> list:
    """The values of every replica: numbers for one value, tuples for several."""
    group = runtime.data_context_group
    everybody = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, values, group=group)
    return [one.item() if one.numel() == 1 else tuple(one.tolist()) for one in everybody]


def _anywhere(wrong: bool, runtime: Runtime) -> bool:
    """Whether something is wrong on any rank."""
    if runtime.world_size == 1:
        return wrong
    flag = torch.tensor(int(wrong), device=runtime.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
