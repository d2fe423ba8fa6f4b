"""An evaluation: which models answer which problems, and how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict

_LABEL = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")


class EvaluateConfig(Strict):
    """Several models, one way of asking; each model's result is one file of the output directory."""

    models: dict[str, Path] = Field(min_length=1, description="label -> Hugging Face directory")
    problems: Path | None = Field(default=None, description='jsonl file of {"id", "question", "answer"}')
    benchmarks: list[str] = Field(default=[], description="names of known benchmarks, read from benchmark_root")
    benchmark_root: Path | None = Field(default=None, description="directory with NAME/test.jsonl")
    limit: int | None = Field(default=None, gt=0, description="first N problems of each set")
    template: str = Field(default="world", description="prompt template by name")
    bos: bool = Field(default=False, description="begin prompts with the tokenizer's begin-of-text token")
    max_new_tokens: int | dict[str, int] = Field(default=1024, description="for all models, or by label")
    greedy: bool = Field(default=True, description="answer each problem once at temperature 0")
    samples: int = Field(default=0, ge=0, description="answers per problem at `temperature`, besides the greedy one")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    require_stop: bool = Field(default=True, description="a response cut by the length limit is not correct")
    batch_size: int = Field(default=128, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0, description="CPU threads; by default torch decides")
    seed: Seed = 0
    out: Path = Field(description="directory of the results")

    def tokens_for(self, label: str) -> int:
        """Longest response of a model, in tokens."""
        return self.max_new_tokens[label] if isinstance(self.max_new_tokens, dict) else self.max_new_tokens

    @model_validator(mode="after")
    def _complete(self) -> EvaluateConfig:
        if self.problems is None and not self.benchmarks:
            raise ValueError("nothing to ask: name a problems file or benchmarks")
        if self.benchmarks and self.benchmark_root is None:
            raise ValueError("benchmarks need benchmark_root, the directory their files are in")
        if not self.greedy and not self.samples:
            raise ValueError("greedy is false and samples is 0: no answer would be generated")
        for label in self.models:
            if not _LABEL.match(label):
                raise ValueError(f"model label {label!r} becomes a file name: use letters, digits, _ and -")
            if isinstance(self.max_new_tokens, dict) and label not in self.max_new_tokens:
                raise ValueError(f"max_new_tokens names no length for model '{label}'")
            if self.tokens_for(label) < 1:
                raise ValueError(f"max_new_tokens of model '{label}' must be at least 1")
        return self
