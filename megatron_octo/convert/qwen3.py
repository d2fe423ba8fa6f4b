"""Qwen3's table: Llama's with an RMSNorm of its own over each query head and each key head. Data only."""

from __future__ import annotations

from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.rules import Rename, Table

QWEN3: Table = (
    *LLAMA,
    Rename(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("dim",),
    ),
    Rename(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("dim",),
    ),
)
