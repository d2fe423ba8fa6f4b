"""The model: a decoder-only transformer of one family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_octo.config.base import Strict

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding are padded to a multiple of it, in every layout: tensor parallelism must divide it."""


class RopeScaling(Strict):
    """Llama 3's frequency-dependent RoPE scaling.

    megatron-core 0.16.1 fixes every value but the factor (low 1, high 4, original context 8192), so
    other values are refused here and not dropped on the way.
    """

    factor: float = Field(gt=0)
    low_freq_factor: Literal[1.0] = 1.0
    high_freq_factor: Literal[4.0] = 4.0
    original_max_position_embeddings: Literal[8192] = 8192


class ModelConfig(Strict):
    """A decoder-only transformer of one family.

    All have RMSNorm, SwiGLU, grouped queries and RoPE. Qwen2 (and Qwen2.5) adds biases to query, key and value;
    Qwen3 adds a norm over each query head and each key head.
    """

    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    layers: int = Field(gt=0, le=1000)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_groups: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0, description="hidden / heads when not given")
    ffn: int = Field(gt=0)
    vocabulary: int = Field(gt=0, description="rows of the embedding as published, without Megatron's padding")
    tied_embeddings: bool = True
    rope_theta: float = Field(default=500_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    max_positions: int = Field(default=131_072, gt=0)

    @property
    def dim(self) -> int:
        """Dimension of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have biases; no other projection has one."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each query head and each key head is normalised before it is rotated."""
        return self.family == "qwen3"

    @field_validator("head_dim")
    @classmethod
    def _derived_is_not_stated(cls, head_dim: int | None, info: ValidationInfo) -> int | None:
        """One value for one model: None where hidden / heads says it, so that equal models compare equal."""
        hidden, heads = info.data.get("hidden"), info.data.get("heads")
        return None if head_dim and hidden and heads and head_dim * heads == hidden else head_dim

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.hidden % self.heads and (self.head_dim is None or self.family == "llama"):
            # transformers refuses such a Llama even where the head dimension is given.
            raise ValueError(f"hidden {self.hidden} is not divisible by heads {self.heads}")
        if self.heads % self.kv_groups:
            raise ValueError(f"heads {self.heads} is not divisible by kv_groups {self.kv_groups}")
        if self.dim % 2:
            raise ValueError(f"head dimension {self.dim} is odd: RoPE rotates pairs")
        return self
