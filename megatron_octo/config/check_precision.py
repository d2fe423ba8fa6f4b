"""Rules of FP8 and of TransformerEngine's layers that need no machine to be checked.

megatron-core 0.16.1 and TransformerEngine 2.11 leave some settings unread without a word (each rule says which), and
stop at others only in the first forward pass. Here each is refused before a process starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_octo.config.precision import Fp8Config
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError

_BLOCK = 128  # TransformerEngine's Float8BlockQuantizer: a block of 1 x 128, or 128 x 128 of weights
_MULTIPLE = 16  # of both dimensions of an FP8 matrix product
_DELAYED_ONLY = ("margin", "amax_history", "amax")


def check_precision(run: RunConfig) -> None:
    """Check what FP8 and TransformerEngine's layers ask of the other fields.

    Raises:
        ConfigError: the first rule broken.
    """
    _check_overlap(run)
    if run.fp8 is not None:
        _check_surroundings(run, run.fp8)
        _check_recipe(run.fp8)
        _check_bf16_layers(run, run.fp8)
        _check_shapes(run, run.fp8)


def _check_overlap(run: RunConfig) -> None:
    if not run.parallel.tp_comm_overlap:
        return
    asked = "parallel.tp_comm_overlap is set"
    if run.fp8 is not None and run.fp8.recipe == "blockwise":
        raise ConfigError(
            f"{asked} and fp8.recipe is blockwise",
            "TransformerEngine's overlap buffers hold no block-scaled tensors",
            "use fp8.recipe tensorwise or delayed, or remove tp_comm_overlap",
        )


def _check_surroundings(run: RunConfig, fp8: Fp8Config) -> None:
    if run.dtype != "bf16":
        raise ConfigError(
            f"fp8 is set and dtype is {run.dtype}", "what is not in FP8 is computed in BF16", "set dtype to bf16"
        )
    if run.transformer_impl == "local":
        raise ConfigError(
            "fp8 is set and transformer_impl is local",
            "FP8 is part of TransformerEngine's layers; the local ones would train in BF16 without a word",
            "set transformer_impl to transformer_engine, or remove fp8",
        )
    if fp8.parameters and not run.parallel.distributed_optimizer:
        raise ConfigError(
            "fp8.parameters is set without parallel.distributed_optimizer",
            "only the distributed optimizer keeps full weights beside those in FP8",
            "set parallel.distributed_optimizer, or remove fp8.parameters",
        )


def _check_recipe(fp8: Fp8Config) -> None:
    if fp8.recipe != "delayed":
        for name in _DELAYED_ONLY:
            default = Fp8Config.model_fields[name].default
            if getattr(fp8, name) != default:
                raise ConfigError(
                    f"fp8.{name} = {getattr(fp8, name)} with fp8.recipe = {fp8.recipe}",
                    "only the delayed recipe scales by past maxima; megatron-core would leave it unread",
                    f"remove fp8.{name}, or set fp8.recipe to delayed",
                )
    if not fp8.wgrad:
        raise ConfigError(
            "fp8.wgrad = false",
            "megatron-core hands it to TransformerEngine, which since version 2 drops it: weight gradients would be "
            "in FP8 all the same",
            "remove fp8.wgrad, or keep layers in BF16 (fp8.bf16_first_layers, fp8.bf16_last_layers)",
        )
    if fp8.attention and fp8.recipe == "blockwise":
        raise ConfigError(
            "fp8.attention is set and fp8.recipe is blockwise",
            "TransformerEngine has no FP8 attention for block scales; megatron-core would compute it in BF16",
            "use fp8.recipe tensorwise or delayed, or remove fp8.attention",
        )


def _check_bf16_layers(run: RunConfig, fp8: Fp8Config) -> None:
    kept = {name: getattr(fp8, name) for name in ("bf16_first_layers", "bf16_last_layers")}
    if not any(kept.values()):
        return
    if fp8.recipe == "delayed":
        raise ConfigError(
            "fp8.bf16_first_layers or bf16_last_layers with fp8.recipe = delayed",
            "megatron-core gathers the delayed recipe's maxima once over all layers and refuses to leave some out",
            "use fp8.recipe tensorwise or blockwise",
        )
    stage = run.model.layers // run.parallel.pipeline
    for name, count in kept.items():
        if count > stage:
            raise ConfigError(
                f"fp8.{name} = {count} is more than the {stage} layers of a pipeline stage",
                "megatron-core keeps BF16 layers inside the first and the last stage",
                f"use at most {stage}, or fewer stages",
            )
    if sum(kept.values()) >= run.model.layers:
        raise ConfigError(
            f"fp8 keeps {sum(kept.values())} of {run.model.layers} layers in BF16",
            "no layer would be left in FP8",
            "lower fp8.bf16_first_layers or bf16_last_layers, or remove fp8",
        )


def _check_shapes(run: RunConfig, fp8: Fp8Config) -> None:
    gathered = run.parallel.sequence and fp8.recipe == "blockwise"
    for name, size, multiple in _sizes(run, _BLOCK if gathered else _MULTIPLE):
        if size % multiple:
            raise ConfigError(
                f"{name} = {size} is not divisible by {multiple}",
                "the sides of an FP8 matrix product are multiples of 16; of 128 where sequence parallelism gathers "
                "block-scaled activations",
                "change it, or remove fp8",
            )


def _sizes(run: RunConfig, activations: int) -> Iterator[tuple[str, int, int]]:
    """What a rank multiplies: name, size, and of what it must be a multiple."""
    model, parallel = run.model, run.parallel
    pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
    tokens = run.batch.micro_batch * run.data.sequence_length // pieces
    yield "batch.micro_batch x data.sequence_length per rank", tokens, activations
    yield "model.hidden", model.hidden, activations
    yield "model.ffn / parallel.tensor", model.ffn // parallel.tensor, _MULTIPLE
    heads = model.dim * model.heads // parallel.tensor
    yield "attention width (heads x head_dim / parallel.tensor)", heads, _MULTIPLE
    # Also with more ranks than KV groups: megatron-core splits the product evenly and gathers what it gives.
    width = model.dim * (model.heads + 2 * model.kv_groups) // parallel.tensor
    yield "query, key and value width / parallel.tensor", width, _MULTIPLE
