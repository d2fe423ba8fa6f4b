"""Our configuration -> megatron-core's. The one module that knows its argument names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_octo.config.layout import NO_RECOMPUTE, ParallelConfig, RecomputeConfig
from megatron_octo.config.model import VOCABULARY_MULTIPLE, ModelConfig
from megatron_octo.config.run import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.transformer import TransformerConfig


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the embedding as trained: the next multiple of 128, whatever the layout.

    Independent of tensor parallelism, so that a checkpoint fits every layout. The added rows are zero
    and stay zero: their logits are masked out of the softmax (`model.layers.mask_padding`).
    """
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of "fp32" or "bf16"."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def have_transformer_engine() -> bool:
    """Whether the fused GPU layers can be used: a CUDA device and TransformerEngine."""
    import importlib.util

    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: str, recompute: RecomputeConfig = NO_RECOMPUTE
) -> TransformerConfig:
    """Translate a model and its layout.

    Losses are summed over tokens and divided by the global token count at the end of the step
    (`calculate_per_token_loss`), so a step's gradient does not depend on how the batch is cut.

    Args:
        model: sizes of the model.
        parallel: how it is split.
        dtype: "fp32" or "bf16", the type of parameters and activations.
        recompute: which activations are computed again in the backward pass.

    Returns:
        megatron-core's configuration. The trainer adds the functions that belong to a wrapped model (train.setup).
    """
    import torch
    from megatron.core.transformer import TransformerConfig

    fused = have_transformer_engine()
    return TransformerConfig(
        **_architecture(model),
        **_layout(parallel),
        **_recompute(recompute),
        params_dtype=torch_dtype(dtype),
        pipeline_dtype=torch_dtype(dtype),
        bf16=dtype == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        transformer_impl="transformer_engine" if fused else "local",
        calculate_per_token_loss=True,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        cross_entropy_loss_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _architecture(model: ModelConfig) -> dict:
    from torch.nn import functional

    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.dim,
        "ffn_hidden_size": model.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "activation_func": functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        # `model.initialise` fills every weight; these only let megatron-core set its own attributes.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "embedding_init_method": _leave,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _layout(parallel: ParallelConfig) -> dict:
    import torch

    layout = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        # Sent activations are freed early on CUDA, whose streams keep the order. gloo may still be sending
        # them: with a virtual pipeline the receiver got garbage and losses were off by 6e-2, without an error.
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
    }
    if parallel.virtual_pipeline:
        # Batched messages between two interleaved stages arrive in the wrong order without any error:
        # losses were off by 1e-2. megatron-core's own argument parser refuses it, its core does not.
        layout |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return layout


def _recompute(recompute: RecomputeConfig) -> dict:
    if recompute.kind == "none":
        return {}
    if recompute.kind == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.layers,
    }


def ddp_config(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """Translate what gradients need: reduced in fp32, sharded with the distributed optimizer, overlapped or not.

    With a virtual pipeline all stages gather weights at the same moments (`train.setup` gives the schedule the
    function for it): a stage that gathered on its own would hold up its neighbours.
    """
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather and parallel.virtual_pipeline is not None,
        check_for_nan_in_grad=True,
        average_in_collective=False,
    )


def optimizer_config(
    optimizer: OptimizerConfig, learning_rate: float, dtype: str, parallel: ParallelConfig
) -> MegatronOptimizerConfig:
    """Translate AdamW.

    Args:
        optimizer: our settings.
        learning_rate: the rate the optimizer starts with; the schedule sets it every step.
        dtype: "fp32" or "bf16"; with bf16 the main parameters and moments are kept in fp32.
        parallel: the layout, for the distributed optimizer.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=learning_rate,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip,
        bf16=dtype == "bf16",
        params_dtype=torch_dtype(dtype),
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
