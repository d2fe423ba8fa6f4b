"""What a run tells about itself, and how often."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_octo.config.base import Strict
from megatron_octo.units import Tokens


class ValidationConfig(Strict):
    """Loss on held-out text, source by source."""

    every: Tokens = Field(gt=0)
    sources: dict[str, Path] = Field(min_length=1, description="name of a source -> prefix of its .bin/.idx pair")
    windows: int = Field(default=64, gt=0, description="windows of each source, the same at every validation")


class WandbConfig(Strict):
    """Weights & Biases, where asked for; the package is installed by the user."""

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: str = Field(default="online", pattern="^(online|offline)$")


class LoggingConfig(Strict):
    """Where metrics go beside metrics.jsonl, and which costly ones are taken."""

    tensorboard: bool = True
    wandb: WandbConfig | None = None
    statistics_every: int | None = Field(
        default=None, gt=0, description="steps between gradient norms and activation statistics layer by layer"
    )
    profile_every: int | None = Field(
        default=None, gt=0, description="steps between profiles: where the time of a step goes, as a text flame"
    )
