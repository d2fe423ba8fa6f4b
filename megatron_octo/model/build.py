"""Build the model, or one pipeline chunk of it, as megatron-core's GPTModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_octo.config.layout import NO_RECOMPUTE, ParallelConfig, RecomputeConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.model.initialise import initialise
from megatron_octo.model.translate import LOCAL, Kernels, padded_vocabulary, transformer_config

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import ModuleSpec, TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def build_gpt(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: str,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    seed: int | None = 0,
    recompute: RecomputeConfig = NO_RECOMPUTE,
    kernels: Kernels = LOCAL,
) -> GPTModel:
    """Build one pipeline chunk with initial weights that do not depend on the layout.

    Process groups must exist (`runtime.groups`). The output layer keeps padded vocabulary columns out
    of the softmax, so losses and probabilities are those of the unpadded model.

    Args:
        model: sizes of the model.
        parallel: how it is split.
        dtype: "fp32" or "bf16".
        pre_process: this chunk holds the embedding.
        post_process: this chunk holds the final norm and the output layer.
        vp_stage: index of the chunk on its stage, with a virtual pipeline.
        seed: of the initial weights; None leaves them zero, for a caller that loads all of them.
        recompute: which activations are computed again in the backward pass.
        kernels: whose layers, and FP8.

    Returns:
        A GPTModel that takes (tokens [b, s], positions [b, s], None, labels=[b, s]) and gives the
        loss of each token [b, s], or the logits [b, s, padded v / TP] without labels.
    """
    from megatron.core.models.gpt import GPTModel

    config = transformer_config(model, parallel, dtype, recompute, kernels)
    chunk = GPTModel(
        config,
        _block_spec(config, vp_stage),
        padded_vocabulary(model.vocabulary),
        model.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
        vp_stage=vp_stage,
    )
    if post_process:
        from megatron_octo.model.layers import mask_padding

        mask_padding(chunk.output_layer, model.vocabulary)
    initialise(chunk, model, seed)
    return chunk


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: str,
    seed: int | None = 0,
    recompute: RecomputeConfig = NO_RECOMPUTE,
    kernels: Kernels = LOCAL,
) -> list[GPTModel]:
    """Build every chunk of this rank: one, or `virtual_pipeline` of them.

    Returns:
        The chunks in the order of their stages, as megatron-core's schedules take them.
    """
    from megatron.core import parallel_state

    def build(stage: int | None) -> GPTModel:
        place = {"ignore_virtual": False, "vp_stage": stage}
        return build_gpt(
            model,
            parallel,
            dtype,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
            seed=seed,
            recompute=recompute,
            kernels=kernels,
        )

    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    return [build(stage) for stage in stages]


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    if config.transformer_impl == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from megatron_octo.model.layers import RMSNorm

    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[_local_layer_spec(config)] * count, layer_norm=RMSNorm)


def _local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's local layer with parts of our own; checkpoint keys stay those of TransformerEngine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_octo.model.layers import CausalAttention, RMSNorm, SelfAttention
    from megatron_octo.model.pointwise import swiglu

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp.submodules.activation_func = swiglu
    spec.submodules.self_attention.module = SelfAttention
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
