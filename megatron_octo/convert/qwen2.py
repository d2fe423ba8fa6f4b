"""Qwen2's table (and Qwen2.5's): Llama's with a bias on query, key and value. Data only."""

from __future__ import annotations

from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.rules import FusedQKV, Table

QWEN2: Table = (
    *LLAMA,
    FusedQKV(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        query="model.layers.{layer}.self_attn.q_proj.bias",
        key="model.layers.{layer}.self_attn.k_proj.bias",
        value="model.layers.{layer}.self_attn.v_proj.bias",
        axes=(),
    ),
)
