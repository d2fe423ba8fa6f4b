"""A training run: model, layout, data, schedule, checkpoints. One file, one run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.units import Tokens

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


class ParallelConfig(Strict):
    """How many ways each dimension is split; data parallelism takes what is left of the processes."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int | None = Field(default=None, gt=1, description="model chunks per pipeline stage")
    context: int = Field(default=1, gt=0)
    data: int = Field(default=1, gt=0)
    sequence: bool = Field(default=False, description="sequence parallelism inside the tensor-parallel group")
    distributed_optimizer: bool = True

    @property
    def processes(self) -> int:
        """World size of the layout."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def label(self) -> str:
        """Short name for people: 'TP2 PP2 SP'."""
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context), ("DP", self.data))
        parts = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.virtual_pipeline:
            parts.append(f"VPP{self.virtual_pipeline}")
        return " ".join(parts + ["SP"] * self.sequence) or "single process"

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1: it splits what the tensor-parallel group replicates")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1")
        return self


class Source(Strict):
    """One indexed dataset of a mixture; weights are shares of packed sequences."""

    path: Path = Field(description="prefix of the .bin/.idx pair")
    weight: float = Field(gt=0, allow_inf_nan=False)


class DataConfig(Strict):
    """What is read: a weighted mixture of indexed datasets cut into windows of one length."""

    tokenizer: Path = Field(description="tokenizer directory in Hugging Face form")
    mixture: dict[str, Source] = Field(min_length=1)
    sequence_length: int = Field(gt=1)
    seed: Seed = 0


class BatchConfig(Strict):
    """Batch sizes in sequences."""

    global_batch: int = Field(gt=0, description="sequences per optimizer step, over all processes")
    micro_batch: int = Field(gt=0, description="sequences per forward pass of one data-parallel rank")


class ScheduleConfig(Strict):
    """Learning rate as a function of the token position inside this run."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    learning_rate: float = Field(gt=0)
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="last over first learning rate; not for constant")
    warmup: Tokens = 0
    tokens: Tokens = Field(gt=0, description="length of the run")

    @model_validator(mode="after")
    def _warmup_fits(self) -> ScheduleConfig:
        if self.warmup >= self.tokens:
            raise ValueError(f"warmup of {self.warmup} tokens does not end before the run's {self.tokens}")
        return self


class OptimizerConfig(Strict):
    """AdamW."""

    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0, description="global gradient norm")


class Fork(Strict):
    """A branch: the parent run, the token position it leaves from, and what it takes along."""

    parent: Path = Field(description="run directory of the parent")
    at: Tokens | None = Field(default=None, description="token position; the parent's latest checkpoint if not given")
    moments: bool = Field(default=True, description="carry Adam's moments")


class StartConfig(Strict):
    """Where the weights come from; nothing set means random initialisation."""

    checkpoint: Path | None = Field(default=None, description="sealed checkpoint, e.g. of `octo convert from-hf`")
    fork: Fork | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> StartConfig:
        if self.checkpoint and self.fork:
            raise ValueError("name either a checkpoint or a fork, not both")
        return self


class CheckpointConfig(Strict):
    """When to save and how many to keep."""

    every: Tokens = Field(gt=0)
    keep: int = Field(default=2, gt=0, description="newest sealed checkpoints kept")


class RunConfig(Strict):
    """Everything one training run is. Saved, resolved, beside its checkpoints."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    out: Path = Field(description="run directory")
    seed: Seed = 0
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    dtype: Literal["fp32", "bf16"] = "bf16"
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    start: StartConfig = StartConfig()
    checkpoint: CheckpointConfig
    threads: int | None = Field(default=None, gt=0, description="CPU threads per process; by default cores / processes")
    timeout_minutes: float = Field(default=10, gt=0, description="a collective that takes longer is a failure")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.global_batch * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: its tokens, rounded up to whole steps."""
        return -(-self.schedule.tokens // self.tokens_per_step)
