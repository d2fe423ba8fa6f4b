"""Llama's table: every tensor of `LlamaForCausalLM` and of megatron-core's `GPTModel`, in forward order.

Data only. Names on the left are the keys of megatron-core's checkpoints, which are those of the TransformerEngine
layer spec (norms fused into the linear layer after them) whichever spec trained; on the right those of `transformers`.
"""

from __future__ import annotations

from megatron_octo.convert.rules import FusedQKV, GatedPair, Rename, Table, Tied, VocabPadded

LLAMA: Table = (
    VocabPadded("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Rename(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        "model.layers.{layer}.input_layernorm.weight",
        ("hidden",),
    ),
    FusedQKV(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        query="model.layers.{layer}.self_attn.q_proj.weight",
        key="model.layers.{layer}.self_attn.k_proj.weight",
        value="model.layers.{layer}.self_attn.v_proj.weight",
    ),
    Rename(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        ("hidden", "attention"),
    ),
    Rename(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("hidden",),
    ),
    GatedPair(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        gate="model.layers.{layer}.mlp.gate_proj.weight",
        up="model.layers.{layer}.mlp.up_proj.weight",
    ),
    Rename(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        ("hidden", "ffn"),
    ),
    Rename("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    Tied("output_layer.weight", "lm_head.weight"),
)
