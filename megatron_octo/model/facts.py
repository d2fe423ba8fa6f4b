"""What a model costs: parameters and floating-point operations, from its configuration alone."""

from __future__ import annotations

from megatron_octo.config.model import ModelConfig

FLOPS_CONVENTION = "6 per matrix weight, attention counted causal, no recompute"
"""What `flops_per_token` counts, in a line for people."""


def parameter_count(model: ModelConfig) -> int:
    """Parameters as published: without padded vocabulary rows, tied embeddings counted once."""
    embeddings = model.vocabulary * model.hidden * (1 if model.tied_embeddings else 2)
    return embeddings + model.hidden + model.layers * (_layer_matrices(model) + _layer_vectors(model))


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations per trained token, forward and backward.

    Counted are the matrix products, a multiply-add as two, the backward pass as twice the forward
    (so 6 per weight), the output layer included and the embedding look-up not. Attention is counted
    as causal: a token meets (s + 1) / 2 keys on average, half of what the usual 12 l n d s assumes.
    Recomputation is not counted (these are the FLOPs of the model, as in the MFU of PaLM, appendix B).

    Args:
        model: sizes of the model.
        sequence_length: s, tokens of a training sequence.
    """
    weights = model.layers * _layer_matrices(model) + model.vocabulary * model.hidden
    keys = (sequence_length + 1) / 2
    attention = 2 * 2 * model.layers * model.heads * model.dim * keys
    return 6.0 * weights + 3.0 * attention


def _layer_matrices(model: ModelConfig) -> int:
    """Weights of one layer's matrices: q, k, v; output; gate, up, down."""
    attention = model.hidden * model.dim * (2 * model.heads + 2 * model.kv_groups)
    return attention + 3 * model.hidden * model.ffn


def _layer_vectors(model: ModelConfig) -> int:
    """Weights of one layer that are no matrices: its two norms, and what the family adds."""
    biases = model.dim * (model.heads + 2 * model.kv_groups) if model.qkv_bias else 0
    head_norms = 2 * model.dim if model.qk_norm else 0
    return 2 * model.hidden + biases + head_norms
