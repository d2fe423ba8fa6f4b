"""Our configuration -> megatron-core's. The one module that knows its argument names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_octo.config.layout import NO_RECOMPUTE, ParallelConfig, RecomputeConfig
from megatron_octo.config.model import VOCABULARY_MULTIPLE, ModelConfig
from megatron_octo.config.precision import Fp8Config
from megatron_octo.config.run import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.transformer import TransformerConfig


class Kernels(NamedTuple):
    """Whose layers compute, and what of them in FP8.

    Args:
        layers: our local ones, or TransformerEngine's fused ones (on a GPU; `runtime.accelerator` knows whether).
        fp8: the recipe, with TransformerEngine's layers only.
    """

    layers: Literal["local", "transformer_engine"] = "local"
    fp8: Fp8Config | None = None

    @property
    def fused(self) -> bool:
        """Whether TransformerEngine's layers and fused operations are used."""
        return self.layers == "transformer_engine"


LOCAL = Kernels()


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


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: str,
    recompute: RecomputeConfig = NO_RECOMPUTE,
    kernels: Kernels = LOCAL,
) -> TransformerConfig:
    """Translate a model and its layout.

    Losses are summed over tokens and divided by the global token count at the end of the step
    (`calculate_per_token_loss`), so a step's gradient does not depend on how the batch is cut.

    Args:
        model: sizes of the model.
        parallel: how it is split.
        dtype: "fp32" or "bf16", the type of parameters and activations.
        recompute: which activations are computed again in the backward pass.
        kernels: whose layers, and FP8.

    Returns:
        megatron-core's configuration. The trainer adds the functions that belong to a wrapped model (train.setup).
    """
    import torch
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        **_architecture(model),
        **_layout(parallel),
        **_recompute(recompute),
        **_fp8(kernels.fp8),
        params_dtype=torch_dtype(dtype),
        pipeline_dtype=torch_dtype(dtype),
        bf16=dtype == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        transformer_impl=kernels.layers,
        calculate_per_token_loss=True,
        bias_activation_fusion=kernels.fused,
        # The activation that the layer's specification names: ours, see model.build.
        use_te_activation_func=not kernels.fused,
        bias_dropout_fusion=kernels.fused,
        apply_rope_fusion=kernels.fused,
        cross_entropy_loss_fusion=kernels.fused,
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
        "tp_comm_overlap": parallel.tp_comm_overlap,
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


def _fp8(fp8: Fp8Config | None) -> dict:
    """FP8 as megatron-core's layers read it; what it would leave unread is refused in `config.check_precision`."""
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax,
        "fp8_wgrad": fp8.wgrad,
        "fp8_param": fp8.parameters,
        "fp8_dot_product_attention": fp8.attention,
        "first_last_layers_bf16": fp8.bf16_first_layers + fp8.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }


def ddp_config(parallel: ParallelConfig, fp8: Fp8Config | None = None) -> DistributedDataParallelConfig:
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
        fp8_param_gather=fp8 is not None and fp8.parameters,
    )


def optimizer_config(
    optimizer: OptimizerConfig,
    learning_rate: float,
    dtype: str,
    parallel: ParallelConfig,
    fp8: Fp8Config | None = None,
) -> MegatronOptimizerConfig:
    """Translate AdamW.

    Args:
        optimizer: our settings.
        learning_rate: the rate the optimizer starts with; the schedule sets it every step.
        dtype: "fp32" or "bf16"; with bf16 the main parameters and moments are kept in fp32.
        parallel: the layout, for the distributed optimizer.
        fp8: its recipe, by which the distributed optimizer keeps and casts weights.
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
        fp8_recipe=None if fp8 is None else fp8.recipe,
    )
