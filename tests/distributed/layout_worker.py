"""One rank of the layout tests: traces cases, and looks at what overlaps and what is recomputed.

Started by `launch` as `python -m layout_worker CASES.json OUT_DIR [overlap|recompute]`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny_layouts import case
from tiny_layouts import overlaps as both

import megatron_octo.train.loop  # noqa: F401  # first: it imports megatron-core the quick way
from megatron_octo.model.layers import CausalAttention
from megatron_octo.train import trace
from megatron_octo.train.forward import run_batches
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.step import train_step
from megatron_octo.train.tiny import Case


def overlap() -> dict[str, Any]:
    """Which messages are under way while layers compute, in the second step (the first one only counts gradients)."""
    return {
        "with": messages(case(parallel={"data": 2, **both})),
        "without": messages(case(parallel={"data": 2})),
        "other count": after_another_count(case(parallel={"data": 2, **both}, batch={"micro_batch": 1})),
    }


def messages(which: Case) -> dict[str, int]:
    """How often a layer began its forward, or ended its backward, while a gather, or a reduction, was under way."""
    seen: Counter[str] = Counter()
    with trace.training(which) as (engine, state):
        groups = state.chunks[0].bucket_groups

        def forward(*_: Any) -> None:
            seen["gather"] += any(group.param_gather_handle is not None for group in groups)

        def backward(*_: Any) -> None:
            seen["reduce"] += any(group.grad_reduce_handle is not None for group in groups)

        for layer in state.models[0].decoder.layers:
            layer.register_forward_pre_hook(forward)
            layer.register_full_backward_hook(backward)
        for _ in range(2):
            seen.clear()
            train_step(engine, state, Hooks([], state))
    return {"buckets": len(groups), "gather": seen["gather"], "reduce": seen["reduce"]}


def after_another_count(which: Case) -> list[dict[str, float]]:
    """Take steps after gradients of fewer micro-batches were computed and thrown away."""
    with trace.training(which) as (engine, state):
        run_batches(engine, state, engine.batches.of_step(0)[:1])
        facts = [train_step(engine, state, Hooks([], state)) for _ in range(which.steps)]
    return [{"loss": fact.loss, "norm": fact.grad_norm} for fact in facts]


def recompute() -> dict[str, dict[str, int]]:
    """How often attention and layers run in one step, by kind of recomputation."""
    kinds = {
        "none": {},
        "selective": {"kind": "selective"},
        "full": {"kind": "full", "layers": 2},
        "block": {"kind": "full", "method": "block", "layers": 3},
    }
    return {name: passes(case(batch={"micro_batch": 4}, recompute=kind)) for name, kind in kinds.items()}


def passes(which: Case) -> dict[str, int]:
    seen: Counter[str] = Counter()
    with trace.training(which) as (engine, state):
        for layer in state.models[0].decoder.layers:
            layer.register_forward_pre_hook(lambda *_: seen.update(["layer"]))
        for module in state.models[0].modules():
            if isinstance(module, CausalAttention):
                module.register_forward_pre_hook(lambda *_: seen.update(["attention"]))
        train_step(engine, state, Hooks([], state))
    return dict(seen)


def main() -> None:
    source, out, *looks = sys.argv[1:]
    trace.run_cases(Path(source), Path(out))
    for look in looks:
        found = {"overlap": overlap, "recompute": recompute}[look]()
        if dist.get_rank() == 0:
            (Path(out) / f"{look}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
