"""The schedule: the learning rate as a function of the token position inside a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict
from megatron_octo.units import Tokens


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
