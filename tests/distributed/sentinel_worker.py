"""Ranks of the sentinel's tests: real trainings in BF16 whose layers' inputs are rounded as FP8 would round them.

`python -m sentinel_worker single|four RUN.yaml OUT`; rank 0 writes OUT.0.json.

The rounding stands in for TransformerEngine's, which needs a GPU: e4m3 with a scale from past maxima (the delayed
recipe, the one with something to remember), in the forward pass, gradients straight through. A planted fault rounds one
layer's inputs with a scale far too large, so that they saturate.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_run import FOUR_WAY, STEP_TOKENS

import megatron_octo.train.loop as loop
from megatron_octo.checkpoint.sharded import cast_from_masters
from megatron_octo.config.precision import SentinelConfig
from megatron_octo.model.build import build_chunks
from megatron_octo.model.precision import Precision
from megatron_octo.runtime import groups
from megatron_octo.train import setup
from megatron_octo.train.api import load_run
from megatron_octo.train.hooks import default
from megatron_octo.train.hooks.sentinel import Sentinel

LARGEST, BAD_SCALE = 448.0, 3e4
LAYERS = ("dtype=bf16", "model.layers=4")
STATISTICS = "logging.statistics_every=3"
NORMAL = {"every": 2, "warmup": 2, "patience": 2, "loss_tolerance": 0.02, "grad_tolerance": 0.5}


class Rounding:
    """What TransformerEngine's modules do around a matrix product, in torch: rounds its input, unless switched off."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.on, self.bad, self.off_calls = True, bad, 0

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on, before = False, self.on
        self.off_calls += 1
        try:
            yield
        finally:
            self.on = before

    def install(self, models: list[torch.nn.Module]) -> None:
        for layer in (layer for model in models for layer in model.decoder.layers):
            number = layer.layer_number - 1
            for linear in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
                state = SimpleNamespace(scale=torch.ones(1), amax_history=torch.zeros(4))
                linear.fp8_meta = {"scaling_fwd": state}
                linear.register_forward_pre_hook(partial(self._round, number=number))
                linear.get_extra_state = partial(_saved, state)
                linear.set_extra_state = partial(_restored, state)

    def _round(self, linear: Any, inputs: tuple, number: int) -> tuple:
        if not self.on:
            return inputs
        (value, *rest), state = inputs, linear.fp8_meta["scaling_fwd"]
        scale = BAD_SCALE if number in self.bad else float(state.scale)
        rounded = (value.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale
        state.amax_history.copy_(torch.roll(state.amax_history, 1))
        state.amax_history[0] = value.detach().abs().max().float()
        state.scale.fill_(LARGEST / max(float(state.amax_history.max()), 1e-6))
        return value + (rounded.to(value.dtype) - value).detach(), *rest


def _saved(state: Any) -> torch.Tensor:
    """What a checkpoint holds of a recipe's memory: bytes of a pickle, as TransformerEngine's extra state is."""
    kept = {"scale_fwd": state.scale, "amax_history_fwd": state.amax_history, "extra_fp8_variables": {"num_gemms": 1}}
    return torch.frombuffer(bytearray(pickle.dumps(kept)), dtype=torch.uint8)


def _restored(state: Any, saved: torch.Tensor) -> None:
    kept = pickle.loads(saved.numpy().tobytes())
    state.scale.copy_(kept["scale_fwd"])
    state.amax_history.copy_(kept["amax_history_fwd"])


class Trainer:
    """Trains beside the run file and notes what became of the weights and what the sentinel decided."""

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, {}

    def train(self, name: str, *overrides: str, bad: tuple[int, ...] = (), sentinel: dict | None = None, **how) -> None:
        rounding, until = Rounding(bad), how.get("until", 12 * STEP_TOKENS)

        def build(*arguments: Any, **options: Any) -> Any:
            models = build_chunks(*arguments, **options)
            rounding.install(models)
            return models

        def sentinels(engine: Any, state: Any) -> list[Sentinel]:
            if sentinel is None:
                return []
            config = SentinelConfig(**{**NORMAL, **sentinel})
            return [Sentinel(engine, Precision(state.models, rounding.off), config)]

        from megatron.core.distributed import param_and_grad_buffer  # after train.loop, which imports it quickly

        plain, sent = param_and_grad_buffer.dist_reduce_scatter_func, []

        def reduce(*arguments: Any, **options: Any) -> Any:
            sent.append(1)
            return plain(*arguments, **options)

        run = load_run(self.path, [f"out={self.path.parent / name}", *LAYERS, *overrides])
        with (
            mock.patch.object(groups, "shutdown", partial(groups.shutdown, keep_world=True)),
            mock.patch.object(default, "sentinels", sentinels),
            mock.patch.object(setup, "build_chunks", build),
            mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", reduce),
        ):
            state = loop.train(run, until)
        weights = [weight.detach().float().numpy().tobytes() for model in state.models for weight in model.parameters()]
        self.notes[how.get("note", name)] = {
            "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
            "memory": state.memory.get("sentinel"),
            "off_calls": rounding.off_calls,
            "reductions": len(sent),
        }


def reload_masters(trainer: Trainer) -> None:
    """Masters from a state dict, and weights from masters: what loading does to weights that are kept in FP8."""
    run = load_run(trainer.path, [f"out={trainer.path.parent / 'plain'}", *LAYERS])
    _, state = setup.set_up(run, groups.initialize(run.parallel, run.seed, run.timeout_minutes))
    inner = state.optimizer.chained_optimizers[0]
    masters = [master for group in inner.shard_fp32_from_float16_groups for master in group]
    weights = list(state.models[0].parameters())
    before = [weight.detach().clone() for weight in weights]
    kept, exact = [master.clone() for master in masters], state.models[0].state_dict()
    exact = {name: value.float() + 2**-20 for name, value in exact.items() if "_extra_state" not in name}
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    cast_from_masters(state.optimizer)
    again = all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    state.optimizer.reload_model_params({"model0": exact})
    flat = sum(float(value.double().sum()) for value in exact.values())
    trainer.notes["masters"] = {
        "cast": again and any(bool(weight.any()) for weight in weights),
        "unrounded": [flat, sum(float(master.double().sum()) for master in masters)],
        "rounded": sum(float(master.double().sum()) for master in kept),
    }
    groups.shutdown(keep_world=True)


def single(trainer: Trainer) -> None:
    trainer.train("plain", STATISTICS)
    reload_masters(trainer)
    trainer.train("watched", STATISTICS, sentinel={"action": "warn"})
    trainer.train("bad", bad=(2,), sentinel={})
    trainer.train("bad-unwatched", bad=(2,))
    trainer.train("bad-warned", bad=(2,), sentinel={"action": "warn"})
    trainer.train("bad-all", bad=(0, 1, 2, 3), sentinel={})
    trainer.train("halted", bad=(2,), sentinel={}, until=8 * STEP_TOKENS, note="halted first")
    trainer.train("halted", bad=(2,), sentinel={})


LAYOUTS = {
    "cut": FOUR_WAY,
    "interleaved": ["parallel={tensor: 2, pipeline: 2, virtual_pipeline: 2}"],
    "overlapped": ["parallel={tensor: 2, data: 2, overlap_grad_reduce: true, overlap_param_gather: true}"],
}


def four(trainer: Trainer) -> None:
    for name, layout in LAYOUTS.items():
        trainer.train(f"{name}-plain", *layout, until=4 * STEP_TOKENS)
        trainer.train(f"{name}-watched", *layout, sentinel={"action": "warn"}, until=4 * STEP_TOKENS)
        trainer.train(f"{name}-bad", *layout, bad=(2,), sentinel={}, until=4 * STEP_TOKENS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker = Trainer(Path(sys.argv[2]))
    {"single": single, "four": four}[sys.argv[1]](worker)
    rank = os.environ.get("RANK", "0")
    Path(sys.argv[3]).with_suffix(f".{rank}.json").write_text(json.dumps(worker.notes))
    dist.destroy_process_group()
