"""Checkpoints, and what happens to a step whose numbers are bad."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict
from megatron_octo.units import Tokens


class CheckpointConfig(Strict):
    """When to save and how many to keep. Checkpoints that branches left from are kept in any case."""

    every: Tokens = Field(gt=0)
    keep: int = Field(default=2, gt=0, description="newest sealed checkpoints kept")
    keep_every: Tokens | None = Field(
        default=None, gt=0, description="beside them, the first checkpoint at or after each multiple is kept for ever"
    )
    asynchronous: bool = Field(default=False, description="write while training goes on")


class WatchConfig(Strict):
    """What to do about a loss or gradient that is not a finite number, and about a spike.

    skip: the step's batch is passed over, weights and moments stay. rewind: back to the last sealed checkpoint, and the
    batches around this step are passed over when it comes again; without a checkpoint the run stops. stop: end with an
    error; the last checkpoint stays. Statistics hold good steps only; a spike needs 8 of them before it.
    """

    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    spike: Literal["ignore", "skip", "rewind", "stop"] = "ignore"
    sigma: float = Field(
        default=6.0,
        gt=0,
        description="a spike lies this many standard deviations above the mean, more while few steps are known",
    )
    window: int = Field(default=128, ge=8, description="good steps that mean and deviation are taken over")
    patience: int = Field(default=3, gt=0, description="bad steps in a row after which the run stops")
    rewind_skip: int = Field(default=1, gt=0, description="batches passed over after a rewind, the bad one the last")
    weights_every: int | None = Field(
        default=None,
        gt=0,
        description="steps between checks that only the optimizer changed weights, on all replicas; a changed bit "
        "rewinds where a policy is rewind, else stops",
    )

    @model_validator(mode="after")
    def _statistics(self) -> WatchConfig:
        if self.rewind_skip > 1 and "rewind" not in (self.nonfinite, self.spike):
            raise ValueError("rewind_skip needs nonfinite: rewind or spike: rewind")
        return self
