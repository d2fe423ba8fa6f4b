"""A run in FP8, small but of sizes FP8 accepts."""

from __future__ import annotations

from megatron_octo.config.run import RunConfig

RUN = {
    "name": "fp8",
    "out": "out",
    "model": {"layers": 8, "hidden": 256, "heads": 8, "kv_groups": 4, "ffn": 512, "vocabulary": 1000},
    "data": {"tokenizer": "tokenizer", "mixture": {"one": {"path": "one", "weight": 1}}, "sequence_length": 256},
    "batch": {"global_batch": 8, "micro_batch": 1},
    "schedule": {"learning_rate": 1e-3, "tokens": 10**6},
    "checkpoint": {"every": 10**5},
    "fp8": {},
}


def run(**changes: object) -> RunConfig:
    return RunConfig.model_validate({**RUN, **changes})
