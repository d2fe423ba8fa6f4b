"""A run at tiny width: the same layout, family and precision in a model that trains on any machine in seconds."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_octo.config.layout import ParallelConfig, RecomputeConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import BatchConfig, RunConfig
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.config.survive import CheckpointConfig, WatchConfig

BUCKET = 10_000
"""Parameters that are reduced together where reduction overlaps: a tiny model fills several of these."""

_HIDDEN, _HEAD, _FFN, _VOCABULARY, _LENGTH, _DATA = 64, 8, 128, 200, 32, 2
_RATE = 2e-3
_EPSILON = 1e-6
_FOR_EVER = 10**12


class Case(NamedTuple):
    """A few steps of a run on made-up data (`train.trace`).

    Args:
        run: model, layout, precision, batch sizes, optimizer and seed; its data and directory are not used.
        steps: optimizer steps.
        bucket: parameters that are reduced together where reduction overlaps; None for megatron-core's default.
        nudge: move each initial weight to a neighbouring number, up or down as this seed says; None leaves them.
    """

    run: RunConfig
    steps: int
    bucket: int | None = BUCKET
    nudge: int | None = None

    def dump(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self._asdict(), "run": self.run.model_dump(mode="json")}

    @classmethod
    def load(cls, values: dict[str, Any]) -> Case:
        """Read what `dump` gave."""
        return cls(**{**values, "run": RunConfig.model_validate(values["run"])})


def shrink(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """Make a run tiny and keep what its layout is: TP, PP, VPP, CP, SP, overlaps, recomputation, ties, dtype, family.

    Returns:
        The tiny run, and what of the run it leaves out, a sentence each.
    """
    parallel = run.parallel.model_copy(update={"data": min(run.parallel.data, _DATA), "tp_comm_overlap": False})
    model, recompute = _model(run.model, parallel, run.recompute)
    unit = parallel.context * 2 * (parallel.tensor if parallel.sequence else 1)
    length = unit * -(-_LENGTH // unit)
    tiny = run.model_copy(
        update={
            "model": model,
            "parallel": parallel,
            "recompute": recompute,
            "batch": _batch(run, parallel),
            "data": run.data.model_copy(update={"sequence_length": length}),
            "schedule": ScheduleConfig(learning_rate=_RATE, tokens=_FOR_EVER),
            # A rounding error in a gradient near zero becomes a whole step where Adam's epsilon is as small.
            "optimizer": run.optimizer.model_copy(update={"epsilon": max(run.optimizer.epsilon, _EPSILON)}),
            "checkpoint": CheckpointConfig(every=_FOR_EVER),
            "watch": WatchConfig(),
            "validation": None,
            "fp8": None,
            "transformer_impl": "local",
        }
    )
    return tiny, _left_out(run, tiny)


def _model(
    model: ModelConfig, parallel: ParallelConfig, recompute: RecomputeConfig
) -> tuple[ModelConfig, RecomputeConfig]:
    """At most two layers a chunk; KV groups and heads stand to tensor parallelism and to each other as they did."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    layers = min(model.layers // chunks, 2)
    groups = min(model.kv_groups, parallel.tensor)
    heads = groups if model.heads == model.kv_groups else 2 * parallel.tensor
    sizes = {
        "layers": chunks * layers,
        "hidden": heads * -(-_HIDDEN // heads),
        "heads": heads,
        "kv_groups": groups,
        "head_dim": _HEAD,
        "ffn": parallel.tensor * -(-_FFN // parallel.tensor),
        "vocabulary": min(model.vocabulary, _VOCABULARY),
        "max_positions": max(model.max_positions, parallel.context * 2 * parallel.tensor * _LENGTH),
    }
    smaller = ModelConfig.model_validate({**model.model_dump(), **sizes})
    return smaller, recompute.model_copy(update={"layers": min(recompute.layers, layers)})


def _batch(run: RunConfig, parallel: ParallelConfig) -> BatchConfig:
    """As many micro-batches as fill the pipeline twice, where the run has them."""
    count = run.batch.global_batch // (run.batch.micro_batch * run.parallel.data)
    micro = min(run.batch.micro_batch, 2)
    return BatchConfig(global_batch=min(count, 2 * parallel.pipeline) * micro * parallel.data, micro_batch=micro)


def _left_out(run: RunConfig, tiny: RunConfig) -> list[str]:
    notes = []
    if run.parallel.data > tiny.parallel.data:
        notes.append(f"data parallelism {run.parallel.data} is checked as {tiny.parallel.data}")
    if run.fp8 is not None:
        notes.append(f"FP8 needs a GPU: checked in {run.dtype} without it")
    if run.parallel.tp_comm_overlap:
        notes.append("tp_comm_overlap needs TransformerEngine and a GPU: checked without it")
    return notes
