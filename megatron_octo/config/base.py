"""What every configuration class shares: frozen, typed, and no unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A field that holds a seed; numpy and Megatron take these."""


class Strict(BaseModel):
    """Base of all configuration: immutable; unknown keys are refused, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which Python takes for 1."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"YAML reads it as {str(value).lower()}, which is neither a number nor a text")
        return value


def _takes_bool(annotation: Any) -> bool:
    inner = getattr(annotation, "__args__", ())
    return annotation is bool or any(_takes_bool(one) or isinstance(one, bool) for one in inner)
