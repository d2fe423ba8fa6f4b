"""Statistics of single parts of the model: gradient norms and activations, summed over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_octo.runtime.groups import Runtime
from megatron_octo.train.parts import first_tensor, parts
from megatron_octo.train.state import TrainState


def gradient_norms(state: TrainState, runtime: Runtime) -> dict[str, float]:
    """Norm of the gradient of each layer, of the embedding, the final norm and the output layer, before clipping.

    Call it when the optimizer has prepared its gradients; collective. What counts, and over which ranks it is summed,
    is the optimizer's own rule for the global norm, whose square is the sum of the squares of these. A tied output
    layer has no gradient of its own.
    """
    names = ["embedding", *(f"layers.{number}" for number in range(state.run.model.layers)), "final_norm", "output"]
    places = {name: place for place, name in enumerate(names)}
    squares = torch.zeros(len(names), dtype=torch.float64, device=runtime.device)
    owners = {weight: name for name, part in parts(state.models) if name in places for weight in part.parameters()}
    for one in state.optimizer.chained_optimizers:
        for weight, main in _weights(one):
            counted = param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main)
            if main.grad is not None and counted:
                squares[places[owners[weight]]] += main.grad.double().square().sum()
    if runtime.world_size > 1:
        dist.all_reduce(squares, group=state.optimizer.get_grad_stats_parallel_group())
    return {name: math.sqrt(square) for name, square in zip(names, squares.tolist(), strict=True)}


class Activations:
    """Watches what the parts of a model hand on, from its making until `close`.

    Per part the squares, the finite and the other values and the largest size are summed up on the device; `result`
    is the only exchange. Ranks that hold copies of a tensor, and a forward pass that is computed twice, count a value
    several times, alike for all values of a part: no ratio changes. Modules in evaluation mode are not watched.
    """

    def __init__(self, state: TrainState, runtime: Runtime) -> None:
        self._runtime = runtime
        layers = range(state.run.model.layers)
        inner = [f"layers.{number}{part}" for number in layers for part in (".attention", ".mlp", "")]
        self._names = ["embedding", *inner, "final_norm"]
        self._sums = torch.zeros(len(self._names), 3, dtype=torch.float64, device=runtime.device)
        self._largest = torch.zeros(len(self._names), dtype=torch.float64, device=runtime.device)
        places = {name: place for place, name in enumerate(self._names)}
        found = [(places[name], part) for name, part in parts(state.models) if name in places]
        self._handles = [part.register_forward_hook(self._watch(place)) for place, part in found]

    def _watch(self, place: int) -> Any:
        def watch(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if not module.training:
                return
            with torch.no_grad():
                values = first_tensor(output).detach()
                good = values.isfinite()
                sizes = torch.where(good, values, 0).float().abs()
                count = good.sum(dtype=torch.float64)
                squares = sizes.square().sum(dtype=torch.float64)
                self._sums[place] += torch.stack([squares, count, values.numel() - count])
                self._largest[place] = torch.maximum(self._largest[place], sizes.max().double())

        return watch

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def result(self) -> dict[str, dict[str, float]]:
        """Per part `rms` and `max` of the finite values, and `nonfinite`, the share of others; collective."""
        if self._runtime.world_size > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        found = {}
        rows = zip(self._names, self._sums.tolist(), self._largest.tolist(), strict=True)
        for name, (squares, good, bad), largest in rows:
            rms = math.sqrt(squares / good) if good else math.nan
            found[name] = {"rms": rms, "max": largest, "nonfinite": bad / max(good + bad, 1.0)}
        return found


def _weights(one: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's weights of one of Megatron's optimizers, and what holds this rank's gradient of each.

    The distributed optimizer holds shards, with FP32 copies where weights are BF16; the plain one with FP32 copies
    whole ones; the plain FP32 one the weights themselves.
    """
    if hasattr(one, "shard_fp32_groups"):
        pairs = [
            (one.model_fp32_groups, one.shard_fp32_groups),
            (one.model_float16_groups, one.shard_fp32_from_float16_groups),
        ]
    elif hasattr(one, "float16_groups"):
        pairs = [
            (one.float16_groups, one.fp32_from_float16_groups),
            (one.fp32_from_fp32_groups, one.fp32_from_fp32_groups),
        ]
    else:
        pairs = [([one.get_parameters()], [one.get_parameters()])]
    for weights, mains in pairs:
        for group, main_group in zip(weights, mains, strict=True):
            yield from zip(group, main_group, strict=True)
