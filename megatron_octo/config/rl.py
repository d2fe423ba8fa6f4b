"""A reinforcement stage: the algorithm in the recipe's own units (prompts, rollouts), the runs, where they run.

Defaults are OctoThinker's published values; what its paper leaves open follows Open-Reasoner-Zero or OpenRLHF's own
default, as each field says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.config.load import apply_overrides, merge, parse_config
from megatron_octo.errors import ConfigError


class LengthStage(Strict):
    """A stretch of rollouts with one cap on the response."""

    rollouts: int = Field(gt=0)
    max_response: int = Field(gt=0, description="tokens a response may have")


RECIPE_STAGES = (
    LengthStage(rollouts=100, max_response=2048),
    LengthStage(rollouts=60, max_response=4096),
    LengthStage(rollouts=40, max_response=8192),
)
"""OctoThinker's length schedule. The paper prints gradient updates (200, 320, 400); two of them make one rollout."""


class ActorConfig(Strict):
    """How the policy learns."""

    learning_rate: float = Field(default=1e-6, gt=0)
    eps_clip: float = Field(default=0.2, gt=0, lt=1, description="OpenRLHF's and verl's default; not published")
    entropy: float | None = Field(default=None, ge=0, description="coefficient; 0 only records the entropy")
    gradient_clip: float = Field(default=1.0, gt=0)


class CriticConfig(Strict):
    """How the value model of PPO learns (Open-Reasoner-Zero's values); GRPO has none."""

    learning_rate: float = Field(default=5e-6, gt=0)
    value_clip: float = Field(default=0.2, gt=0)
    warmup_rollouts: int = Field(default=0, ge=0, description="first rollouts in which the policy stands still")
    gradient_clip: float = Field(default=1.0, gt=0)


class PlacementConfig(Strict):
    """What a cluster gives the stage. The CPU twin ignores all of it: one process for each role."""

    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)
    engines: int = Field(default=8, gt=0, description="vLLM engines")
    engine_tensor: int = Field(default=1, gt=0, description="GPUs of one engine")
    colocate: bool = Field(default=True, description="policy, critic and engines share the GPUs and take turns")
    zero_stage: Literal[1, 2, 3] = 3
    adam_offload: bool = False
    packing: bool = Field(default=True, description="train on packed samples; needs flash attention")
    gradient_checkpointing: bool = True
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)

    @property
    def processes(self) -> int:
        """Data-parallel processes of the policy."""
        return self.nodes * self.gpus_per_node

    @model_validator(mode="after")
    def _engines_share(self) -> PlacementConfig:
        engines = self.engines * self.engine_tensor
        if self.colocate and engines != self.processes:
            raise ValueError(
                f"colocate: engines x engine_tensor = {engines} differs from nodes x gpus_per_node = {self.processes}"
            )
        return self


class RLConfig(Strict):
    """One reinforcement run, in prompts and rollouts."""

    algorithm: Literal["ppo", "grpo"] = Field(default="ppo", description="ppo: GAE with a critic; grpo: group norm")
    prompts: int = Field(default=128, gt=0, description="prompts of one rollout")
    samples: int = Field(default=16, gt=0, description="responses drawn for each prompt")
    mini_batch_prompts: int = Field(default=64, gt=0, description="prompts whose responses make one optimizer step")
    micro_batch: int = Field(default=4, gt=0, description="responses of one training pass of one process")
    rollout_micro_batch: int = Field(default=8, gt=0, description="responses of one scoring pass of one process")
    rollouts: int | None = Field(default=None, gt=0, description="length of the run, with max_response")
    max_response: int | None = Field(default=None, gt=0, description="tokens")
    length_stages: tuple[LengthStage, ...] | None = Field(default=None, min_length=1)
    max_prompt: int = Field(default=1024, gt=0, description="tokens; longer problems are left out")
    template: str = Field(default="octothinker-complex", description="a name megatron_octo.evaluate.prompts knows")
    bos: bool = Field(default=False, description="begin prompts with the BOS text; for models trained with one")
    require_stop: bool = Field(default=True, description="a response cut by the cap earns nothing")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="share of the optimizer steps")
    gamma: float = Field(default=1.0, gt=0, le=1)
    lambd: float = Field(default=1.0, ge=0, le=1)
    kl: float = Field(default=0.0, ge=0, description="KL coefficient; 0 loads no reference model")
    checkpoint_rollouts: int = Field(default=10, gt=0, description="rollouts between checkpoints")
    dtype: Literal["bf16", "fp16"] = Field(default="bf16", description="of a cluster; the CPU twin computes in fp32")
    seed: Seed = 0
    placement: PlacementConfig = PlacementConfig()

    @property
    def stages(self) -> tuple[LengthStage, ...]:
        """Length stages in order; the recipe's where the run names neither stages nor one length."""
        if self.length_stages:
            return self.length_stages
        if self.rollouts and self.max_response:
            return (LengthStage(rollouts=self.rollouts, max_response=self.max_response),)
        return RECIPE_STAGES

    @property
    def total_rollouts(self) -> int:
        """Rollouts of all length stages."""
        return sum(stage.rollouts for stage in self.stages)

    @property
    def train_batch(self) -> int:
        """Responses of one optimizer step: what OpenRLHF calls `train.batch_size`."""
        return self.mini_batch_prompts * self.samples

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps of one rollout."""
        return self.prompts // self.mini_batch_prompts

    @model_validator(mode="after")
    def _one_length(self) -> RLConfig:
        if (self.rollouts is None) != (self.max_response is None):
            raise ValueError("rollouts and max_response belong together: name both, or length_stages")
        if self.rollouts is not None and self.length_stages is not None:
            raise ValueError("name either rollouts with max_response, or length_stages, not both")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> RLConfig:
        if self.prompts % self.mini_batch_prompts:
            raise ValueError(
                f"mini_batch_prompts {self.mini_batch_prompts} does not divide prompts {self.prompts}: both count "
                "prompts of one rollout, and every rollout makes a whole number of optimizer steps"
            )
        if self.algorithm == "grpo" and self.samples == 1:
            raise ValueError("grpo with samples 1: a group of one has no advantage, nothing would be learnt")
        return self


class RLRun(Strict):
    """One branch of the stage."""

    model: Path = Field(description="converted model: Hugging Face directory with certificate.json")
    out: Path = Field(description="output directory of this run")
    problems: Path = Field(description="jsonl, one {id, question, answer} a line")
    overrides: dict[str, Any] = Field(default={}, description="fields of `rl` this run sets otherwise; dots allowed")


class RLStageConfig(Strict):
    """Several reinforcement runs, usually one a branch, with common settings."""

    rl: RLConfig = RLConfig()
    runs: dict[str, RLRun] = Field(min_length=1)
    target: Literal["cpu", "cluster"] = Field(default="cpu", description="cpu: OpenRLHF's CPU twin on this machine")
    max_parallel: int = Field(default=3, gt=0, description="runs at the same time on the CPU")
    timeout_minutes: float | None = Field(
        default=None,
        gt=0,
        description="the whole stage; longer is a failure; by default 60 on a CPU, no limit on a cluster",
    )

    @model_validator(mode="after")
    def _outputs_differ(self) -> RLStageConfig:
        if len({run.out for run in self.runs.values()}) < len(self.runs):
            raise ValueError("runs: two runs write to one directory")
        return self

    @property
    def timeout_seconds(self) -> float:
        """How long to wait; without end for a cluster whose file names no limit."""
        if self.timeout_minutes is None:
            return 3600.0 if self.target == "cpu" else math.inf
        return self.timeout_minutes * 60

    def resolved(self, label: str) -> RLConfig:
        """The settings of one run.

        Raises:
            ConfigError: its overrides break a rule or name an unknown field, or its batches do not fit the target.
        """
        dotted = [f"{key}={_as_yaml(value)}" for key, value in self.runs[label].overrides.items()]
        values = merge(self.rl.model_dump(exclude_unset=True), apply_overrides({}, dotted))
        config = parse_config(RLConfig, values, f"runs.{label}")
        if self.target == "cpu" and config.top_p != 1:
            raise ConfigError(
                f"runs.{label}: top_p = {config.top_p:g}", "the CPU twin draws from the whole distribution"
            )
        check_batches(config, 1 if self.target == "cpu" else config.placement.processes, f"runs.{label}")
        return config


def check_batches(config: RLConfig, processes: int, where: str) -> None:
    """Check that OpenRLHF can cut the batches evenly over `processes` data-parallel processes.

    Raises:
        ConfigError: the first size that does not divide.
    """
    share = config.micro_batch * processes
    if config.train_batch % share:
        raise ConfigError(
            f"{where}: {config.mini_batch_prompts} prompts x {config.samples} samples = {config.train_batch} responses "
            f"are not divisible by micro_batch {config.micro_batch} x {processes} processes = {share}",
            "every process runs the same number of training passes",
            "change micro_batch or mini_batch_prompts",
        )
    passes = config.prompts * config.samples // config.rollout_micro_batch
    if passes < processes:
        raise ConfigError(
            f"{where}: {config.prompts * config.samples} responses in scoring passes of {config.rollout_micro_batch} "
            f"make {passes} passes for {processes} processes",
            "every process needs at least one",
            "lower rollout_micro_batch",
        )


def _as_yaml(value: Any) -> str:
    import json

    return json.dumps(value)
