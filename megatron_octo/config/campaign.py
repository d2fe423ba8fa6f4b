"""A campaign: one file for the whole of OctoThinker, from data to report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.mixture import check_weights
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.run import BatchConfig, OptimizerConfig
from megatron_octo.units import Tokens

DIRECTORIES = {"data", "start", "stable", "hf", "rl", "eval", "report", "state", "logs", "stages", "progress"}
"""What a campaign directory holds besides its branches."""

_STAGES = {"convert", "evaluate-base", "evaluate-rl"}
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class Leg(Strict):
    """A part of the stable stage on one layout; the next leg goes on, resharded, from its checkpoint."""

    until: Tokens | None = Field(default=None, description="token position where it ends; the last leg runs to the end")
    parallel: ParallelConfig = ParallelConfig()


class TrainingConfig(Strict):
    """What the stable stage and all branches share."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    sequence_length: int = Field(gt=1)
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: Tokens = Field(gt=0)
    keep: int = Field(default=2, gt=0)


class StableConfig(Strict):
    """The stable stage: constant learning rate, one or more layouts in succession."""

    tokens: Tokens = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup: Tokens = 0
    mixture: dict[str, float] = Field(min_length=1, description="source -> share of packed sequences; they sum to 1")
    legs: list[Leg] = Field(default=[Leg()], min_length=1)

    @model_validator(mode="after")
    def _legs_in_order(self) -> StableConfig:
        ends = [leg.until for leg in self.legs[:-1]]
        if None in ends or sorted(set(ends)) != ends or (ends and ends[-1] >= self.tokens):
            raise ValueError("every leg but the last needs 'until', increasing and below 'tokens'")
        if self.legs[-1].until is not None:
            raise ValueError("the last leg runs to the end: remove its 'until'")
        return self


class BranchConfig(Strict):
    """A decay branch forked from the end of the stable stage: cosine from its learning rate."""

    tokens: Tokens = Field(gt=0)
    mixture: dict[str, float] = Field(min_length=1)
    parallel: ParallelConfig = ParallelConfig()
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    max_new_tokens: int = Field(gt=0, description="longest answer in RL and evaluation, tokens")


class CampaignEvaluation(Strict):
    """How each branch is measured before and after RL."""

    samples: int = Field(default=2, gt=0, description="samples a problem at temperature 1")
    batch_size: int = Field(default=300, gt=0, description="responses drawn together")
    threads: int | None = Field(default=None, gt=0, description="CPU threads; by default torch decides")


class CampaignStart(Strict):
    """Start from a Llama or Qwen in Hugging Face form instead of random weights (the model section must agree)."""

    hf: Path


class CampaignConfig(Strict):
    """The whole tree: data, stable stage, branches, RL, evaluation.

    `seed` and `template` hold for every stage; what a section says of its own is replaced by them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    seed: Seed = 0
    data: DataBuildConfig
    model: ModelConfig
    start: CampaignStart | None = None
    training: TrainingConfig
    stable: StableConfig
    branches: dict[str, BranchConfig] = Field(min_length=1)
    template: str = Field(default="world", description="prompt template of RL and evaluation")
    rl: RLConfig | None = None
    evaluation: CampaignEvaluation = CampaignEvaluation()

    @model_validator(mode="after")
    def _branch_names(self) -> CampaignConfig:
        for name in self.branches:
            if name in DIRECTORIES | _STAGES or re.fullmatch(r"stable-\d+", name):
                raise ValueError(f"a branch cannot be called {name!r}: the campaign itself uses that name")
            if not _BRANCH.fullmatch(name):
                raise ValueError(f"a branch cannot be called {name!r}: its name is of letters, digits, '_' and '-'")
        return self

    @model_validator(mode="after")
    def _problems_are_there(self) -> CampaignConfig:
        if self.data.problems.heldout is None:
            raise ValueError("data.problems.heldout is missing: the branches are evaluated on it")
        if self.rl is not None and self.data.problems.train is None:
            raise ValueError("data.problems.train is missing: RL draws its prompts from it")
        return self

    @model_validator(mode="after")
    def _mixtures_name_sources(self) -> CampaignConfig:
        mixtures = {"stable": self.stable.mixture, **{name: branch.mixture for name, branch in self.branches.items()}}
        for stage, mixture in mixtures.items():
            for source in mixture:
                if source not in self.data.sources:
                    raise ValueError(
                        f"{stage} mixes {source!r}; the sources of data are {', '.join(self.data.sources)}"
                    )
            try:
                check_weights(mixture)
            except ValueError as error:
                raise ValueError(f"{stage}.mixture: {error}") from None
        return self

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> CampaignConfig:
        train = self.data.tokenizer.train
        if train and train.vocabulary_size > self.model.vocabulary:
            raise ValueError(
                f"the tokenizer has {train.vocabulary_size} entries, model.vocabulary only {self.model.vocabulary} rows"
            )
        return self
