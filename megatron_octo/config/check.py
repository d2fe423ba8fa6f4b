"""Rules between fields of a run: each is refused by name, with its numbers and the way out.

Two kinds: what cannot be split evenly, and what megatron-core 0.16.1 would take without a word and then ignore, or
run wrongly.
"""

from __future__ import annotations

import math

from megatron_octo.config.check_precision import check_precision
from megatron_octo.config.layout import ParallelConfig, RecomputeConfig
from megatron_octo.config.model import VOCABULARY_MULTIPLE, ModelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError


def check_run(run: RunConfig) -> None:
    """Check every rule that spans several fields.

    Raises:
        ConfigError: the first rule broken.
    """
    check_layout(run.model, run.parallel)
    _check_overlap(run)
    _check_recompute(run.model, run.parallel, run.recompute)
    _check_batch(run)
    _check_lengths(run)
    _check_phases(run)
    check_precision(run)


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that a model can be split as asked.

    Raises:
        ConfigError: a size that does not divide, or a setting megatron-core would run wrongly.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for name, size in (("heads", model.heads), ("ffn", model.ffn)):
        if size % tensor:
            raise ConfigError(
                f"parallel.tensor = {tensor} does not divide model.{name} = {size}",
                "each tensor-parallel rank holds an equal share",
                f"choose parallel.tensor among {_divisors(size)}",
            )
    if model.kv_groups % tensor and tensor % model.kv_groups:
        raise ConfigError(
            f"parallel.tensor = {tensor} is neither a divisor nor a multiple of model.kv_groups = {model.kv_groups}",
            "each tensor-parallel rank holds whole KV groups, or shares one with as many ranks as every other",
            f"choose parallel.tensor among {_divisors(math.gcd(model.heads, model.ffn))} that is one of the two",
        )
    kv_width = 2 * model.kv_groups * model.dim
    if kv_width % tensor:
        raise ConfigError(
            f"parallel.tensor = {tensor} does not divide the {kv_width} rows of keys and values "
            f"(2 x model.kv_groups {model.kv_groups} x head dimension {model.dim})",
            "query, key and value weights lie in one matrix, of which each tensor-parallel rank holds an equal share",
            f"choose parallel.tensor among {_divisors(math.gcd(model.heads, kv_width))}",
        )
    if VOCABULARY_MULTIPLE % tensor:
        raise ConfigError(
            f"parallel.tensor = {tensor} does not divide {VOCABULARY_MULTIPLE}",
            f"the embedding is padded to a multiple of {VOCABULARY_MULTIPLE} rows, and each rank holds an equal share",
            f"choose parallel.tensor among {_divisors(VOCABULARY_MULTIPLE)}",
        )
    chunks = pipeline * (parallel.virtual_pipeline or 1)
    if model.layers % chunks:
        raise ConfigError(
            f"parallel.pipeline x virtual_pipeline = {chunks} does not divide model.layers = {model.layers}",
            "each pipeline chunk holds an equal number of layers",
            f"choose a product among {_divisors(model.layers)}",
        )


def _check_overlap(run: RunConfig) -> None:
    parallel = run.parallel
    if parallel.overlap_param_gather:
        for name, why in (
            ("distributed_optimizer", "without it every rank updates all weights and there is nothing to gather"),
            ("overlap_grad_reduce", "only then weights lie in the several buckets that can be gathered one by one"),
        ):
            if not getattr(parallel, name):
                raise ConfigError(
                    f"parallel.overlap_param_gather needs parallel.{name}", why, f"set parallel.{name}: true"
                )
    if parallel.tp_comm_overlap and not (parallel.tensor > 1 and parallel.sequence):
        raise ConfigError(
            f"parallel.tp_comm_overlap with parallel.tensor = {parallel.tensor}, parallel.sequence = "
            f"{str(parallel.sequence).lower()}",
            "it overlaps the messages of sequence parallelism; other layouts have none of them",
            "set parallel.tensor above 1 and parallel.sequence: true, or leave it out",
        )
    if parallel.tp_comm_overlap and run.transformer_impl == "local":
        raise ConfigError(
            "parallel.tp_comm_overlap with transformer_impl = local",
            "TransformerEngine's layers overlap, ours do not: megatron-core would ignore the setting",
            "set transformer_impl: transformer_engine, or leave tp_comm_overlap out",
        )


def _check_recompute(model: ModelConfig, parallel: ParallelConfig, recompute: RecomputeConfig) -> None:
    unused = RecomputeConfig(kind=recompute.kind)
    if recompute.kind != "full" and recompute != unused:
        name = "method" if recompute.method != unused.method else "layers"
        raise ConfigError(
            f"recompute.{name} = {getattr(recompute, name)} with recompute.kind = {recompute.kind}",
            "only kind: full has a method and a number of layers",
            f"set recompute.kind: full, or remove recompute.{name}",
        )
    chunk = model.layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    if recompute.kind == "full" and recompute.layers > chunk:
        raise ConfigError(
            f"recompute.layers = {recompute.layers} is more than the {chunk} layers of a pipeline chunk",
            "layers are recomputed within the chunk that holds them",
            f"choose at most {chunk}",
        )
    if recompute.kind == "full" and recompute.method == "uniform" and chunk % recompute.layers:
        raise ConfigError(
            f"recompute.layers = {recompute.layers} does not divide the {chunk} layers of a pipeline chunk",
            "method: uniform cuts a chunk in equal groups of layers",
            f"choose among {_divisors(chunk)}, or method: block",
        )


def _check_batch(run: RunConfig) -> None:
    share = run.batch.micro_batch * run.parallel.data
    if run.batch.global_batch % share:
        raise ConfigError(
            f"batch.global_batch = {run.batch.global_batch} is not divisible by "
            f"micro_batch {run.batch.micro_batch} x data-parallel {run.parallel.data} = {share}",
            "every rank runs the same number of micro-batches",
            f"use a multiple of {share}",
        )
    count = run.batch.global_batch // share
    if run.parallel.virtual_pipeline and count % run.parallel.pipeline:
        raise ConfigError(
            f"{count} micro-batches per step is not divisible by parallel.pipeline = {run.parallel.pipeline}",
            "the interleaved schedule hands micro-batches round in groups of that size",
            "change batch.micro_batch or batch.global_batch",
        )


def _check_lengths(run: RunConfig) -> None:
    length, parallel = run.data.sequence_length, run.parallel
    if length > run.model.max_positions:
        raise ConfigError(
            f"data.sequence_length = {length} is longer than model.max_positions = {run.model.max_positions}",
            "positions beyond it have no defined rotation",
            "shorten the sequence",
        )
    pieces = parallel.context * 2 if parallel.context > 1 else 1
    pieces *= parallel.tensor if parallel.sequence else 1
    if length % pieces:
        raise ConfigError(
            f"data.sequence_length = {length} is not divisible by {pieces}",
            "context parallelism cuts it in 2 x CP pieces, sequence parallelism in TP more",
            f"use a multiple of {pieces}",
        )


def _check_phases(run: RunConfig) -> None:
    for number, phase in enumerate(run.data.phases or []):
        if phase.at >= run.schedule.tokens:
            raise ConfigError(
                f"data.phases.{number}.at = {phase.at} is not before the end, schedule.tokens = {run.schedule.tokens}",
                "a mixture that begins after the run is never read",
                "let it begin earlier, or leave it out",
            )


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0][:12]
