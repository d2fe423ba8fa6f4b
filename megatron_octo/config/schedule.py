"""The schedule: the learning rate as a function of the token position inside a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict
from megatron_octo.units import Tokens

Shape = Literal["cosine", "linear", "1-sqrt"]


class ScheduleConfig(Strict):
    """Learning rate as a function of the token position inside this run.

    The warm-up is a line from zero to the peak. After it `constant` stays there; `cosine`, `linear` and `1-sqrt` decay
    to the end of the run; `wsd` (warm-up, stable, decay) stays, and decays over its last `decay` tokens.
    """

    kind: Literal["constant", "wsd", "cosine", "linear", "1-sqrt"] = "constant"
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak; only a branch may leave it out, and starts with its parent's rate"
    )
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="last rate over peak; not for constant")
    warmup: Tokens = 0
    decay: Tokens | None = Field(default=None, gt=0, description="length of the decay at the end; wsd only")
    shape: Shape | None = Field(default=None, description="of the decay; wsd only, 1-sqrt if not given")
    tokens: Tokens = Field(gt=0, description="length of the run")

    @model_validator(mode="after")
    def _warmup_fits(self) -> ScheduleConfig:
        if self.warmup >= self.tokens:
            raise ValueError(f"warmup of {self.warmup} tokens does not end before the run's {self.tokens}")
        return self

    @model_validator(mode="after")
    def _decay_fits(self) -> ScheduleConfig:
        if self.kind != "wsd":
            if self.decay is not None or self.shape is not None:
                field = "shape" if self.decay is None else "decay"
                raise ValueError(f"{field} is for kind: wsd; {self.kind} has no decay of its own length and shape")
            return self
        if self.decay is None:
            raise ValueError("wsd needs decay, the tokens at its end over which the rate falls")
        if self.decay > self.tokens:
            raise ValueError(f"decay of {self.decay} tokens is longer than the run's {self.tokens}")
        if self.tokens - self.decay < self.warmup:
            raise ValueError(
                f"decay of {self.decay} tokens would start at {self.tokens - self.decay}, "
                f"before the warm-up ends at {self.warmup}"
            )
        return self
