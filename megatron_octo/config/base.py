"""What every configuration class shares: frozen, typed, and no unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A field that holds a seed; numpy and Megatron take these."""


class Strict(BaseModel):
    """Base of all configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
