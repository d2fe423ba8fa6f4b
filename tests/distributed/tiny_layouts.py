"""The tiny model of the layout tests, and how one of its cases is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.config.load import merge
from megatron_octo.config.run import RunConfig
from megatron_octo.train.tiny import Case

BASE = {
    "name": "tiny",
    "out": "unused",
    "seed": 5,
    "dtype": "fp32",
    "model": {
        "layers": 4,
        "hidden": 64,
        "heads": 8,
        "kv_groups": 4,
        "ffn": 176,
        "vocabulary": 200,
        "rope_scaling": {"factor": 8},
    },
    "data": {"tokenizer": "unused", "mixture": {"unused": {"path": "unused", "weight": 1}}, "sequence_length": 32},
    "batch": {"global_batch": 8, "micro_batch": 2},
    # Adam divides a gradient by its own size: with the usual 1e-8 a rounding error in a gradient near zero becomes a
    # whole step, and layouts drift apart by 1e-6 a step for no fault of their own.
    "optimizer": {"epsilon": 1e-6},
    "schedule": {"learning_rate": 2e-3, "tokens": "1M"},
    "checkpoint": {"every": "1M"},
    "timeout_minutes": 1,
}
STEPS = 3
BUCKET = 20_000
"""Parameters of a bucket: the tiny model fills about ten, so that there is something to overlap."""

reduces = {"overlap_grad_reduce": True}
overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def case(steps: int = STEPS, **over: Any) -> Case:
    """A case that differs from `BASE` in the given sections."""
    return Case(RunConfig.model_validate(merge(BASE, over)), steps, BUCKET)


def _reshard(nproc: int, kind: str = "fp32", **parallel: Any) -> dict[str, Any]:
    return {"nproc": nproc, "kind": kind, "parallel": parallel}


_VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2, "data": 2}
RESHARDED = {
    "single": _reshard(1),
    "TP2 SP": _reshard(2, tensor=2, sequence=True),
    "DP2 overlapped": _reshard(2, data=2, **overlaps),
    "TP2 PP2 SP": _reshard(4, tensor=2, pipeline=2, sequence=True),
    "PP2 VPP2 DP2 overlapped": _reshard(4, **_VIRTUAL, **overlaps),
    "CP2 TP2": _reshard(4, context=2, tensor=2),
    "single bf16": _reshard(1, "bf16"),
    "PP2 VPP2 DP2 bf16": _reshard(4, "bf16", **_VIRTUAL, **overlaps),
    "TP2 plain": _reshard(2, "plain", tensor=2, distributed_optimizer=False),
    "PP2 plain": _reshard(2, "plain", pipeline=2, distributed_optimizer=False),
}
"""Layouts of the resharding tests, by kind: checkpoints of different kinds hold other tensors."""


def _pairs() -> list[tuple[str, str]]:
    """Each layout's checkpoint goes into the next two of its kind: every layout is written and read twice."""
    pairs = []
    for source, values in RESHARDED.items():
        kin = [name for name in RESHARDED if RESHARDED[name]["kind"] == values["kind"]]
        after = kin[kin.index(source) + 1 :] + kin[: kin.index(source)]
        pairs += [(source, name) for name in after[:2]]
    return pairs


PAIRS = _pairs()
"""Which checkpoint is loaded in which layout."""


def reshard_case(name: str, folder: Path) -> Case:
    """The case of one of `RESHARDED`, whose run directory lies in `folder`."""
    values = RESHARDED[name]
    return case(
        out=str(folder / name),
        parallel=values["parallel"],
        dtype="bf16" if values["kind"] == "bf16" else "fp32",
        # With TP2 both ranks share the one KV group.
        model={"hidden": 32, "heads": 4, "kv_groups": 1, "ffn": 96, "vocabulary": 100},
        data={"sequence_length": 16},
        batch={"global_batch": 4, "micro_batch": 1},
    )._replace(bucket=8_000)
