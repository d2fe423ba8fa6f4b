"""A training run: model, layout, data, schedule, checkpoints. One file, one run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.config.layout import ParallelConfig, RecomputeConfig
from megatron_octo.config.mixture import DataConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.observe import LoggingConfig, ValidationConfig
from megatron_octo.config.precision import Fp8Config
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.config.survive import CheckpointConfig, WatchConfig
from megatron_octo.units import Tokens


class BatchConfig(Strict):
    """Batch sizes in sequences."""

    global_batch: int = Field(gt=0, description="sequences per optimizer step, over all processes")
    micro_batch: int = Field(gt=0, description="sequences per forward pass of one data-parallel rank")


class OptimizerConfig(Strict):
    """AdamW."""

    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0, description="global gradient norm")
    implementation: Literal["auto", "transformer_engine", "apex", "torch"] = Field(
        default="auto", description="whose fused Adam; auto: TransformerEngine's, else NVIDIA apex's, else torch's"
    )


class Fork(Strict):
    """A branch: the parent run, the token position it leaves from, and what it takes along."""

    parent: Path = Field(description="run directory of the parent")
    at: Tokens | None = Field(default=None, description="token position; the parent's latest checkpoint if not given")
    moments: bool = Field(default=True, description="carry Adam's moments")
    data: Literal["fresh", "continue"] = Field(
        default="fresh",
        description="fresh: its own order from the start; continue: read on where the parent was, in its order",
    )


class StartConfig(Strict):
    """Where the weights come from; nothing set means random initialisation."""

    checkpoint: Path | None = Field(default=None, description="sealed checkpoint, e.g. of `octo convert from-hf`")
    fork: Fork | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> StartConfig:
        if self.checkpoint and self.fork:
            raise ValueError("name either a checkpoint or a fork, not both")
        return self


class RunConfig(Strict):
    """Everything one training run is. Saved, resolved, beside its checkpoints."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    out: Path = Field(description="run directory")
    seed: Seed = 0
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    dtype: Literal["fp32", "bf16"] = "bf16"
    fp8: Fp8Config | None = Field(default=None, description="matrix products of the layers in FP8; needs Hopper")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto", description="whose layers; auto: TransformerEngine's on a GPU, ours on a CPU"
    )
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    start: StartConfig = StartConfig()
    checkpoint: CheckpointConfig
    watch: WatchConfig = WatchConfig()
    validation: ValidationConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    threads: int | None = Field(default=None, gt=0, description="CPU threads per process; by default cores / processes")
    timeout_minutes: float = Field(
        default=10,
        gt=0,
        description="a rank that makes no progress in a step for so long is named and the run ends; in set-up, "
        "validation and save it has 3 times as long",
    )
    stop_grace_seconds: float = Field(
        default=30, gt=0, description="after SIGTERM: time to finish the step, save and end, before SIGKILL"
    )

    @model_validator(mode="after")
    def _rate_is_known(self) -> RunConfig:
        if self.schedule.learning_rate is None and self.start.fork is None:
            raise ValueError("schedule.learning_rate is missing; only a branch may leave it out and take its parent's")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.global_batch * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: its tokens, rounded up to whole steps."""
        return -(-self.schedule.tokens // self.tokens_per_step)
