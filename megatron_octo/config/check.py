"""Rules between fields of a run: each is refused by name, with its numbers and the way out."""

from __future__ import annotations

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import VOCABULARY_MULTIPLE, ModelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError


def check_run(run: RunConfig) -> None:
    """Check every rule that spans several fields.

    Raises:
        ConfigError: the first rule broken.
    """
    check_layout(run.model, run.parallel)
    _check_batch(run)
    _check_lengths(run)


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that a model can be split as asked.

    Raises:
        ConfigError: a size that does not divide, or a setting megatron-core would run wrongly.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for name, size in (("heads", model.heads), ("kv_groups", model.kv_groups), ("ffn", model.ffn)):
        if size % tensor:
            raise ConfigError(
                f"parallel.tensor = {tensor} does not divide model.{name} = {size}",
                "each tensor-parallel rank holds an equal share",
                f"choose parallel.tensor among {_divisors(size)}",
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


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0][:12]
